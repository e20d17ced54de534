"""The loops that are compared: each returns a function that takes one training step of a setting.

- `original`: the published recipe (`original`), fp32; TF32 matrix products on CUDA.
- `fast`: the same under autocast to bf16 with every block checkpointed, as a known follow-up trains.
- `bare`: a strong plain loop over our model: fused AdamW and moving average over all tensors at once,
  torch's generator, gradients dropped between steps, no guard, no gradient norm, no host reads. In bf16 it
  keeps fp32 masters, as ours does.
- `zero1`, `zero2`, `zero3`: `Trainer.take`, the step of real training. A single process has nothing to shard,
  so there the three are one.
- `reference`: the same step over the model and the diffusion of the published code itself, from a checkout
  whose folder is on PYTHONPATH. Where timm is not installed, the layers in `original` take its place.

`NAME+compile` compiles the transformer blocks of the same loop. All start from the same weights and draw
latents from the same moments in host memory.
"""

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import original
from benchmarks.train_step import LATENT_SCALE, random_batch
from dit_scale import dist
from dit_scale.config import EngineConfig, ModelConfig, TrainConfig
from dit_scale.data.batch_plan import batch_plan
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.diffusion.gaussian import q_sample
from dit_scale.diffusion.loss import hybrid_loss
from dit_scale.diffusion.schedule import linear
from dit_scale.errors import ConfigError
from dit_scale.models.dit import build
from dit_scale.models.zoo import Shape, shape_of
from dit_scale.telemetry.meters import Meters
from dit_scale.train import determinism
from dit_scale.train.trainer import Trainer

COMPILE = "+compile"

Step = Callable[[], object]
Losses = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_start_BCHW, t_B, y_B) => loss of each sample."""


@dataclass(frozen=True)
class Setting:
    """What every loop trains."""

    model: str
    image_size: int
    batch: int
    """Images per process and step, in one forward pass."""
    precision: str
    """Applies to our loops and `bare`; `original` is always fp32, and `fast` always bf16."""
    device: str = "cpu"

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(name=self.model, image_size=self.image_size)

    @property
    def shape(self) -> Shape:
        return shape_of(self.model_config)


def build_step(name: str, setting: Setting) -> Step:
    """Build the loop called `name` in this process. Raises ConfigError if it cannot be had."""
    name, compiled = name.removesuffix(COMPILE), name.endswith(COMPILE)
    if name not in LOOPS:
        raise ConfigError(f"unknown loop {name!r}; expected one of {', '.join(LOOPS)}, or one with {COMPILE}")
    if not name.startswith("zero"):
        torch.set_num_threads(1)
    return LOOPS[name](setting, compiled)


def ours(zero_stage: int, setting: Setting, compiled: bool) -> Step:
    """Real training steps, with one process or as many as the launcher's variables say."""
    config = TrainConfig(
        global_batch=setting.batch * int(os.environ.get("WORLD_SIZE", "1")),
        model=setting.model_config,
        engine=EngineConfig(
            zero_stage=zero_stage,
            precision=setting.precision,
            micro_batch=setting.batch,
            device=setting.device,
            compile_blocks=compiled,
        ),
    )
    determinism.pin(config.engine)
    world = dist.start(config.engine)
    trainer = Trainer(config, world, batch_plan(config.global_batch, setting.batch, world.size), LATENT_SCALE)
    trainer.start()
    meters = Meters()
    batches, numbers = cycle(_batches(setting)), count()
    return lambda: meters.add(trainer.take(batches, next(numbers)))


