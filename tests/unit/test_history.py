"""The history of a step: the attempt that took it, the checkpoints before it, and what was recorded of it."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_scale.checkpoint import attempts
from dit_scale.checkpoint.attempts import AttemptRecord
from dit_scale.checkpoint.manifest import ATTEMPTS, CheckpointId
from dit_scale.config import TrainConfig
from dit_scale.errors import CheckpointError, ConfigError
from dit_scale.report.history import StepHistory, as_taken, history_of
from dit_scale.storage import Storage, open_storage
from tests.support import checkpoints

STEPS = 40
EXCLUDED = ((96, 160),)


def config_of(run: Path, log_every_steps: int = 10) -> TrainConfig:
    tree = {"run": str(run), "steps": STEPS, "log": {"every_steps": log_every_steps}}
    return TrainConfig.model_validate(tree)


def write_lines(path: Path, *lines: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def event(name: str, attempt: int, step: int, **details: Any) -> dict[str, Any]:
    return {"event": name, "attempt": attempt, "step": step, **details}


def line(step: int, loss: float, skipped: int = 0) -> dict[str, Any]:
    return {"step": step, "loss": loss, "mse": 2.0, "vb": 3.0, "grad_norm": 4.0, "skipped": skipped}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    """Attempt 2 resumes from step 10, 3 from step 20; 3 fails, and 4 starts from step 12."""
    root = open_storage(tmp_path)
    for step, attempt in ((5, 1), (10, 1), (12, 2), (20, 2), (24, 3), (30, 4)):
        checkpoints.write(root, CheckpointId(step, attempt), [])
    attempts.claim(root, AttemptRecord(1))
    attempts.claim(root, AttemptRecord(2, CheckpointId(10, 1)))
    attempts.claim(root, AttemptRecord(3, CheckpointId(20, 2)))
    attempts.claim(root, AttemptRecord(4, CheckpointId(12, 2), EXCLUDED))
    return config_of(tmp_path)


@pytest.mark.parametrize(
    ("step", "attempt", "taker", "at_most_step"),
    [
        (1, None, 1, 0),
        (5, None, 1, 4),
        (10, None, 1, 9),
        (11, None, 2, 10),
        (13, None, 4, 12),
        (31, None, 4, 30),
        (13, 3, 2, 12),
        (20, 3, 2, 12),
        (21, 3, 3, 12),
        (25, 3, 3, 12),
        (13, 4, 4, 12),
        (13, 1, 1, 10),
    ],
)
def test_the_attempt_that_took_a_step(
    config: TrainConfig, step: int, attempt: int | None, taker: int, at_most_step: int
) -> None:
    past = history_of(config, step, attempt)
    assert past.attempt == attempts.read(open_storage(config.run), taker)
    assert past.at_most_step == at_most_step


Starts = list[tuple[int, list[int]]]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(1, 3), max_size=3)), min_size=1, max_size=4)
)
def test_every_way_to_resume(starts: Starts) -> None:
    """Each start resumes from one of the committed checkpoints and then commits some of its own."""
    with tempfile.TemporaryDirectory() as folder:
        root = open_storage(folder)
        by_attempt, by_checkpoint = begin_all(root, starts)
        for attempt, taken_by in by_attempt.items():
            for step in range(1, len(taken_by) + 1):
                past = history_of(config_of(Path(folder), log_every_steps=STEPS), step, attempt)
                assert past.attempt.number == taken_by[step - 1]
                assert past.at_most_step < step
                for checkpoint_id in attempts.committed(root):
                    if checkpoint_id.step <= past.at_most_step:
                        assert by_checkpoint[checkpoint_id] == taken_by[: checkpoint_id.step]


def begin_all(root: Storage, starts: Starts) -> tuple[dict[int, list[int]], dict[CheckpointId, list[int]]]:
    """Return which attempt took each step, by attempt and by checkpoint."""
    by_attempt: dict[int, list[int]] = {}
    by_checkpoint: dict[CheckpointId, list[int]] = {}
    for number, (choice, commits) in enumerate(starts, 1):
        options = [*attempts.committed(root), None]
        chosen = options[choice % len(options)]
        attempts.claim(root, AttemptRecord(number, chosen))
        taken_by = list(by_checkpoint[chosen]) if chosen else []
        for steps in commits:
            taken_by += [number] * steps
            checkpoint_id = CheckpointId(len(taken_by), number)
            checkpoints.write(root, checkpoint_id, [])
            by_checkpoint[checkpoint_id] = list(taken_by)
        by_attempt[number] = taken_by
    return by_attempt, by_checkpoint


# What was recorded


def recorded(config: TrainConfig, step: int, attempt: int | None = None) -> tuple[float, ...] | None:
    found = history_of(config, step, attempt).recorded
    return found and found.row


def test_lines_for_a_single_step(config: TrainConfig) -> None:
    lines = (line(1, 0.1), line(2, 0.2), line(4, 0.4), line(5, 0.5), line(6, 0.6, skipped=1), line(22, 2.2))
    write_lines(Path(config.run) / "metrics.jsonl", *lines)
    assert recorded(config, 1) == (0.1, 2.0, 3.0, 4.0, 0.0)
    assert recorded(config, 2) == (0.2, 2.0, 3.0, 4.0, 0.0)
    assert recorded(config, 5) == (0.5, 2.0, 3.0, 4.0, 0.0)
    assert [recorded(config, step) for step in (3, 4, 6, 22)] == [None] * 4


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl"])
def test_a_damaged_line_counts_as_none(config: TrainConfig, name: str) -> None:
    """Lines have no checksum: a flipped bit can change a key or break the syntax."""
    write_lines(Path(config.run) / "metrics.jsonl", line(1, 0.1))
    with (Path(config.run) / name).open("a") as file:
        for text in (
            json.dumps(line(30, 3.0) | event("start", 4, 30, world=2)).replace("step", "stdp"),
            "[1]",
            "{",
        ):
            file.write(text + "\n")
    assert recorded(config, 1) == (0.1, 2.0, 3.0, 4.0, 0.0)


def test_rows_in_a_later_checkpoint(config: TrainConfig) -> None:
    rows = tuple((float(step), 2.0, 3.0, 4.0, 0.0) for step in (31, 32, 33))
    checkpoints.write(open_storage(config.run), CheckpointId(33, 4), [], pending_metrics=rows)
    assert [recorded(config, step) for step in (30, 31, 32, 33, 34)] == [None, *rows, None]
    found = history_of(config, 32, None).recorded
    assert found is not None
    assert found.where == CheckpointId(33, 4).path()


def test_skipped_steps_are_in_the_journal_by_attempt(config: TrainConfig) -> None:
    row = {"loss": "nan", "mse": "0.1", "vb": "inf", "grad_norm": "1e-05"}
    skipped = event("skipped_step", 3, 22, skipped_step=21, **row)
    write_lines(Path(config.run) / "events.jsonl", skipped)
    write_lines(Path(config.run) / "metrics.jsonl", line(20, 2.0), line(21, 2.1))
    assert str(recorded(config, 21, 3)) == "(nan, 0.1, inf, 1e-05, 1.0)"
    assert recorded(config, 21) == (2.1, 2.0, 3.0, 4.0, 0.0)
    assert recorded(config, 22, 3) is None, "the record belongs to the run as it is now"


def test_what_else_the_journal_records(config: TrainConfig) -> None:
    journal = Path(config.run) / "events.jsonl"
    write_lines(
        journal,
        event("start", 3, 20, world=2),
        event("quarantined", 3, 22, sample_id=7, reason="damaged"),
        event("quarantined", 3, 24, sample_id=8, reason="damaged"),
        event("rollback", 3, 25, failed_steps=[22, 25]),
        event("start", 4, 12, world=3),
        event("quarantined", 4, 14, sample_id=9, reason="damaged"),
    )
    with journal.open("a") as file:
        file.write('{"event": "quaran')
    assert summary(history_of(config, 21, 3)) == ((7,), 2, ())
    assert summary(history_of(config, 22, 3)) == ((7,), 2, ())
    assert summary(history_of(config, 23, 3)) == ((7, 8), 2, ())
    assert summary(history_of(config, 21, None)) == ((9,), 3, ())
    assert summary(history_of(config, 22, None)) == ((9,), 3, (3,))
    assert summary(history_of(config, 5, None)) == ((), None, ())


def summary(past: StepHistory) -> tuple[tuple[int, ...], int | None, tuple[int, ...]]:
    return past.quarantined, past.world, past.rolled_back


# The settings of an attempt


def test_a_replay_uses_the_settings_of_the_attempt(config: TrainConfig) -> None:
    """Rates, guard and precision come from its checkpoints; paths, device and logging are current."""
    root = open_storage(config.run)
    then = {
        "steps": 70,
        "optimizer": {"lr": 0.5},
        "guard": {"spike_factor": 7.0},
        "engine": {"micro_batch": 3, "device": "cuda", "precision": "bf16"},
        "data": {"url": "elsewhere"},
        "run": "elsewhere",
    }
    saved = TrainConfig.model_validate(then).model_dump(mode="json")
    attempts.claim(root, AttemptRecord(5, CheckpointId(30, 4)))
    checkpoints.write(root, CheckpointId(33, 5), [], config=saved)
    attempts.claim(root, AttemptRecord(6, CheckpointId(33, 5)))
    taken = as_taken(config, attempts.read(root, 5))
    assert (taken.steps, taken.optimizer.lr, taken.guard.spike_factor) == (70, 0.5, 7.0)
    assert (taken.engine.micro_batch, taken.engine.precision) == (3, "bf16")
    assert (taken.run, taken.data, taken.engine.device) == (config.run, config.data, config.engine.device)
    assert as_taken(config, attempts.read(root, 6)) == config, "it has no checkpoint"


# Mistakes


def test_steps_that_were_not_taken(config: TrainConfig) -> None:
    assert history_of(config, 40, None).attempt.number == 4
    for beyond, log_every_steps in ((41, 10), (36, 5)):
        with pytest.raises(
            ConfigError, match=f"step {beyond} has not been taken yet; .* reached about step 30"
        ):
            history_of(config_of(Path(config.run), log_every_steps), beyond, None)
    lowered = config.model_copy(update={"steps": 12})
    assert history_of(lowered, 30, None).attempt.number == 4
    with pytest.raises(ConfigError, match="step 31 has not been taken yet"):
        history_of(lowered, 31, None)


def test_attempts_that_do_not_exist(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected an attempt from 1 to 4, got 5"):
        history_of(config, 5, 5)
    with pytest.raises(CheckpointError, match="this run has no attempt yet"):
        history_of(config_of(tmp_path / "new"), 1, None)


def test_a_damaged_record_is_named(config: TrainConfig) -> None:
    open_storage(config.run).write(f"{ATTEMPTS}/0002.json", b"{}")
    with pytest.raises(CheckpointError, match=r"attempts/0002\.json is damaged"):
        history_of(config, 11, None)
