"""Take one step of a run again, and report what each of its samples contributed.

Training starts from the newest checkpoint before the step, or from step 0, and takes all steps as the run
did. Nothing is written to the run folder.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass

import numpy as np

from dit_scale import dist
from dit_scale.checkpoint import reader
from dit_scale.checkpoint.partition import OPTIMIZER_KINDS
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig
from dit_scale.data.held_out import held_out_mask
from dit_scale.data.loader import Loader
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.data.order import positions_of
from dit_scale.data.shards import LatentDataset
from dit_scale.dist import World
from dit_scale.report.history import StepHistory, as_taken, history_of
from dit_scale.telemetry.meters import COLUMNS, Meters, StepRow
from dit_scale.telemetry.progress import StatusLine
from dit_scale.train import determinism
from dit_scale.train.dataset_check import check_dataset, data_digest
from dit_scale.train.memory import plan_of
from dit_scale.train.objective import SampleLosses, drop_labels
from dit_scale.train.restore import find_checkpoint
from dit_scale.train.run_folder import config_of_folder
from dit_scale.train.run_state import RunState
from dit_scale.train.trainer import Trainer


@dataclass(frozen=True)
class ReplayedSample:
    """The contribution of one sample to the step."""

    position: int
    sample_id: int
    label: int
    dropped: bool
    """Whether it was trained without its label."""
    t: int
    loss: float
    mse: float
    vb: float

    @property
    def finite(self) -> bool:
        """Whether all losses of the sample are finite."""
        return all(map(math.isfinite, (self.loss, self.mse, self.vb)))


@dataclass(frozen=True)
class Replay:
    """A step that was taken again."""

    run: str
    step: int
    history: StepHistory
    checkpoint: str | None
    """The checkpoint from which the replay started; None for step 0."""
    world: int
    row: StepRow
    """Measurements of the step, by `COLUMNS`."""
    samples: tuple[ReplayedSample, ...]
    """All samples of the global batch: those that are not finite first, then by decreasing loss."""

    def differences(self) -> dict[str, float] | None:
        """Return the relative difference to the record for each column that is not bit-identical.

        None if the run recorded nothing for this step alone. NaN equals itself here.
        """
        if self.history.recorded is None:
            return None
        columns = zip(COLUMNS, self.row, self.history.recorded.row, strict=True)
        return {
            name: _relative_difference(got, wanted)
            for name, got, wanted in columns
            if repr(got) != repr(wanted)
        }


def replay(run: str, step: int, attempt: int | None) -> Replay | None:
    """Take a step (counted from 1) of the run in this folder again; all ranks call this.

    It is the step of the run as it is now, or as it was in `attempt`. Returns None on all ranks except the
    first. Raises ConfigError if the folder contains no run or the step has not been taken yet,
    CheckpointError for an unknown attempt, and whatever training raises.
    """
    asked = config_of_folder(run)
    determinism.pin(asked.engine)
    world = dist.start(asked.engine)
    with ExitStack() as stack:
        stack.callback(dist.stop)
        history = world.broadcast(lambda: history_of(asked, step, attempt))
        config = world.broadcast(lambda: as_taken(asked, history.attempt))
        dataset = LatentDataset.open(config.data.url, config.data.cache_dir, config.data.cache_bytes)
        check_dataset(config, dataset)
        plan = plan_of(config, world.size)
        # Steps do not depend on weight averages.
        training = Trainer(config.model_copy(update={"ema": ()}), world, plan, dataset.info.vae.scale)
        notes: list[str] = []
        checkpoint = _restore(
            config,
            dataset=dataset,
            world=world,
            training=training,
            history=history,
            say=notes.append,
        )
        excluded = history.attempt.excluded_positions
        state = RunState.of(checkpoint.manifest, excluded) if checkpoint else RunState(excluded=excluded)
        status = stack.enter_context(closing(StatusLine(step, state.step, shown=world.is_first)))
        for note in notes:
            status.say(note)
        loader = Loader(
            dataset,
            config.data,
            plan,
            rank=world.rank,
            seed=config.seed,
            first_step=state.step,
            excluded=state.excluded,
            quarantined={*state.quarantined, *history.quarantined},
            held_out=held_out_mask(len(dataset), config.evaluate.held_out, config.evaluate.seed),
        )
        stack.callback(loader.close)
        _advance(config, training, loader, status, range(state.step, step - 1))
        row, mine = _take(config, training, loader, state.excluded, step - 1)
        samples = [sample for samples in world.gather(mine) for sample in samples]
    if not world.is_first:
        return None
    samples.sort(key=lambda sample: (sample.finite, -sample.loss if sample.finite else 0.0, sample.position))
    return Replay(
        run=run,
        step=step,
        history=history,
        checkpoint=checkpoint.path if checkpoint else None,
        world=world.size,
        row=row,
        samples=tuple(samples),
    )


def _restore(
    config: TrainConfig,
    *,
    dataset: LatentDataset,
    world: World,
    training: Trainer,
    history: StepHistory,
    say: Callable[[str], None],
) -> Checkpoint | None:
    """Restore the newest checkpoint before the step and return it; None if training starts from step 0."""

    def fill(candidate: Checkpoint) -> None:
        reader.fill(training.engine.owned, OPTIMIZER_KINDS, candidate.read)

    data_sha256 = data_digest(dataset)
    checkpoint = find_checkpoint(config, data_sha256, world, fill, say, at_most_step=history.at_most_step)
    if checkpoint is None:
        training.start()
        say("starting from step 0: the run has no checkpoint before this step")
        return None
    training.resume(checkpoint.manifest.guard)
    say(f"starting from {checkpoint}")
    return checkpoint


def _advance(
    config: TrainConfig, training: Trainer, loader: Loader, status: StatusLine, steps: range
) -> None:
    """Take these steps (counted from 0) and show their progress."""
    status.say(f"steps to replay first: {len(steps)}")
    meters, since_s = Meters(), time.monotonic()
    for step in steps:
        meters.add(training.take(loader, step))
        status.advance()
        if (step + 1) % config.log.every_steps == 0:
            images, now_s = len(meters.collect()) * config.global_batch, time.monotonic()
            record = {
                **meters.take(),
                "images_per_s": images / (now_s - since_s),
                "lr": training.engine.hyper_parameters()[0]["lr"],
            }
            status.report(step + 1, record)
            since_s = now_s


def _take(
    config: TrainConfig,
    training: Trainer,
    loader: Loader,
    excluded: tuple[tuple[int, int], ...],
    step: int,
) -> tuple[StepRow, list[ReplayedSample]]:
    """Take a step (counted from 0); return its row and the samples of this rank."""
    taken: list[tuple[MicroBatch, SampleLosses]] = []
    row = training.take(loader, step, lambda *batch: taken.append(batch)).tolist()[: len(COLUMNS)]
    indices = step * config.global_batch + np.arange(config.global_batch)
    positions = positions_of(indices, excluded).tolist()
    ids = dict(zip(positions, loader.sample_ids(step).tolist(), strict=True))
    null, share = config.model.num_classes, config.diffusion.label_dropout
    samples = []
    for batch, losses in taken:
        y_B = drop_labels(batch.y_B, batch.position_B, null, share, config.seed)
        dropped_B = y_B != batch.y_B
        columns = (batch.position_B, batch.y_B, dropped_B, losses.t_B, *losses[:3], batch.weight_B)
        for position, *values, weight in zip(*(column.tolist() for column in columns), strict=True):
            if weight > 0:
                values_by_name = dict(
                    zip(("label", "dropped", "t", "loss", "mse", "vb"), values, strict=True)
                )
                samples.append(ReplayedSample(position, ids[position], **values_by_name))
    return tuple(row), samples


def _relative_difference(got: float, wanted: float) -> float:
    """Return the relative difference; infinite if it is undefined."""
    if not (math.isfinite(got) and math.isfinite(wanted) and wanted):
        return math.inf
    return abs(got / wanted - 1)
