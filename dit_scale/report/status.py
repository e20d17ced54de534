"""What a run is doing, from its journals, its record and the ages of its files. No torch."""

import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_scale.checkpoint import attempts as chain
from dit_scale.config import TrainConfig, load, relocated
from dit_scale.elastic.board import Board
from dit_scale.errors import ConfigError, StorageError
from dit_scale.journal import Entry, Event, read_journal, read_outline
from dit_scale.lines import parse_object, parse_objects, read_lines
from dit_scale.report.goodput import ledger
from dit_scale.report.interruptions import Interruption, interruptions
from dit_scale.report.spans import AttemptSpan, RoundSpan, attempts_of, is_done, rounds_of
from dit_scale.storage import Storage, open_storage
from dit_scale.train.evaluation_keys import deciding_key

QUIET_S = 60.0
"""After this long without a write, or after three log intervals if those are longer, a run may be dead."""
STARTING = {
    Event.ROUND: "starting the launcher",
    Event.RANKS_STARTED: "launcher and imports",
    Event.FIRST_BEAT: "process group and engine",
    Event.ENGINE_READY: "finding and reading a checkpoint",
    Event.RESTORED: "first step",
}
"""What the ranks do after these events of a supervisor."""

TORN_LINES = 10
"""Unreadable lines at the end of a record, each left by a kill, before its last log point is not found."""

Row = dict[str, Any]
"""A line of metrics.jsonl."""


@dataclass(frozen=True)
class Status:
    """What `dit-scale status` reports."""

    run: str
    model: str
    """Name of the model; empty until the first start has written the configuration."""
    state: str
    """finished, running, waiting, stopped, failed or silent."""
    text: str
    """Details of the state."""
    step: int
    """Steps taken, as far as known."""
    steps: int | None
    """Steps of the run by its configuration; None until its first start has written that."""
    steps_per_s: float | None
    eta_s: float | None
    """Time to the last step at this speed, without interruptions; None unless it is training."""
    attempt: int
    round: int
    """Number of the newest round; 0 without supervisors."""
    nodes: list[str]
    """Members of the newest round."""
    checkpoint: str
    """The newest committed checkpoint; empty if there is none."""
    checkpoint_age_s: float | None
    silence_s: float
    """Seconds since a file last changed."""
    log_point: dict[str, Any]
    """The last log point, as in metrics.jsonl; empty if there is none."""
    evaluation: dict[str, Any]
    """The last evaluation, as in metrics.jsonl; empty if there is none."""
    best: dict[str, Any]
    """The step of the best evaluation and the value that decides it; empty if there is none."""
    interruptions: list[Interruption]
    spent_s: dict[str, float]
    """Seconds of wall-clock time by heading of the ledger."""
    wall_s: float
    goodput: float


@dataclass(frozen=True)
class RunContents:
    """Contents of the files of a run."""

    config: TrainConfig | None
    journal: list[Entry]
    supervisors: dict[str, list[Entry]]
    attempts: list[AttemptSpan]
    rounds: list[RoundSpan]
    log_point: Row
    evaluations: list[Row]
    silence_s: float
    checkpoint: str
    joined: list[str]
    """Nodes that wait for the next round."""
    problem: str
    """Why the storage of the checkpoints is unavailable; empty if it is available."""

    @property
    def steps_per_s(self) -> float | None:
        speed = self.log_point.get("images_per_s")
        return speed / self.config.global_batch if speed and is_number(speed) and self.config else None

    @property
    def is_quiet(self) -> bool:
        """Whether a run that is alive would have written something by now."""
        every_steps = self.config.log.every_steps if self.config else 0
        return self.silence_s > max(QUIET_S, 3 * every_steps / (self.steps_per_s or float("inf")))

    @property
    def open_round(self) -> RoundSpan | None:
        return self.rounds[-1] if self.rounds and not self.rounds[-1].ending else None

    @property
    def current(self) -> AttemptSpan | None:
        """The attempt that is training, provided its processes are alive."""
        if not self.attempts or self.attempts[-1].has_exited:
            return None
        span, last = self.open_round, self.attempts[-1]
        in_round = span is not None and last.start_us >= span.start_us
        return last if in_round or not self.rounds else None


