"""How a run came to a step: which attempt took it, from where it can be reached, what was written of it."""

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
"""Of the journal or the record."""


@dataclass(frozen=True)
class Recorded:
    """What the run wrote down of one step alone."""

    row: StepRow
    where: str


@dataclass(frozen=True)
class Past:
    """How a run came to a step."""

    attempt: AttemptRecord
    """The one that took the step."""
    at_most_step: int
    """Checkpoints up to here, those that count today, are on the way to the step."""
    recorded: Recorded | None
    quarantined: tuple[int, ...]
    """Samples that the attempt found damaged, up to the step."""
    world: int | None
    """Processes of the attempt; None when the journal does not say."""
    rolled_back: tuple[int, ...]
    """Other attempts that failed at this step and were rolled back."""


def past_of(config: TrainConfig, step: int, attempt: int | None) -> Past:
    """The past of a step (counted from 1), of the run as it is now, or as it was in `attempt`.

    Raises ConfigError for a step that the run has not come to, CheckpointError for an attempt that it has
    not seen or whose record is damaged.
    """
    root, folder = root_of(config), Path(config.run)
    journal = read_objects(folder / "events.jsonl", "event", "attempt", "step")
    record = read_objects(folder / "metrics.jsonl", "step", *COLUMNS)
    committed = attempts.committed(root)
    reached = max(
        [line["step"] for line in (*journal, *record)] + [checkpoint.step for checkpoint in committed],
        default=0,
    )
    # behind what is written down some more steps may be taken, but steps may also have been lowered since
    if step > max(reached, min(reached + config.log.every_steps, config.steps)):
        raise ConfigError(f"{config.run}: step {step} was not taken yet, the run has come to about {reached}")
    taker = _taker(root, step, attempt)
    later = [number for number in attempts.numbers(root) if number > taker.number]
    begun_at = min((_begun_at(attempts.read(root, number)) for number in later), default=step)
    of_taker = [event for event in journal if event["attempt"] == taker.number]
    damage = [event for event in of_taker if event["event"] == Event.QUARANTINED]
    return Past(
        attempt=taker,
        at_most_step=min(step - 1, begun_at),
        recorded=_skipped(of_taker, step)
        or (None if begun_at < step else _line(record, step) or _pending(root, committed, step)),
        # a sample is noted one step after the one that it was first needed for, at the latest
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
    """The configuration with what an attempt computed by, as its checkpoints say, if one is left.

    Where things are, and the device, stay as they are now.
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
    """The attempt that took a step, on the chain that ends with `attempt` (None: the newest)."""
    numbers = attempts.numbers(root)
    if not numbers:
        raise CheckpointError(f"{root.url}: no attempt of this run has begun")
    if attempt is not None and attempt not in numbers:
        raise CheckpointError(f"{root.url}: expected an attempt from 1 to {numbers[-1]}, got {attempt}")
    found = attempts.read(root, attempt or numbers[-1])
    while _begun_at(found) >= step:
        assert found.resumed_from is not None
        found = attempts.read(root, found.resumed_from.attempt)
    return found


def _begun_at(attempt: AttemptRecord) -> int:
    """Steps that it found taken."""
    return attempt.resumed_from.step if attempt.resumed_from else 0


def _skipped(events: list[Line], step: int) -> Recorded | None:
    """A skipped step is in the journal with all its digits."""
    for event in events:
        if event["event"] == Event.SKIPPED_STEP and event["skipped_step"] == step:
            return Recorded((*(float(event[name]) for name in COLUMNS[:-1]), 1.0), "events.jsonl")
    return None


def _line(record: list[Line], step: int) -> Recorded | None:
    """A line of metrics.jsonl has the means since the line before it, of the steps that were not skipped."""
    for before, line in zip([{"step": 0}, *record], record, strict=False):
        if before["step"] == step - 1 and line["step"] == step and not line["skipped"]:
            return Recorded((*(line[name] for name in COLUMNS[:-1]), 0.0), "metrics.jsonl")
    return None


def _pending(root: Storage, committed: list[CheckpointId], step: int) -> Recorded | None:
    """A checkpoint has the rows of the steps since the last log point."""
    for checkpoint_id in committed:
        with suppress(CheckpointError):
            manifest = read_manifest(root, checkpoint_id)
            later_rows = manifest.step - step
            if 0 <= later_rows < len(manifest.pending_metrics):
                return Recorded(tuple(manifest.pending_metrics[-1 - later_rows]), checkpoint_id.path())
    return None
