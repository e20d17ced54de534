"""One optimizer step, and the model, engine and averages that it moves: training's and the benchmarks'."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dit_scale.config import TrainConfig
from dit_scale.data.loader import Batch
from dit_scale.data.plan import BatchPlan
from dit_scale.diffusion import schedule as schedules
from dit_scale.dist import World
from dit_scale.models import dit
from dit_scale.train import checkpoint
from dit_scale.train.ema import Ema
from dit_scale.train.engine import MASTER, Engine
from dit_scale.train.objective import loss_sums
from dit_scale.train.optim import learning_rate


class TrainingStep:
    """A model under its engine with the averages beside it; `take` moves all of them by one step.

    The fp32 masters start at the exact initial weights, a function of the configuration's seed.
    """

    def __init__(self, config: TrainConfig, world: World, plan: BatchPlan, latent_scale: float) -> None:
        self._config, self._plan, self._device = config, plan, world.device
        self._latent_scale = latent_scale
        self._schedule = schedules.linear(config.diffusion.timesteps).to(world.device)
        model = dit.build(config.model, config.seed)
        trained = {name: p.detach() for name, p in model.named_parameters()}
        initial = {name: p.clone().flatten() for name, p in trained.items()}
        self.shapes = {name: tuple(p.shape) for name, p in trained.items()}
        self.attention_backend = model.attention_backend
        self.engine = Engine(model, config.engine, config.optimizer, world, plan)
        if config.engine.compile_blocks:
            model.compile_blocks()
        # DeepSpeed makes its masters from weights that are bf16 already.
        checkpoint.fill(
            self.engine.owned, [MASTER], lambda _, name, start, n: initial[name][start : start + n]
        )
        self.engine.publish_masters()
        self.ema = Ema(config.ema, self.engine.owned)
        self.ema.start()

    def take(self, batches: Iterator[Batch], step: int) -> Tensor:
        """Take step `step` (counted from 0) from the next micro-batches of this rank.

        Returns this rank's sums of (loss, mse, bound) over its samples, fp32 (3,), on the device.
        """
        config, plan = self._config, self._plan
        step_sums = torch.zeros(3, device=self._device)
        for micro_step in range(plan.micro_steps):
            sums = loss_sums(
                self.engine,
                self._schedule,
                next(batches).to(self._device),
                config.seed,
                self._latent_scale,
                config.model.num_classes,
                config.diffusion.label_dropout,
            )
            self.engine.backward(sums[0] * plan.loss_scale, last=micro_step == plan.micro_steps - 1)
            step_sums += sums.detach()
        self.engine.step(learning_rate(config.optimizer, step))
        self.ema.update(step + 1)
        return step_sums