def status_of(run: str, now_s: float, remote: bool = True) -> Status:
    """Report on the run in this folder at `now_s`, in seconds since 1970.

    Without `remote`, checkpoints that are not on a disk stay unknown: nothing asks a server.

    Raises ConfigError if the folder contains no run.
    """
    return status_from(read_contents(run, now_s, remote), run, now_s)


def status_from(contents: RunContents, run: str, now_s: float) -> Status:
    """Report on the run in folder `run`, given the contents of its files at `now_s`."""
    state, text = _state(contents)
    is_alive = state in ("running", "waiting")
    is_training = state == "running" and contents.current is not None
    spent = ledger(
        contents.journal,
        contents.supervisors,
        now_s if is_alive else None,
        is_alive and contents.current is not None,
    )
    steps = contents.config.steps if contents.config else None
    step = contents.attempts[-1].last_step if contents.attempts else 0
    eta_s = None
    if is_training and steps is not None and contents.steps_per_s:
        eta_s = max(0, steps - step) / contents.steps_per_s
    checkpoint_name = contents.checkpoint.rpartition("/")[2]
    committed_s = [entry["time_s"] for entry in contents.journal if entry.get("name") == checkpoint_name]
    return Status(
        run=run,
        model=contents.config.model.name if contents.config else "",
        state=state,
        text=text + (f" ({contents.problem})" if contents.problem else ""),
        step=step,
        steps=steps,
        steps_per_s=contents.steps_per_s,
        eta_s=eta_s,
        attempt=contents.attempts[-1].number if contents.attempts else 0,
        round=contents.rounds[-1].number if contents.rounds else 0,
        nodes=_members(contents.supervisors),
        checkpoint=contents.checkpoint,
        checkpoint_age_s=max(0.0, now_s - committed_s[-1]) if committed_s else None,
        silence_s=contents.silence_s,
        log_point=contents.log_point,
        evaluation=contents.evaluations[-1] if contents.evaluations else {},
        best=_best(contents),
        interruptions=interruptions(contents.journal, contents.supervisors),
        spent_s=spent.by_name(),
        wall_s=spent.wall_s,
        goodput=spent.goodput,
    )


def read_contents(run: str, now_s: float, remote: bool = True) -> RunContents:
    """Read the files of a run at `now_s`, as `status_of` does."""
    folder = Path(run)
    journals = sorted((folder / "supervisors").glob("*.jsonl"))
    files = [folder / name for name in ("config.yaml", "events.jsonl", "metrics.jsonl")] + journals
    files = [path for path in files if path.is_file()]
    if not files:
        raise ConfigError(
            f"{run}: expected a run folder with events.jsonl or supervisors/ in it; a run writes them "
            "when it first starts (into run=FOLDER of its configuration)"
        )
    has_config = (folder / "config.yaml").is_file()
    config = relocated(load(TrainConfig, folder / "config.yaml"), run) if has_config else None
    root = open_storage((config.checkpoint.url if config else "") or run)
    leases = root.local_path("elastic/leases")
    files += leases.glob("*.json") if leases else ()
    journal = read_outline(folder / "events.jsonl")
    supervisors = {path.stem: read_journal(path) for path in journals}
    rounds = rounds_of(supervisors)
    if rounds and not rounds[-1].ending:
        # Nodes that wait for the round to end are no evidence that its members are alive.
        others = supervisors.keys() - _members(supervisors)
        files = [path for path in files if path.stem not in others]
    checkpoint, joined, problem = _stored(root) if remote or leases else ("", [], "")
    log_point, evaluations = _newest_rows(folder / "metrics.jsonl")
    return RunContents(
        config=config,
        journal=journal,
        supervisors=supervisors,
        attempts=attempts_of(journal),
        rounds=rounds,
        log_point=log_point,
        evaluations=evaluations,
        silence_s=max(0.0, now_s - max(path.stat().st_mtime for path in files)),
        checkpoint=checkpoint,
        joined=joined,
        problem=problem,
    )