def bare(setting: Setting, compiled: bool) -> Step:
    """A plain loop over our model that does as little as a correct one can."""
    device = torch.device(setting.device)
    model = build(setting.model_config, seed=0, device=device)
    masters = list(model.parameters())
    ema = [p.detach().clone() for p in masters]
    schedule, null_class = linear(1000).to(device), setting.shape.num_classes
    batches = cycle(_batches(setting))
    if setting.precision == "bf16":
        masters = [nn.Parameter(p.detach().clone()) for p in masters]
        model.to(torch.bfloat16)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(masters, lr=1e-4, weight_decay=0, fused=True)
    if compiled:
        model.compile_blocks()

    @torch.no_grad()
    def update() -> None:
        if masters[0] is not weights[0]:
            for master, weight in zip(masters, weights, strict=True):
                assert weight.grad is not None
                master.grad, weight.grad = weight.grad.float(), None
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema, masters, 1 - original.EMA_DECAY)
        if masters[0] is not weights[0]:
            torch._foreach_copy_(weights, masters)

    def step() -> None:
        z_BCHW, y_B = latents(next(batches).to(device))
        t_B = torch.randint(0, 1000, (len(y_B),), device=device)
        y_B = torch.where(torch.rand(len(y_B), device=device) < original.LABEL_DROPOUT, null_class, y_B)
        noise_BCHW = torch.randn_like(z_BCHW)
        x_BCHW = q_sample(schedule, z_BCHW, t_B, noise_BCHW)
        loss = hybrid_loss(
            schedule,
            model(x_BCHW, t_B, y_B),
            x_start_BCHW=z_BCHW,
            x_t_BCHW=x_BCHW,
            noise_BCHW=noise_BCHW,
            t_B=t_B,
        )
        loss.total_B.mean().backward()
        update()

    return step


def published(setting: Setting, compiled: bool, fast: bool = False) -> Step:
    """The published loop; `fast`: under autocast to bf16 with checkpointed blocks."""
    model = original.OriginalDiT(setting.shape, recompute=fast)
    model.load_state_dict(build(setting.model_config, seed=0).state_dict())
    diffusion = original.Diffusion()
    return _published_loop(setting, compiled, model, partial(diffusion.training_losses, model), fast)


def reference(setting: Setting, compiled: bool) -> Step:
    """The published loop over the published model and diffusion, from a checkout."""
    _offer_timm()
    try:
        from diffusion import create_diffusion  # type: ignore[import-not-found]
        from models import DiT  # type: ignore[import-not-found]
    except ImportError as error:
        raise ConfigError(
            f"the loop `reference` needs a checkout of the published code ({error}); add its folder, which "
            "contains models.py and diffusion, to PYTHONPATH"
        ) from None
    shape = setting.shape
    model = DiT(
        input_size=shape.latent_size,
        patch_size=shape.patch,
        hidden_size=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
    )
    model.load_state_dict(build(setting.model_config, seed=0).state_dict())
    diffusion = create_diffusion(timestep_respacing="")

    def losses(x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        loss: Tensor = diffusion.training_losses(model, x_BCHW, t_B, {"y": y_B})["loss"]
        return loss

    return _published_loop(setting, compiled, model, losses, fast=False)


def _published_loop(setting: Setting, compiled: bool, model: nn.Module, losses: Losses, fast: bool) -> Step:
    device = torch.device(setting.device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model.to(device).train()
    ema = deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    batches = cycle(_batches(setting))
    autocast: Any = partial(torch.autocast, device.type, torch.bfloat16) if fast else nullcontext
    running_loss = 0.0
    if compiled:
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile()

    def step() -> None:
        nonlocal running_loss
        x_BCHW, y_B = latents(next(batches).to(device))
        t_B = torch.randint(0, 1000, (len(y_B),), device=device)
        with autocast():
            loss = losses(x_BCHW, t_B, y_B).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        original.update_ema(ema, model)
        running_loss += loss.item()

    return step


def latents(batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Draw z_BCHW from the moments with torch's generator; returns it with the labels."""
    mean_BCHW, std_BCHW = batch.moments_B2CHW.float().chunk(2, dim=1)
    return (mean_BCHW + std_BCHW * torch.randn_like(mean_BCHW)).mul_(LATENT_SCALE), batch.y_B


def _batches(setting: Setting) -> list[MicroBatch]:
    return [random_batch(setting.shape, setting.batch, index) for index in range(4)]


def _offer_timm() -> None:
    """Offer the layers written here under timm's name, unless timm is installed."""
    try:
        import timm  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        layers = ModuleType("timm.models.vision_transformer")
        layers.__dict__.update(PatchEmbed=original.PatchEmbed, Attention=original.Attention, Mlp=original.Mlp)
        for name in ("timm", "timm.models"):
            sys.modules[name] = ModuleType(name)
        sys.modules[layers.__name__] = layers


LOOPS: dict[str, Callable[[Setting, bool], Step]] = {
    "original": published,
    "reference": reference,
    "fast": partial(published, fast=True),
    "bare": bare,
    "zero1": partial(ours, 1),
    "zero2": partial(ours, 2),
    "zero3": partial(ours, 3),
}
"""Every loop by name."""
