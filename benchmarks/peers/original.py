"""The training step that the DiT paper's authors published, written anew from its description.

It has what makes that recipe slow or fast: fp32 weights, layers as in timm, a diffusion whose float64 tables
are moved from numpy in every lookup, AdamW with torch's defaults, one moving average updated tensor by
tensor, and a loss that the host reads in every step. Draws come from torch's generator.

Two things are left out, which favours it: DistributedDataParallel around the model, and the VAE, which the
published loop runs on every image. Latents are drawn from their moments, as in our loop.

The model has the names of the published weights, so our weights load into it.

Shapes: B batch, C latent channels, 2C eps then v channels, H W latent sides, T tokens, D width, N heads,
K channels per head.
"""

import math
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_scale.diffusion.schedule import float64_tables, linear
from dit_scale.models.embeddings import sincos_pos_embed
from dit_scale.models.zoo import Shape

EMA_DECAY = 0.9999
LABEL_DROPOUT = 0.1
SINUSOID_CHANNELS = 256

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


class PatchEmbed(nn.Module):
    """timm's: the tokens stay transposed in memory, as the convolution leaves them."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True):
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.proj(x_BCHW).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """timm's, with torch's fused attention and its dropout layers of probability 0."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x_BTD: Tensor) -> Tensor:
        batch, tokens, width = x_BTD.shape
        qkv = self.qkv(x_BTD).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        q_BNTK, k_BNTK, v_BNTK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        o_BNTK = F.scaled_dot_product_attention(q_BNTK, k_BNTK, v_BNTK)
        return self.proj_drop(self.proj(o_BNTK.transpose(1, 2).reshape(batch, tokens, width)))


class Mlp(nn.Module):
    """timm's, with its dropout layers."""

    def __init__(
        self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module], drop: float = 0.0
    ):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.drop1(self.act(self.fc1(x_BTD)))))


def modulate(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return x_BTD * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


class Block(nn.Module):
    """An adaLN-Zero block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width, lambda: nn.GELU(approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        x_BTD = x_BTD + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x_BTD), shift1, scale1))
        return x_BTD + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x_BTD), shift2, scale2))


class TimestepEmbedder(nn.Module):
    """A sinusoid whose frequencies are computed on the host in every step, then two layers."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID_CHANNELS, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        half = SINUSOID_CHANNELS // 2
        numbers = torch.arange(half, dtype=torch.float32)
        frequencies = torch.exp(-math.log(10000) * numbers / half).to(t_B.device)
        angles = t_B[:, None].float() * frequencies[None]
        return self.mlp(torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1))


