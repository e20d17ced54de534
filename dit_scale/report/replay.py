"""One step of a run, taken once more: what each of its samples contributed.

From the newest checkpoint before the step, or from nothing, all steps up to it are taken as the run took
them. The run's folder is read, never written.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from dit_scale import dist
from dit_scale.checkpoint import reader
from dit_scale.checkpoint.partition import OPTIMIZER_KINDS
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig
from dit_scale.data.loader import Batch, Loader
from dit_scale.data.order import positions_of
from dit_scale.data.shards import LatentDataset
from dit_scale.dist import World
from dit_scale.report.history import Past, as_taken, past_of
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
    """What one sample contributed to the step."""

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
        return all(map(math.isfinite, (self.loss, self.mse, self.vb)))


@dataclass(frozen=True)
class Replay:
    """A step once more."""

    run: str
    step: int
    past: Past
    checkpoint: str | None
    """Where the replay began; None for the start of the run."""
    world: int
    row: StepRow
    """The numbers of the step, by `COLUMNS`."""
    samples: tuple[ReplayedSample, ...]
    """Of the whole step: those that are not finite, then the others by falling loss."""

    def differences(self) -> dict[str, float] | None:
        """Relative difference to the record by column, of those that are not equal to the bit.

        None when the record has no row of this step. NaN is equal to itself here.
        """
        if self.past.recorded is None:
            return None
        columns = zip(COLUMNS, self.row, self.past.recorded.row, strict=True)
        return {name: _apart(got, wanted) for name, got, wanted in columns if repr(got) != repr(wanted)}


def replay(run: str, step: int, attempt: int | None) -> Replay | None:
    """Take a step (counted from 1) of the run in this folder again; all ranks call this.

    It is the step of the run as it is now, or as it was in `attempt`. Returns None on all ranks but the
    first. Raises ConfigError for a folder that is no run and a step that was not taken, CheckpointError
    for an unknown attempt, and what training raises.
    """
    asked = config_of_folder(run)
    determinism.pin(asked.engine)
    world = dist.start(asked.engine)
    with ExitStack() as stack:
        stack.callback(dist.stop)
        past = world.broadcast(lambda: past_of(asked, step, attempt))
        config = world.broadcast(lambda: as_taken(asked, past.attempt))
        dataset = LatentDataset.open(config.data.url, config.data.cache_dir, config.data.cache_bytes)
        check_dataset(config, dataset)
        plan = plan_of(config, world.size)
        # without averages: the steps do not depend on them
        training = Trainer(config.model_copy(update={"ema": ()}), world, plan, dataset.info.vae.scale)
        notes: list[str] = []
        found = _fill(config, dataset, world, training, past, notes.append)
        excluded = past.attempt.excluded_positions
        state = RunState.of(found.manifest, excluded) if found else RunState(excluded=excluded)
        status = StatusLine(step, state.step, shown=world.is_first)
        stack.callback(status.close)
        for note in notes:
            status.say(note)
        loader = Loader(
            dataset,
            config.data,
            plan,
            world.rank,
            config.seed,
            state.step,
            state.excluded,
            {*state.quarantined, *past.quarantined},
        )
        stack.callback(loader.close)
        _advance(config, training, loader, status, range(state.step, step - 1))
        row, mine = _take(config, training, loader, state.excluded, step - 1)
        samples = [sample for samples in world.gather(mine) for sample in samples]
    if not world.is_first:
        return None
    samples.sort(key=lambda sample: (sample.finite, -sample.loss if sample.finite else 0.0, sample.position))
    return Replay(run, step, past, found.path if found else None, world.size, row, tuple(samples))


def _fill(
    config: TrainConfig,
    dataset: LatentDataset,
    world: World,
    training: Trainer,
    past: Past,
    say: Callable[[str], None],
) -> Checkpoint | None:
    """Stand at the newest checkpoint on the way to the step; None for the start of the run."""

    def fill(found: Checkpoint) -> None:
        reader.fill(training.engine.owned, OPTIMIZER_KINDS, found.read)

    found = find_checkpoint(config, data_digest(dataset), world, fill, say, past.at_most_step)
    if found is None:
        training.start()
        say("from the start of the run: it has no checkpoint before this step")
        return None
    training.resume(found.manifest.guard)
    say(f"from {found}")
    return found


def _advance(
    config: TrainConfig, training: Trainer, loader: Loader, status: StatusLine, steps: range
) -> None:
    """Take these steps (counted from 0)."""
    status.say(f"steps to take again before it: {len(steps)}")
    meters = Meters(config.global_batch)
    for step in steps:
        meters.add(training.take(loader, step))
        status.advance()
        if (step + 1) % config.log.every_steps == 0:
            status.report(step + 1, {**meters.take(), "lr": training.engine.hyper_parameters()[0]["lr"]})


def _take(
    config: TrainConfig,
    training: Trainer,
    loader: Loader,
    excluded: tuple[tuple[int, int], ...],
    step: int,
) -> tuple[StepRow, list[ReplayedSample]]:
    """Take a step (counted from 0): its row, and the samples of this rank."""
    seen: list[tuple[Batch, SampleLosses]] = []
    row = tuple(training.take(loader, step, lambda *shown: seen.append(shown)).tolist())
    indices = step * config.global_batch + np.arange(config.global_batch)
    positions = positions_of(indices, excluded).tolist()
    ids = dict(zip(positions, loader.sample_ids(step).tolist(), strict=True))
    null, share = config.model.num_classes, config.diffusion.label_dropout
    samples = []
    for batch, losses in seen:
        y_B = drop_labels(batch.y_B, batch.position_B, null, share, config.seed)
        dropped_B = y_B != batch.y_B
        columns = (batch.position_B, batch.y_B, dropped_B, losses.t_B, *losses[:3], batch.weight_B)
        for position, *numbers, weight in zip(*(column.tolist() for column in columns), strict=True):
            if weight > 0:
                label, dropped, t, loss, mse, vb = numbers
                samples.append(ReplayedSample(position, ids[position], label, dropped, t, loss, mse, vb))
    return row, samples


def _apart(got: float, wanted: float) -> float:
    """Relative difference; infinite where there is none."""
    if not (math.isfinite(got) and math.isfinite(wanted) and wanted):
        return math.inf
    return abs(got / wanted - 1)
