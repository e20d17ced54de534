"""The noise schedule of a discrete Gaussian diffusion, and its respacing to fewer steps.

    full = linear(1000)            # for training
    short = respace(full, "250")   # for sampling; short.timesteps maps an index to the model's timestep

All tables are computed in float64 and cast to fp32 once.

Shapes: T steps of a schedule, S steps that respacing keeps.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dit_scale.diffusion.spacing import Float64, select
from dit_scale.errors import ConfigError

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """Tables over the T steps of a diffusion; index 0 is the least noisy step.

    All tensors are (T,) fp32 on one device, except `timesteps` (int64). `betas_float64` stays on the host;
    `float64_tables(betas_float64)` returns every table before the cast.
    """

    betas_float64: Float64
    """Betas before the cast; every other table follows from them."""
    timesteps: Tensor
    """Timesteps of the unrespaced diffusion, int64: the model's input."""
    betas: Tensor
    """Variance of q(x_t | x_{t-1})."""
    log_betas: Tensor
    """Upper bound of the learned log variance."""
    alphas_cumprod: Tensor
    """alpha_bar: the fraction of signal in the variance of x_t."""
    alphas_cumprod_prev: Tensor
    """alpha_bar one step earlier; 1 at index 0."""
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_mean_coef_start: Tensor
    """Weight of x_start in the mean of q(x_{t-1} | x_t, x_start)."""
    posterior_mean_coef_t: Tensor
    """Weight of x_t in the same mean."""
    posterior_variance: Tensor
    """Variance of q(x_{t-1} | x_t, x_start); 0 at index 0."""
    posterior_log_variance_clipped: Tensor
    """Log of `posterior_variance`, with index 0 set to index 1; lower bound of the learned log variance."""

    def __len__(self) -> int:
        return len(self.betas_float64)

    def to(self, device: torch.device | str) -> "Schedule":
        """Copy the tensors to `device`."""
        tables: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tables)


def linear(timesteps: int) -> Schedule:
    """The linear schedule of Ho et al. 2020, Section 4: betas from 1e-4 to 2e-2 at 1000 steps.

    For other lengths the betas are scaled by 1000 / timesteps, which keeps the noise level of the last step
    about the same. Raises ConfigError when that makes a beta 1 or more (20 steps or fewer).
    """
    scale = 1000 / max(timesteps, 1)
    if scale * 2e-2 >= 1:
        raise ConfigError(
            f"diffusion.timesteps={timesteps}: expected 21 or more, because the last beta of the linear "
            "schedule is 20 / timesteps and must stay below 1"
        )
    return _from_betas(np.linspace(scale * 1e-4, scale * 2e-2, timesteps), np.arange(timesteps))


def respace(schedule: Schedule, spec: str, spacing: str = "uniform") -> Schedule:
    """Reduce a schedule to the steps that `spec` keeps (see `spacing.select`), on the same device.

    alpha_bar of the kept steps is unchanged; the new betas follow from it. `timesteps` still refers to the
    unrespaced diffusion. Raises ConfigError for a specification that cannot be parsed or satisfied.
    """
    alphas_cumprod_T = float64_tables(schedule.betas_float64)["alphas_cumprod"]
    kept_S = select(alphas_cumprod_T, spec, spacing)
    alphas_cumprod_S = alphas_cumprod_T[kept_S]
    # Nichol & Dhariwal 2021, eq. 19.
    betas_S = 1 - alphas_cumprod_S / np.append(1.0, alphas_cumprod_S[:-1])
    device = schedule.timesteps.device
    return _from_betas(betas_S, schedule.timesteps.cpu().numpy()[kept_S]).to(device)


def float64_tables(betas_T: Float64) -> dict[str, Float64]:
    """Return every real-valued table of `Schedule` by name, each (T,) float64."""
    alphas_cumprod_T = np.cumprod(1 - betas_T)
    alphas_cumprod_prev_T = np.append(1.0, alphas_cumprod_T[:-1])
    # Ho et al. 2020, eq. 7.
    posterior_variance_T = betas_T * (1 - alphas_cumprod_prev_T) / (1 - alphas_cumprod_T)
    return {
        "betas": betas_T,
        "log_betas": np.log(betas_T),
        "alphas_cumprod": alphas_cumprod_T,
        "alphas_cumprod_prev": alphas_cumprod_prev_T,
        "sqrt_alphas_cumprod": np.sqrt(alphas_cumprod_T),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - alphas_cumprod_T),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / alphas_cumprod_T),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / alphas_cumprod_T - 1),
        # Ho et al. 2020, eq. 7.
        "posterior_mean_coef_start": betas_T * np.sqrt(alphas_cumprod_prev_T) / (1 - alphas_cumprod_T),
        "posterior_mean_coef_t": np.sqrt(1 - betas_T) * (1 - alphas_cumprod_prev_T) / (1 - alphas_cumprod_T),
        "posterior_variance": posterior_variance_T,
        # The variance at index 0 is 0 and has no log, so the log at index 1 replaces it.
        "posterior_log_variance_clipped": np.log(
            np.append(posterior_variance_T[1], posterior_variance_T[1:])
        ),
    }


def _from_betas(betas_T: Float64, timesteps_T: Int64) -> Schedule:
    tables = {  # float64 => fp32
        name: torch.tensor(table_T, dtype=torch.float32) for name, table_T in float64_tables(betas_T).items()
    }
    return Schedule(betas_T, torch.tensor(timesteps_T, dtype=torch.int64), **tables)
