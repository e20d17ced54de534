"""The history of a step: the attempt that took it, the checkpoints before it, and what was recorded of it."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.attempts import AttemptRecord
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, CheckpointId, read_manifest
from dit_scale.config import TrainConfig
from dit_scale.errors import CheckpointError, ConfigError
from dit_scale.journal import Event
from dit_scale.lines import read_objects
from dit_scale.storage import Storage
from dit_scale.telemetry.meters import COLUMNS, StepRow
from dit_scale.train.run_folder import root_of

Line = dict[str, Any]
"""A line of the journal or the record."""


@dataclass(frozen=True)
class RecordedStep:
    """The measurements of a single step, as the run recorded them."""

    row: StepRow
    where: str
    """The file or checkpoint that contains them."""


@dataclass(frozen=True)
class StepHistory:
    """How a run reached a step."""

    attempt: AttemptRecord
    """The attempt that took the step."""
    at_most_step: int
    """Committed checkpoints up to this step precede the step in this history."""
    recorded: RecordedStep | None
    """None if the run recorded nothing for this step alone."""
    quarantined: tuple[int, ...]
    """Samples that the attempt had quarantined up to the step."""
    world: int | None
    """World size of the attempt; None if the journal does not record it."""
    rolled_back: tuple[int, ...]
    """Other attempts that failed at this step and were rolled back."""


def history_of(config: TrainConfig, step: int, attempt: int | None) -> StepHistory:
    """Return the history of a step (counted from 1) of the run as it is now, or as it was in `attempt`.

    Raises ConfigError if the run has not reached the step, CheckpointError if there is no such attempt or its
    record is damaged.
    """
    root, folder = root_of(config), Path(config.run)
    journal = read_objects(folder / "events.jsonl", "event", "attempt", "step")
    record = read_objects(folder / "metrics.jsonl", "step", *COLUMNS)
    committed = attempts.committed(root)
    reached = max(
        [line["step"] for line in (*journal, *record)] + [checkpoint.step for checkpoint in committed],
        default=0,
    )
    # The run may have taken some steps since its last entry, but `steps` may also have been lowered since.
    if step > max(reached, min(reached + config.log.every_steps, config.steps)):
        raise ConfigError(
            f"{config.run}: step {step} has not been taken yet; the run has reached about step {reached}"
        )
    taker = _taker(root, step, attempt)
    later = [number for number in attempts.numbers(root) if number > taker.number]
    resumed_at = min((_resumed_at(attempts.read(root, number)) for number in later), default=step)
    of_taker = [event for event in journal if event["attempt"] == taker.number]
    damage = [event for event in of_taker if event["event"] == Event.QUARANTINED]
    return StepHistory(
        attempt=taker,
        at_most_step=min(step - 1, resumed_at),
        recorded=_skipped(of_taker, step)
        or (None if resumed_at < step else _logged(record, step) or _pending(root, committed, step)),
        # A sample is journaled at most one step after the step that first needed it.
        quarantined=tuple(event["sample_id"] for event in damage if event["step"] <= step + 1),
        world=next((event["world"] for event in of_taker if event["event"] == Event.START), None),
        rolled_back=tuple(
            event["attempt"]
            for event in journal
            if event["event"] == Event.ROLLBACK and event["attempt"] != taker.number
            if event["failed_steps"][0] <= step <= event["failed_steps"][1]
        ),
    )


def as_taken(config: TrainConfig, attempt: AttemptRecord) -> TrainConfig:
    """Return the configuration with the settings of an attempt, if one of its checkpoints is left.

    Paths and device stay as they are now.
    """
    root = root_of(config)
    candidates = [(one, folder) for folder in (CHECKPOINTS, EMA) for one in attempts.committed(root, folder)]
    for checkpoint_id, folder in candidates:
        if checkpoint_id.attempt == attempt.number:
            with suppress(CheckpointError, ValidationError):
                taken = TrainConfig.model_validate(read_manifest(root, checkpoint_id, folder).config)
                here = config.engine.model_dump(include={"device", "determinism", "cpu_threads"})
                return config.model_copy(
                    update={
                        "steps": taken.steps,
                        "model": taken.model,
                        "optimizer": taken.optimizer,
                        "guard": taken.guard,
                        "engine": taken.engine.model_copy(update=here),
                    }
                )
    return config


def _taker(root: Storage, step: int, attempt: int | None) -> AttemptRecord:
    """Return the attempt that took a step, on the chain that ends with `attempt` (None: the newest)."""
    numbers = attempts.numbers(root)
    if not numbers:
        raise CheckpointError(f"{root.url}: this run has no attempt yet")
    if attempt is not None and attempt not in numbers:
        raise CheckpointError(f"{root.url}: expected an attempt from 1 to {numbers[-1]}, got {attempt}")
    found = attempts.read(root, attempt or numbers[-1])
    while _resumed_at(found) >= step:
        assert found.resumed_from is not None
        found = attempts.read(root, found.resumed_from.attempt)
    return found


def _resumed_at(attempt: AttemptRecord) -> int:
    """Return the step from which an attempt resumed."""
    return attempt.resumed_from.step if attempt.resumed_from else 0


def _skipped(events: list[Line], step: int) -> RecordedStep | None:
    """Find a skipped step in the journal, which records all its digits."""
    for event in events:
        if event["event"] == Event.SKIPPED_STEP and event["skipped_step"] == step:
            return RecordedStep((*(float(event[name]) for name in COLUMNS[:-1]), 1.0), "events.jsonl")
    return None


def _logged(record: list[Line], step: int) -> RecordedStep | None:
    """Find a line of metrics.jsonl that covers this step alone; others have means over several steps."""
    for before, line in zip([{"step": 0}, *record], record, strict=False):
        if before["step"] == step - 1 and line["step"] == step and not line["skipped"]:
            return RecordedStep((*(line[name] for name in COLUMNS[:-1]), 0.0), "metrics.jsonl")
    return None


def _pending(root: Storage, committed: list[CheckpointId], step: int) -> RecordedStep | None:
    """Find the step in a checkpoint, which contains the rows since the last log point."""
    for checkpoint_id in committed:
        with suppress(CheckpointError):
            manifest = read_manifest(root, checkpoint_id)
            later_rows = manifest.step - step
            if 0 <= later_rows < len(manifest.pending_metrics):
                row = manifest.pending_metrics[-1 - later_rows]
                return RecordedStep(tuple(row[: len(COLUMNS)]), checkpoint_id.path())
    return None