def _newest_rows(record: Path) -> tuple[Row, list[Row]]:
    """Return the last log point and all evaluations; other lines, which are most, are not parsed."""
    newest: deque[str] = deque(maxlen=TORN_LINES + 1)
    evaluations = []
    for line in read_lines(record):
        if '"eval_' in line:
            evaluations += parse_objects([line], "step")
        else:
            newest.append(line)
    parsed = (parse_object(line, "step", "images_per_s") for line in reversed(newest))
    return next((row for row in parsed if row is not None), {}), evaluations


def is_number(value: Any) -> bool:
    """Whether a value of a record is a finite number: JSON can hold anything, also NaN."""
    return isinstance(value, int | float) and -sys.float_info.max <= value <= sys.float_info.max


def _members(supervisors: dict[str, list[Entry]]) -> list[str]:
    """Return the members of the newest round."""
    starts = [entry for entries in supervisors.values() for entry in entries if entry["event"] == Event.ROUND]
    return max(starts, key=lambda entry: int(entry["round"]))["nodes"] if starts else []


def _stored(root: Storage) -> tuple[str, list[str], str]:
    """Return the newest checkpoint, the nodes that wait for a round, and why neither is known."""
    try:
        ids, board = chain.committed(root), Board(root)
        readable = (checkpoint_id for checkpoint_id in ids if chain.is_readable(root, checkpoint_id))
        newest = next(readable, ids[0] if ids else None)
        return newest.path() if newest else "", board.joined(board.newest() + 1).nodes, ""
    except StorageError as error:
        return "", [], f"the storage of its checkpoints is unavailable: {error}"


def _best(contents: RunContents) -> dict[str, Any]:
    """Return step and deciding value of the best evaluation; empty if there is none."""
    key = deciding_key(contents.config) if contents.config else ""
    rows = [row for row in contents.evaluations if is_number(row.get(key))]
    best = min(rows, key=lambda row: row[key], default=None)
    return {"step": best["step"], key: best[key]} if best else {}


def _state(contents: RunContents) -> tuple[str, str]:
    """Return the state in one word, and its details."""
    ending = contents.rounds[-1].ending if contents.rounds else {}
    if is_done(contents.attempts):
        return "finished", f"all {contents.attempts[-1].last_step} steps are taken and saved"
    if contents.joined and not contents.open_round and not contents.is_quiet:
        return "waiting", f"for more nodes; joined so far: {', '.join(contents.joined)}"
    gave_up = [e for entries in contents.supervisors.values() for e in entries if e["event"] == Event.GAVE_UP]
    if ending and any(entry.get("round") == contents.rounds[-1].number for entry in gave_up):
        return "failed", f"its supervisors gave up: {ending.get('text', '')}"
    if ending.get("reason") == "mistake":
        return "failed", f"manual intervention needed: {ending.get('text', '')}"
    last = contents.attempts[-1].last_entry["event"] if contents.attempts else ""
    if not contents.open_round and (last == Event.WAITED or ending.get("reason") == "leaving"):
        return "stopped", "on request; the same command resumes it"
    if contents.is_quiet:
        minutes = contents.silence_s / 60
        return "silent", f"nothing written for {minutes:.0f} min: it is dead, or cannot write to this folder"
    return "running", _activity(contents)


def _activity(contents: RunContents) -> str:
    """Return what the ranks of a running run are doing."""
    if contents.current is None:
        number = contents.open_round.number if contents.open_round else 0
        of_round = [
            e for entries in contents.supervisors.values() for e in entries if e.get("round") == number
        ]
        starting = [STARTING[e["event"]] for e in of_round if e["event"] in STARTING]
        return f"starting: {starting[-1]}" if starting else "between two attempts"
    match contents.current.last_entry["event"]:
        case Event.START:
            return "first step"
        case Event.SAVE:
            return "training, with a save in progress"
    return "training"