class LabelEmbedder(nn.Module):
    """A table; while training, it replaces a tenth of the labels by the null class."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = nn.Embedding(num_classes + 1, width)

    def forward(self, y_B: Tensor) -> Tensor:
        if self.training:
            y_B = torch.where(torch.rand(len(y_B), device=y_B.device) < LABEL_DROPOUT, self.num_classes, y_B)
        return self.embedding_table(y_B)


class FinalLayer(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        shift_BD, scale_BD = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BTD), shift_BD, scale_BD))


class OriginalDiT(nn.Module):
    """The published model. With `recompute`, each block is checkpointed, as a known follow-up does."""

    def __init__(self, shape: Shape, recompute: bool = False):
        super().__init__()
        self.shape, self.recompute = shape, recompute
        self.x_embedder = PatchEmbed(shape.latent_size, shape.patch, shape.in_channels, shape.width)
        self.t_embedder = TimestepEmbedder(shape.width)
        self.y_embedder = LabelEmbedder(shape.num_classes, shape.width)
        self.pos_embed = nn.Parameter(sincos_pos_embed(shape.width, shape.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))
        self.final_layer = FinalLayer(shape.width, 2 * shape.patch_channels)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        x_BTD = self.x_embedder(x_BCHW) + self.pos_embed
        c_BD = self.t_embedder(t_B) + self.y_embedder(y_B)
        for block in self.blocks:
            if self.recompute:
                x_BTD = checkpoint(block, x_BTD, c_BD, use_reentrant=True)
            else:
                x_BTD = block(x_BTD, c_BD)
        patches = self.final_layer(x_BTD, c_BD)
        grid, patch, channels = self.shape.grid, self.shape.patch, 2 * self.shape.in_channels
        patches = patches.reshape(len(patches), grid, grid, patch, patch, channels)
        image = torch.einsum("nhwpqc->nchpwq", patches)
        return image.reshape(len(image), channels, grid * patch, grid * patch)


class Diffusion:
    """The published training loss; every table is a float64 array that each lookup moves and expands."""

    def __init__(self) -> None:
        schedule = linear(1000)
        self.tables = float64_tables(schedule.betas_float64)
        self.num_timesteps = len(schedule)

    def table(self, name: str, t_B: Tensor, like: Tensor) -> Tensor:
        values_B = torch.from_numpy(self.tables[name]).to(t_B.device)[t_B].float()
        return values_B[:, None, None, None] + torch.zeros(like.shape, device=t_B.device)

    def posterior_mean(self, x_start: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        # Ho et al. 2020, eq. 7.
        return (
            self.table("posterior_mean_coef_start", t_B, x_t) * x_start
            + self.table("posterior_mean_coef_t", t_B, x_t) * x_t
        )

    def training_losses(
        self, model: Model, x_start: Tensor, t_B: Tensor, y_B: Tensor, noise: Tensor | None = None
    ) -> Tensor:
        """Loss of each sample => (B,). Draws the noise unless it is given."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = (  # Ho et al. 2020, eq. 4
            self.table("sqrt_alphas_cumprod", t_B, x_start) * x_start
            + self.table("sqrt_one_minus_alphas_cumprod", t_B, x_start) * noise
        )
        eps, v = torch.split(model(x_t, t_B, y_B), x_t.shape[1], dim=1)
        vb_B = self.bound(torch.cat([eps.detach(), v], dim=1), x_start, x_t, t_B)
        return _mean_flat((noise - eps) ** 2) + vb_B

    def bound(self, output: Tensor, x_start: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
        """The variational bound's term in bits per element => (B,)."""
        eps, v = torch.split(output, x_t.shape[1], dim=1)
        true_mean = self.posterior_mean(x_start, x_t, t_B)
        true_log_variance = self.table("posterior_log_variance_clipped", t_B, x_t)
        lowest = self.table("posterior_log_variance_clipped", t_B, x_t)
        fraction = (v + 1) / 2  # Nichol & Dhariwal 2021, eq. 15
        log_variance = fraction * self.table("log_betas", t_B, x_t) + (1 - fraction) * lowest
        guess = (  # Ho et al. 2020, eq. 15
            self.table("sqrt_recip_alphas_cumprod", t_B, x_t) * x_t
            - self.table("sqrt_recipm1_alphas_cumprod", t_B, x_t) * eps
        )
        mean = self.posterior_mean(guess, x_t, t_B)
        kl = 0.5 * (
            -1.0
            + log_variance
            - true_log_variance
            + torch.exp(true_log_variance - log_variance)
            + (true_mean - mean) ** 2 * torch.exp(-log_variance)
        )
        nll = -_log_likelihood(x_start, mean, 0.5 * log_variance)
        return torch.where(t_B == 0, _mean_flat(nll) / np.log(2.0), _mean_flat(kl) / np.log(2.0))


def _mean_flat(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.mean(dim=list(range(1, x_BCHW.ndim)))


def _cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * torch.pow(x, 3))))


def _log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    # Ho et al. 2020, eq. 13; the two open bins and the inner ones each take their own logarithm.
    inverse = torch.exp(-log_std)
    upper, lower = _cdf(inverse * (x - mean + 1 / 255)), _cdf(inverse * (x - mean - 1 / 255))
    inside = torch.log((upper - lower).clamp(min=1e-12))
    above = torch.log((1.0 - lower).clamp(min=1e-12))
    below = torch.log(upper.clamp(min=1e-12))
    return torch.where(x < -0.999, below, torch.where(x > 0.999, above, inside))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module) -> None:
    """Update the moving average tensor by tensor, the frozen position embedding included."""
    averages = OrderedDict(ema.named_parameters())
    for name, parameter in OrderedDict(model.named_parameters()).items():
        averages[name].mul_(EMA_DECAY).add_(parameter.data, alpha=1 - EMA_DECAY)
