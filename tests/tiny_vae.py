"""A random AutoencoderKL of a few thousand weights, saved as users' VAEs are."""

from pathlib import Path


def save_tiny_vae(folder: Path, seed: int = 0, num_levels: int = 4) -> str:
    """Write config.json and safetensors; `num_levels` 4 divides the image by 8, as the real one does."""
    import torch
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKL(
            block_out_channels=(8, 8, 16, 16)[-num_levels:],
            down_block_types=("DownEncoderBlock2D",) * num_levels,
            up_block_types=("UpDecoderBlock2D",) * num_levels,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )
    model.save_pretrained(folder, safe_serialization=True)
    return str(folder)
