"""The trainer: model, engine, EMA and guard, and the optimizer step that updates all of them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dit_scale.checkpoint import reader
from dit_scale.checkpoint.partition import EXP_AVG, EXP_AVG_SQ, MASTER
from dit_scale.config import TrainConfig
from dit_scale.data.batch_plan import BatchPlan
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.diffusion import schedule as schedules
from dit_scale.dist import World
from dit_scale.models import dit
from dit_scale.train.ema import Ema
from dit_scale.train.engine import Engine
from dit_scale.train.guard import Guard
from dit_scale.train.objective import MicroBatchObserver, losses
from dit_scale.train.optim import learning_rate
from dit_scale.train.sample_sums import SampleSums
from dit_scale.train.update_norms import Norms, update_norms


class Trainer:
    """A model in its engine, with its EMA profiles and its guard; `take` advances all of them by one step.

    Call `start` first; or fill a checkpoint into `engine.owned` and call `resume`.
    """

    def __init__(self, config: TrainConfig, world: World, plan: BatchPlan, latent_scale: float) -> None:
        self._config, self._world, self._plan = config, world, plan
        self._latent_scale = latent_scale
        self._schedule = schedules.linear(config.diffusion.timesteps).to(world.device)
        self._sample_sums = SampleSums(config.diffusion.timesteps, world)
        model = dit.build(config.model, config.seed, initialise=False)
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.attention_backend = model.attention_backend
        model.checkpoint_blocks(config.engine.activation_checkpointing)
        self.engine = Engine(model, config.engine, config.optimizer, world, plan)
        if config.engine.compile_blocks:
            model.compile_blocks()
        self.ema = Ema(config.ema, self.engine.owned, self.engine.followers)
        self.guard = Guard(config.guard, world.device)

    def start(self) -> None:
        """Set the state before the first step: initial weights, zero moments, EMA equal to the weights."""
        model = dit.build(self._config.model, self._config.seed)
        initial = {name: p.detach().flatten() for name, p in model.named_parameters()}
        owned = self.engine.owned
        reader.fill(owned, [MASTER], lambda _, name, start, n: initial[name][start : start + n])
        for partition in owned:
            for kind in (EXP_AVG, EXP_AVG_SQ):
                partition.buffers[kind].zero_()
        self.ema.start()
        self.guard.start()
        self.engine.publish_masters()
        self.engine.set_optimizer_step(0)

    def resume(self, guard: dict[str, float]) -> None:
        """Continue from the state filled into `engine.owned` and the saved state of the guard."""
        self.engine.publish_masters()
        self.guard.restore(guard)
        self.engine.set_optimizer_step(int(guard["updates"]))

    def take(
        self, batches: Iterator[MicroBatch], step: int, observer: MicroBatchObserver | None = None
    ) -> Tensor:
        """Take step `step` (counted from 0): `accumulate`, then `update`."""
        return self.update(self.accumulate(batches, observer), step)

    def accumulate(self, batches: Iterator[MicroBatch], observer: MicroBatchObserver | None = None) -> Tensor:
        """Run this rank's micro-batches of a step forward and backward.

        `observer` is called between the forward and the backward pass of each. Returns this rank's vector of
        `SampleSums`, fp32 on the device.
        """
        config, plan, device = self._config, self._plan, self._world.device
        step_sums = self._sample_sums.start()
        for micro_step in range(plan.micro_steps):
            batch = next(batches).to(device)
            by_sample = losses(
                self.engine,
                self._schedule,
                batch,
                seed=config.seed,
                latent_scale=self._latent_scale,
                null_class=config.model.num_classes,
                label_dropout=config.diffusion.label_dropout,
                compile_loss=config.engine.compile_blocks,
            )
            if observer is not None:
                observer(batch, by_sample)
            sums = by_sample.sums(batch.weight_B)
            self.engine.backward(sums[0] * plan.loss_scale, last=micro_step == plan.micro_steps - 1)
            self._sample_sums.add(step_sums, by_sample, sums, batch.weight_B)
        return step_sums

    def update(self, step_sums: Tensor, step: int) -> Tensor:
        """Update weights and EMA from the gradients accumulated for step `step` (counted from 0).

        The guard may skip the update of the weights; the EMA is updated in any case. Returns the row of
        `meters.COLUMNS` and `SAMPLE_COLUMNS`, fp32 (14,) on the device and equal on all ranks: global means
        of the losses, the global gradient norm (inf when it is not finite), 1.0 when the update was skipped,
        and what the samples measured.
        """
        sums, largest, by_quarter = self._sample_sums.over_ranks(step_sums)
        means = sums / self._plan.global_batch
        rate = learning_rate(self._config.optimizer, step, self._config.steps)
        self.ema.offer(step + 1)
        norm, skipped = self.engine.step(rate, lambda norm: self.guard.judge(means[0], norm))
        self.ema.update(step + 1)
        return torch.cat((means, torch.stack((norm, skipped, largest)), by_quarter))

    def update_norms(self, step: int) -> Norms | None:
        """Squared L2 norms of the update of step `step` (counted from 0) and of the masters, of this rank.

        It must be the last step that was not skipped. None before the first update. Waits for the device.
        """
        updates = int(self.guard.state()["updates"])
        if not updates:
            return None
        settings = self.engine.hyper_parameters()[0]
        rate = learning_rate(self._config.optimizer, step, self._config.steps)
        return update_norms(self.engine.owned, {**settings, "lr": rate}, updates)
