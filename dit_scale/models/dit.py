"""The Diffusion Transformer (Peebles & Xie 2023): predicts noise and variance from noised latents.

    model = build(ModelConfig(name="DiT-XL/2"), seed=0)
    output_B2CHW = model(x_BCHW, t_B, y_B)

Weights may be fp32 or bf16; there is no autocast. Three things are always fp32: the timestep sinusoid,
the position embedding and its addition, and the output. Parameters have the names of the published
weights, which load unchanged.

Shapes: B batch, C latent channels, 2C eps then v channels, H and W latent height and width, T tokens,
D width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dit_scale.config import ModelConfig
from dit_scale.models import attention as attention_backends
from dit_scale.models.blocks import FinalLayer, condition, make_blocks
from dit_scale.models.checkpointing import Checkpointing, block_runner
from dit_scale.models.embeddings import (
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    add_positions,
    sincos_pos_embed,
)
from dit_scale.models.zoo import TIMESTEP_DIVISORS, Shape, shape_of


class DiT(nn.Module):
    """A Diffusion Transformer of a given shape. `build` creates one with initialised weights."""

    pos_embed: Tensor

    def __init__(self, shape: Shape, attention: str = "sdpa", timestep_embedding: str = "paper") -> None:
        super().__init__()
        self.shape = shape
        self.attention_backend = attention
        self._run_block = block_runner("none")
        self.x_embedder = PatchEmbed(shape.in_channels, shape.patch, shape.width)
        self.t_embedder = TimestepEmbedder(shape.width, TIMESTEP_DIVISORS[timestep_embedding])
        self.y_embedder = LabelEmbedder(shape.num_classes, shape.width)
        self.blocks = make_blocks(shape, attention_backends.choose(attention))
        self.final_layer = FinalLayer(shape)
        self.register_buffer("pos_embed", self._positions(self.x_embedder.proj.weight.device))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        """Predict noise (first C channels) and variance (last C channels) => output_B2CHW fp32.

        x_BCHW: noised latents, fp32. t_B: timesteps of the unrespaced diffusion, integer or float.
        y_B: class numbers, integer; num_classes is the null class.
        """
        dtype = self.x_embedder.proj.weight.dtype
        x_BTD = add_positions(self.x_embedder(x_BCHW.to(dtype)), self.pos_embed)
        c = condition(self.shape, self.t_embedder(t_B, dtype), self.y_embedder(y_B))
        if self.shape.extra_tokens:
            x_BTD = torch.cat((x_BTD, c), dim=1)
        for block in self.blocks:
            x_BTD = self._run_block(block, x_BTD, c)
        x_BTD = x_BTD[:, : self.shape.tokens]
        return unpatchify(self.final_layer(x_BTD, c).float(), self.shape)

    def checkpoint_blocks(self, mode: Checkpointing) -> None:
        """Choose what the blocks recompute in the backward pass; call it before `compile_blocks`."""
        self._run_block = block_runner(mode)

    def compile_blocks(self, **options: Any) -> None:
        """torch.compile the blocks; parameter names stay, and all blocks share one compilation.

        `options` are arguments of torch.compile.
        """
        self._run_block = torch.compile(self._run_block, **options)

    def _positions(self, device: torch.device) -> Tensor:
        if device.type == "meta":
            return torch.empty(1, self.shape.tokens, self.shape.width, dtype=torch.float32, device=device)
        return sincos_pos_embed(self.shape.width, self.shape.grid).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DiT":
        # Every cast and move of a module goes through here. The position embedding moves with the module
        # but stays fp32; a meta tensor has no values, so leaving the meta device recomputes it.
        exact = self.pos_embed
        super()._apply(fn, recurse)
        device = self.pos_embed.device
        self.pos_embed = self._positions(device) if exact.is_meta else exact.to(device)
        return self


def unpatchify(tokens_BTP: Tensor, shape: Shape) -> Tensor:
    """Reassemble patches => output_B2CHW; each token's P values are ordered (row, column, channel)."""
    patches = tokens_BTP.unflatten(2, (shape.patch, shape.patch, -1)).unflatten(1, (shape.grid, shape.grid))
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def build(config: ModelConfig, seed: int, device: str | torch.device = "cpu", initialise: bool = True) -> DiT:
    """Build the model that `config` describes; its initial weights depend only on `seed`.

    Weights are drawn on the CPU and then moved, so every device starts from the same bits. Pass
    `initialise=False` to leave them undefined: before loading weights, or on the "meta" device. Raises
    ConfigError for an unknown model or backend, and DeviceError for a backend that this machine cannot run.
    """
    with torch.device("meta"):
        model = DiT(shape_of(config), config.attention, config.timestep_embedding)
    if not initialise:
        return model.to_empty(device=device)
    model.to_empty(device="cpu")
    initialise_weights(model, torch.Generator().manual_seed(seed))
    return model.to(device)


@torch.no_grad()
def initialise_weights(model: DiT, generator: torch.Generator) -> None:
    """Initialise in place as the paper does (Section 4 and the released code), in module order.

    Linear layers and the patch convolution: Xavier-uniform weights, zero biases. Class table and
    timestep MLP: normal with std 0.02. Final linear layer, and for adaLN-Zero every modulation: zero.

    The result has the same bits on every CPU: uniform numbers are scaled by two separately rounded
    operations, which a compiler cannot fuse, and normals are drawn in float64, whose generator has a
    single code path.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            xavier_uniform_(module.weight, generator)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
    timestep_weights = [parameter for parameter in model.t_embedder.parameters() if parameter.ndim == 2]
    for weight in (model.y_embedder.embedding_table.weight, *timestep_weights):
        weight.copy_(0.02 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    model.final_layer.linear.weight.zero_()
    if model.shape.conditioning == "adaln_zero":
        for layer in (*model.blocks, model.final_layer):
            layer.adaLN_modulation[1].weight.zero_()


def xavier_uniform_(weight: Tensor, generator: torch.Generator) -> None:
    """Fill with uniform numbers in +-sqrt(6 / (fan_in + fan_out)) (Glorot & Bengio 2010, eq. 16)."""
    num_out, num_in = weight.flatten(1).shape
    bound = math.sqrt(6 / (num_in + num_out))
    weight.uniform_(generator=generator).mul_(2 * bound).sub_(bound)
