"""Quality while training: at some steps, all ranks evaluate the weights between two steps of training.

    images        a grid of samples of every average, and the Frechet distance of the first one's samples
    held out      the loss on samples that training never reads, for the weights and for every average

Nothing here reads or changes what training computes with: the weights are gathered into a second model, and
every draw has its own key. So a run ends with the same bits with and without evaluations. Work is split into
tiles of a fixed shape, and results are summed in the order of the tiles: they do not depend on the world size
beyond the rounding that training itself has.

An evaluation comes before the save of its step, and the manifest tells which evaluation was the last one. So
a run that is killed repeats an evaluation exactly if it repeats the step. One that is asked to stop during an
evaluation drops it, saves, and makes it up when it resumes.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from dit_scale.checkpoint.manifest import Evaluated
from dit_scale.checkpoint.partition import MASTER
from dit_scale.diffusion import schedule as schedules
from dit_scale.heartbeat import Phase
from dit_scale.models import dit
from dit_scale.models.dit import DiT
from dit_scale.sampling.image_files import write_grid
from dit_scale.signals import StopRequest
from dit_scale.train.attempt import Attempt
from dit_scale.train.context import RunContext
from dit_scale.train.ema import ema_kind
from dit_scale.train.evaluation_images import Painter, Tile, grid_of
from dit_scale.train.evaluation_keys import FRECHET, RAW, deciding_key, loss_key
from dit_scale.train.evaluation_loss import HeldOutLoss, means
from dit_scale.train.evaluation_weights import gather_weights
from dit_scale.train.run_folder import evaluation_grid
from dit_scale.train.trainer import Trainer

T = TypeVar("T")


class Interrupted(Exception):
    """A rank was asked to stop during an evaluation; raised on all ranks together."""


class Evaluation:
    """Evaluates the weights of a run. All ranks call every public method alike."""

    def __init__(self, context: RunContext, trainer: Trainer) -> None:
        """Load what evaluations need; all of it is checked before the first step.

        Raises WeightsError or ConfigError if the autoencoder, the network or the reference does not fit.
        """
        config = context.config
        self._context, self._trainer = context, trainer
        self._painter: Painter | None = None
        self._held_out: HeldOutLoss | None = None
        if config.evaluate.every_steps and (config.evaluate.grid_images or config.evaluate.images):
            self._painter = Painter(
                config.evaluate,
                context.dataset,
                config.data.vae,
                config.diffusion.timesteps,
                context.world,
            )
        if context.held_out is not None:
            self._held_out = HeldOutLoss(
                dataset=context.dataset,
                ids=np.flatnonzero(context.held_out),
                schedule=schedules.linear(config.diffusion.timesteps).to(context.world.device),
                seed=config.evaluate.seed,
                tile=config.evaluate.tile,
                skip_damaged=config.data.damaged == "quarantine",
            )

    def is_due(self, attempt: Attempt) -> bool:
        """Whether the step of this attempt calls for an evaluation that has not been made yet."""
        every_steps, step, done = (
            self._context.config.evaluate.every_steps,
            attempt.state.step,
            attempt.state.evaluated,
        )
        is_point = every_steps > 0 and (step % every_steps == 0 or step == self._context.config.steps)
        return is_point and (done is None or done.step != step)

    def run(self, attempt: Attempt, stop: StopRequest) -> bool:
        """Evaluate the weights and record the result. Returns whether a request to stop prevented it."""
        start_s = time.monotonic()
        step = attempt.state.step

        def proceed() -> None:
            """Agree with all ranks to continue; raise Interrupted if one was asked to stop."""
            self._beat(step)
            (stopping,) = self._context.world.start_vote(stop.wanted).result()
            if stopping:
                raise Interrupted

        try:
            values, grids = self._evaluate(step, proceed)
        except Interrupted:
            attempt.say(f"the evaluation of step {step} is dropped: the run was asked to stop")
            return True
        key = deciding_key(self._context.config)
        result = Evaluated(step=step, measure=self._measure(), value=values.get(key))
        attempt.evaluated(result, values, grids, time.monotonic() - start_s)
        return False

    def _evaluate(
        self, step: int, proceed: Callable[[], None]
    ) -> tuple[dict[str, float | None], dict[str, Path]]:
        """Return the values for the record, and on rank 0 the files of the grids by EMA profile."""
        config, world = self._context.config, self._context.world
        profiles = {ema_kind(profile.name): profile.name for profile in config.ema}
        model = self._empty_model()
        values: dict[str, float | None] = {}
        grids: dict[str, Path] = {}
        for kind in (*profiles, MASTER):
            is_sampled = kind in self._sampled()
            if not is_sampled and self._held_out is None:
                continue
            proceed()
            gather_weights(model, kind, self._trainer.engine.owned, world)
            if is_sampled:
                tiles = self._sample(model, kind, step, proceed)
                if config.evaluate.grid_images and world.is_first:
                    grids[profiles[kind]] = evaluation_grid(config, step, profiles[kind])
                    write_grid(grid_of(tiles), grids[profiles[kind]])
                values |= self._distance(kind, tiles)
            if self._held_out is not None:
                name = RAW if kind == MASTER else kind
                losses = self._losses(self._held_out, model, proceed)
                values |= {loss_key(column, name): value for column, value in losses.items()}
        return values, grids

    def _sampled(self) -> list[str]:
        """Return the kinds of weights that are sampled: all averages for grids, the first for a distance."""
        if self._painter is None:
            return []
        kinds = [ema_kind(profile.name) for profile in self._context.config.ema]
        return kinds if self._context.config.evaluate.grid_images else kinds[:1]

    def _is_compared(self, kind: str) -> bool:
        """Whether the Frechet distance is that of samples of these weights."""
        config = self._context.config
        return config.evaluate.images > 0 and kind == ema_kind(config.ema[0].name)

    def _sample(self, model: DiT, kind: str, step: int, proceed: Callable[[], None]) -> list[Tile]:
        """Return all tiles of images of these weights."""
        assert self._painter is not None
        paint = partial(
            self._painter.paint, model, advance=lambda: self._beat(step), compare=self._is_compared(kind)
        )
        return self._split(self._painter.tiles(compare=self._is_compared(kind)), paint, proceed)

    def _distance(self, kind: str, tiles: list[Tile]) -> dict[str, float | None]:
        """Return the Frechet distance of the images, if it is that of these weights."""
        if not self._is_compared(kind):
            return {}
        assert self._painter is not None
        return {FRECHET: self._context.world.broadcast(partial(self._painter.distance, tiles))}

    def _losses(
        self, held_out: HeldOutLoss, model: DiT, proceed: Callable[[], None]
    ) -> dict[str, float | None]:
        """Return the held-out losses of these weights."""
        tile_sums = self._split(held_out.tiles, lambda number: held_out.tile_sums(model, number), proceed)
        return means(tile_sums)

    def _split(self, num_tiles: int, work: Callable[[int], T], proceed: Callable[[], None]) -> list[T]:
        """Do the work of each tile on one rank; return all results on all ranks, in the tiles' order."""
        world = self._context.world
        own: list[tuple[int, T]] = []
        for first in range(0, num_tiles, world.size):
            proceed()
            number = first + world.rank
            if number < num_tiles:
                own.append((number, work(number)))
        proceed()
        return list(_in_order(world.gather(own)))

    def _empty_model(self) -> DiT:
        """Return a second model of the run's precision, with undefined weights."""
        config, device = self._context.config, self._context.world.device
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        model = dit.build(config.model, config.seed, device, initialise=False)
        return model.to(dtype).eval().requires_grad_(False)

    def _measure(self) -> str:
        """Describe the number by which checkpoints are compared; empty if there is none."""
        config = self._context.config
        average = ema_kind(config.ema[0].name)
        if self._painter is not None and config.evaluate.images:
            return f"{self._painter.measure}, {average}"
        if self._held_out is not None:
            return f"held-out loss, {len(self._held_out.ids)} samples, seed {config.evaluate.seed}, {average}"
        return ""

    def _beat(self, step: int) -> None:
        self._context.heart.beat(Phase.EVALUATE, step)


def _in_order(parts: list[list[tuple[int, T]]]) -> Iterator[T]:
    """Yield the results of all ranks in the order of the tiles."""
    for _, result in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0]):
        yield result
