"""The four block designs of Section 3.2 of the DiT paper, and the final layer.

A block takes tokens and conditioning. For adaLN and adaLN-Zero the conditioning is c_BD, the sum of the
timestep and class embeddings; for cross-attention it is c_BSD, the two as a sequence. In-context blocks
ignore it because timestep and class are among their tokens. LayerNorms have no parameters; every linear
layer has a bias.

Shapes: B batch, T tokens, D width, H heads, K channels per head, S = 2 conditioning tokens.
"""

import torch
from torch import Tensor, nn

from dit_scale.models.attention import AttentionFunction
from dit_scale.models.zoo import MLP_RATIO, Conditioning, Shape


def modulate(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Apply adaptive normalisation's shift and scale to the channels of every token => x_BTD."""
    return x_BTD * (1 + scale_BD[:, None]) + shift_BD[:, None]


def layer_norm(width: int) -> nn.LayerNorm:
    """LayerNorm without learned gain and bias; in the adaLN designs the conditioning provides both."""
    return nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


def modulation(width: int, chunks: int) -> nn.Sequential:
    """Regress `chunks` vectors of `width` from the conditioning: c_BD => (B, chunks * width)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))


def unpack(packed_BTNHK: Tensor) -> tuple[Tensor, ...]:
    """Views of the N packed results of a linear layer, each of them (B, H, T, K)."""
    # Split before transposing: the gradient is then put together in the layout of the packed tensor. If the
    # packed tensor were permuted and split, its gradient would be copied once more.
    return tuple(x_BTHK.transpose(1, 2) for x_BTHK in packed_BTNHK.unbind(2))


class SelfAttention(nn.Module):
    """Multi-head self-attention; one linear layer computes q, k and v, packed in that order."""

    def __init__(self, width: int, heads: int, attend: AttentionFunction) -> None:
        super().__init__()
        self.heads = heads
        self.attend = attend
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD => x_BTD."""
        packed_BT3HK = self.qkv(x_BTD).unflatten(2, (3, self.heads, -1))
        q_BHTK, k_BHTK, v_BHTK = unpack(packed_BT3HK)
        return self.proj(self.attend(q_BHTK, k_BHTK, v_BHTK).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens to the conditioning sequence."""

    def __init__(self, width: int, heads: int, attend: AttentionFunction) -> None:
        super().__init__()
        self.heads = heads
        self.attend = attend
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor, c_BSD: Tensor) -> Tensor:
        """x_BTD, c_BSD => x_BTD."""
        q_BHTK = self.q(x_BTD).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k_BHSK, v_BHSK = unpack(self.kv(c_BSD).unflatten(2, (2, self.heads, -1)))
        return self.proj(self.attend(q_BHTK, k_BHSK, v_BHSK).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x_BTD => x_BTD."""
        return self.fc2(self.act(self.fc1(x_BTD)))


class InContextBlock(nn.Module):
    """A standard vision transformer block; timestep and class are two of its tokens.

    The other designs extend its layers and override `forward`.
    """

    def __init__(self, width: int, heads: int, attend: AttentionFunction) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, heads, attend)
        self.norm2 = layer_norm(width)
        self.mlp = Mlp(width)

    def forward(self, x_BTD: Tensor, c_BSD: Tensor) -> Tensor:
        """x_BTD => x_BTD; c_BSD is ignored."""
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        return x_BTD + self.mlp(self.norm2(x_BTD))


class CrossAttentionBlock(InContextBlock):
    """Self-attention, then attention to the conditioning, then the MLP; no modulation."""

    def __init__(self, width: int, heads: int, attend: AttentionFunction) -> None:
        super().__init__(width, heads, attend)
        self.norm_cross = layer_norm(width)
        self.cross_attn = CrossAttention(width, heads, attend)

    def forward(self, x_BTD: Tensor, c_BSD: Tensor) -> Tensor:
        """x_BTD, c_BSD => x_BTD."""
        x_BTD = x_BTD + self.attn(self.norm1(x_BTD))
        x_BTD = x_BTD + self.cross_attn(self.norm_cross(x_BTD), c_BSD)
        return x_BTD + self.mlp(self.norm2(x_BTD))


class AdaLnBlock(InContextBlock):
    """Regresses the shift and scale before attention and MLP from the conditioning."""

    def __init__(self, width: int, heads: int, attend: AttentionFunction) -> None:
        super().__init__(width, heads, attend)
        self.adaLN_modulation = modulation(width, chunks=4)

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        """x_BTD, c_BD => x_BTD."""
        shift_msa, scale_msa, shift_mlp, scale_mlp = self.adaLN_modulation(c_BD).chunk(4, 1)
        x_BTD = x_BTD + self.attn(modulate(self.norm1(x_BTD), shift_msa, scale_msa))
        return x_BTD + self.mlp(modulate(self.norm2(x_BTD), shift_mlp, scale_mlp))


class AdaLnZeroBlock(InContextBlock):
    """adaLN plus a gate on each residual branch; with zero gates the block is the identity."""

    def __init__(self, width: int, heads: int, attend: AttentionFunction) -> None:
        super().__init__(width, heads, attend)
        self.adaLN_modulation = modulation(width, chunks=6)

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        """x_BTD, c_BD => x_BTD."""
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c_BD).chunk(
            6, 1
        )
        x_BTD = x_BTD + gate_msa[:, None] * self.attn(modulate(self.norm1(x_BTD), shift_msa, scale_msa))
        return x_BTD + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x_BTD), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Maps each token to the noise and variance of its patch (Section 3.2, "Transformer decoder")."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm_final = layer_norm(shape.width)
        self.linear = nn.Linear(shape.width, 2 * shape.patch_channels)
        chunks = shape.final_modulation_chunks
        self.adaLN_modulation = modulation(shape.width, chunks) if chunks else None

    def forward(self, x_BTD: Tensor, c: Tensor) -> Tensor:
        """x_BTD and the blocks' conditioning => (B, T, 2 * patch_channels)."""
        x_BTD = self.norm_final(x_BTD)
        if self.adaLN_modulation is not None:
            shift_BD, scale_BD = self.adaLN_modulation(c).chunk(2, 1)
            x_BTD = modulate(x_BTD, shift_BD, scale_BD)
        return self.linear(x_BTD)


BLOCKS: dict[Conditioning, type[InContextBlock]] = {
    "adaln_zero": AdaLnZeroBlock,
    "adaln": AdaLnBlock,
    "cross_attention": CrossAttentionBlock,
    "in_context": InContextBlock,
}
"""Block class by conditioning design."""


def make_blocks(shape: Shape, attend: AttentionFunction) -> nn.ModuleList:
    """Build all blocks of a model, first to last."""
    block = BLOCKS[shape.conditioning]
    return nn.ModuleList(block(shape.width, shape.heads, attend) for _ in range(shape.depth))


def condition(shape: Shape, t_BD: Tensor, y_BD: Tensor) -> Tensor:
    """Combine timestep and class embeddings into the conditioning of this design: c_BD or c_BSD."""
    return t_BD + y_BD if shape.modulation_chunks else torch.stack((t_BD, y_BD), dim=1)
