"""Names of samplers, timestep spacings, guided channels, metrics and attention backends, without torch."""

from typing import Literal, get_args

Method = Literal["ddpm", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "unipc"]
"""Sampler; `dit_scale.diffusion.methods` has a function for each."""
Spacing = Literal["uniform", "quadratic", "logsnr"]
"""How a respacing spreads its timesteps; `dit_scale.diffusion.spacing` defines each."""
GuidanceChannels = Literal["first3", "all"]
"""Latent channels that classifier-free guidance changes."""

METHODS: tuple[str, ...] = get_args(Method)
SPACINGS: tuple[str, ...] = get_args(Spacing)
GUIDANCE_CHANNELS: tuple[str, ...] = get_args(GuidanceChannels)
METRICS = ("frechet", "sfid", "is", "kid", "neighbours")
"""Groups of figures of an evaluation; neighbours are precision, recall, density and coverage."""

ATTENTION_BACKENDS = (
    "sdpa",
    "sdpa_flash",
    "sdpa_efficient",
    "sdpa_cudnn",
    "sdpa_math",
    "flash2",
    "flash3",
    "flash4",
)
"""Attention backends. `sdpa` lets torch choose a kernel; `sdpa_*` pin one of torch's kernels."""
_HALF_PRECISION_ON_CUDA = ("sdpa_flash", "sdpa_cudnn", "flash2", "flash3", "flash4")


def attention_problem(backend: str, precision: str, determinism: str, device: str) -> str:
    """Say why a backend cannot train with these settings; empty if it can, or if `auto` leaves it open."""
    if backend == "sdpa_cudnn" and determinism == "strict":
        return (
            "attention: sdpa_cudnn has no deterministic backward pass, but determinism is strict; use "
            "attention: sdpa, or engine.determinism=fast"
        )
    # On a CPU, torch's flash kernel computes in fp32 too; the others need CUDA in any case.
    if (
        backend in _HALF_PRECISION_ON_CUDA
        and precision == "fp32"
        and (device == "cuda" or backend != "sdpa_flash")
    ):
        return (
            f"attention: {backend} computes only in bf16 on CUDA, but the precision is fp32; use "
            "attention: sdpa, or engine.precision=bf16"
        )
    return ""
