"""A model in training: its weights, and the fp32 masters and AdamW state that each rank owns.

Several processes share them by DeepSpeed's ZeRO (`zero.py`). A single process has nothing to share, so it
trains without DeepSpeed (`one_process.py`), whatever `engine.zero_stage` says. `Engine.owned` looks the same
in both cases and does not depend on the world size; EMA and checkpoints are built on it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dit_scale.checkpoint.partition import Partition
from dit_scale.config import EngineConfig, OptimizerConfig
from dit_scale.data.batch_plan import BatchPlan
from dit_scale.dist import World
from dit_scale.train.ema import Followers
from dit_scale.train.one_process import OneProcess
from dit_scale.train.optim import gate, set_updates
from dit_scale.train.zero import Zero

Judge = Callable[[Tensor], Tensor]
"""Global gradient norm => 1.0 when the step must be skipped, else 0.0; fp32 () on the device."""


class Sharding(Protocol):
    """Where weights, gradients and masters are, and how a step moves them."""

    owned: tuple[Partition, ...]
    """This rank's masters and moments."""
    masters: Sequence[Tensor]
    """The masters as the optimizer sees them."""
    module: nn.Module
    optimizer: torch.optim.Optimizer

    def __call__(self, *inputs: Tensor) -> Tensor: ...

    def backward(self, loss: Tensor, last: bool) -> None: ...

    def step(self) -> None: ...

    def grad_norm(self) -> Tensor: ...

    def publish_masters(self) -> None: ...


class Engine:
    """A model in training, sharded over the ranks if there are several.

    `owned` lists this rank's partitions. All kinds of optimizer state exist from the start, so a checkpoint
    can be saved or restored at any step.
    """

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        optimizer_config: OptimizerConfig,
        world: World,
        plan: BatchPlan,
    ) -> None:
        self._sharding = shard(model, config, optimizer_config, world, plan)
        self._optimizer = self._sharding.optimizer
        gate(self._optimizer, self._reach_verdict)
        self._judge: Judge | None = None
        self._verdict: Tensor | None = None
        self.owned = self._sharding.owned

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._sharding(*inputs)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of one micro-step; `last` marks the last one before `step`."""
        self._sharding.backward(loss, last)

    def step(self, lr: float, judge: Judge) -> tuple[Tensor, Tensor]:
        """Apply AdamW to the masters with this learning rate, and cast the masters into the weights.

        Calls `judge` once, after computing the gradient norm (before clipping) and before the update. The
        update is skipped when `judge` returns 1.0. It must return 1.0 for a norm that is not finite, because
        in most settings DeepSpeed itself drops such a step. Returns the norm and the verdict, fp32 () on the
        device; a norm that is not finite is inf, never NaN.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._judge, self._verdict = judge, None
        self._sharding.step()
        return self._sharding.grad_norm(), self._reach_verdict()

    def hyper_parameters(self) -> tuple[dict[str, Any], ...]:
        """The hyper-parameters of each optimizer group."""
        names = ("lr", "betas", "eps", "weight_decay")
        return tuple({name: group[name] for name in names} for group in self._optimizer.param_groups)

    @property
    def followers(self) -> Followers | None:
        """Where averages wait to be moved by the next update; None if the optimizer moves only masters."""
        return getattr(self._optimizer, "followers", None)

    @property
    def module(self) -> nn.Module:
        return self._sharding.module

    def publish_masters(self) -> None:
        """Cast restored fp32 masters into the weights that the forward pass reads."""
        self._sharding.publish_masters()

    def set_optimizer_step(self, updates: int) -> None:
        """Set the number of updates for AdamW's bias correction; skipped steps do not count."""
        set_updates(self._optimizer, self._sharding.masters, updates)

    def _reach_verdict(self) -> Tensor:
        """Judge the step once for all optimizer groups.

        When DeepSpeed drops a step it never asks for the verdict, so `step` reaches it afterwards.
        """
        if self._verdict is None:
            assert self._judge is not None
            self._verdict = self._judge(self._sharding.grad_norm())
        return self._verdict


def shard(
    model: nn.Module,
    config: EngineConfig,
    optimizer_config: OptimizerConfig,
    world: World,
    plan: BatchPlan,
) -> Sharding:
    """Put the model on the device, and build its optimizer for this number of processes."""
    if world.size == 1:
        return OneProcess(model, config.precision, optimizer_config, world.device)
    return Zero(model, config, optimizer_config, world, plan)
