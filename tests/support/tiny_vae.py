"""Random AutoencoderKLs, saved like users' VAEs: one with a few thousand weights, one of the real size."""

from pathlib import Path


def save_tiny_vae(folder: Path, seed: int = 0, num_levels: int = 4) -> str:
    """Write config.json and safetensors; `num_levels` 4 divides the image size by 8, as in the real VAE."""
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


def save_full_vae(folder: Path, seed: int = 0) -> str:
    """An autoencoder of Stable Diffusion's architecture with random weights, 335 MB in fp32."""
    import torch
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=32,
            sample_size=512,
        )
    model.save_pretrained(folder, safe_serialization=True)
    return str(folder)
