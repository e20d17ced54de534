"""What a run is doing, from what it has written: journals, record, ages of files. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_scale.checkpoint import attempts as chain
from dit_scale.config import TrainConfig, load, relocated
from dit_scale.elastic.board import Board
from dit_scale.errors import ConfigError, StorageError
from dit_scale.journal import Entry, Event, read_journal
from dit_scale.lines import read_objects
from dit_scale.report.goodput import MICRO, AttemptSpan, RoundSpan, attempts_of, ledger, rounds_of
from dit_scale.report.interruptions import Interruption, has_left, interruptions, is_done
from dit_scale.storage import Storage, open_storage

QUIET_S = 60.0
"""A run whose files are all older may be dead; one that logs more seldom is given three log intervals."""
STARTING = {
    Event.ROUND: "the launcher starts",
    Event.RANKS_STARTED: "launcher and imports",
    Event.FIRST_BEAT: "process group and engine",
    Event.ENGINE_READY: "looking for a checkpoint and reading it",
    Event.RESTORED: "the first step",
}
"""What the ranks do after these events of a supervisor."""


@dataclass(frozen=True)
class Status:
    """The answer of `dit-scale status`."""

    run: str
    state: str
    """finished, running, waiting, stopped, failed or silent."""
    text: str
    step: int
    """Steps taken, as far as known."""
    steps: int | None
    """Of the whole run; None before its first start has written the configuration."""
    steps_per_s: float | None
    eta_s: float | None
    """Time to the last step at this speed, without interruptions; None unless it trains."""
    attempt: int
    round: int
    """0 without supervisors."""
    nodes: list[str]
    """Of the newest round."""
    checkpoint: str
    """Newest committed one; empty when there is none."""
    checkpoint_age_s: float | None
    silence_s: float
    """Since the newest change of a file."""
    interruptions: list[Interruption]
    spent_s: dict[str, float]
    """The ledger: seconds by heading."""
    wall_s: float
    goodput: float


@dataclass(frozen=True)
class _Seen:
    """What the files of a run hold."""

    config: TrainConfig | None
    journal: list[Entry]
    supervisors: dict[str, list[Entry]]
    attempts: list[AttemptSpan]
    rounds: list[RoundSpan]
    last_row: dict[str, Any]
    """Of metrics.jsonl."""
    silence_s: float
    checkpoint: str
    joined: list[str]
    """Nodes that wait for the next round."""
    problem: str
    """Why the storage of the checkpoints cannot be read."""

    @property
    def steps_per_s(self) -> float | None:
        speed = self.last_row.get("images_per_s")
        return speed / self.config.global_batch if speed and self.config else None

    @property
    def is_quiet(self) -> bool:
        """Whether a living run would have written something by now."""
        every_steps = self.config.log.every_steps if self.config else 0
        return self.silence_s > max(QUIET_S, 3 * every_steps / (self.steps_per_s or float("inf")))

    @property
    def open_round(self) -> RoundSpan | None:
        return self.rounds[-1] if self.rounds and not self.rounds[-1].ended else None

    @property
    def current(self) -> AttemptSpan | None:
        """The attempt that is at work, if its processes live."""
        if not self.attempts or has_left(self.attempts[-1]):
            return None
        span, last = self.open_round, self.attempts[-1]
        in_round = span is not None and last.begin_us >= span.begin_us
        return last if in_round or not self.rounds else None


def status_of(run: str, now_s: float) -> Status:
    """What is known of the run in this folder at `now_s`, in seconds since 1970.

    Raises ConfigError for a folder that holds no run.
    """
    seen = _look(run, now_s)
    state, text = _state(seen)
    lives = state in ("running", "waiting")
    found = ledger(
        seen.journal, seen.supervisors, now_s if lives else None, alive=lives and seen.current is not None
    )
    steps = seen.config.steps if seen.config else None
    step = seen.attempts[-1].last_step if seen.attempts else 0
    trains = state == "running" and seen.current is not None and seen.steps_per_s and steps is not None
    committed_s = [
        event["time_s"] for event in seen.journal if event.get("name") == seen.checkpoint.rpartition("/")[2]
    ]
    return Status(
        run=run,
        state=state,
        text=text + (f" ({seen.problem})" if seen.problem else ""),
        step=step,
        steps=steps,
        steps_per_s=seen.steps_per_s,
        eta_s=(steps - step) / seen.steps_per_s if trains and steps and seen.steps_per_s else None,
        attempt=seen.attempts[-1].number if seen.attempts else 0,
        round=seen.rounds[-1].number if seen.rounds else 0,
        nodes=_nodes(seen.supervisors),
        checkpoint=seen.checkpoint,
        checkpoint_age_s=max(0.0, now_s - committed_s[-1]) if committed_s else None,
        silence_s=seen.silence_s,
        interruptions=interruptions(seen.journal, seen.supervisors),
        spent_s={heading.name.lower(): us / MICRO for heading, us in found.spent_us.items()},
        wall_s=(found.end_us - found.begin_us) / MICRO,
        goodput=found.goodput,
    )


def _look(run: str, now_s: float) -> _Seen:
    folder = Path(run)
    journals = sorted((folder / "supervisors").glob("*.jsonl"))
    files = [folder / name for name in ("config.yaml", "events.jsonl", "metrics.jsonl")] + journals
    files = [path for path in files if path.is_file()]
    if not files:
        raise ConfigError(
            f"{run}: expected a run's folder, with events.jsonl or supervisors/ in it; a run writes them "
            "when it first starts (run=FOLDER of its configuration)"
        )
    known = (folder / "config.yaml").is_file()
    config = relocated(load(TrainConfig, folder / "config.yaml"), run) if known else None
    root = open_storage((config.checkpoint.url if config else "") or run)
    leases = root.local_path("elastic/leases")
    files += leases.glob("*.json") if leases else ()
    journal = read_journal(folder / "events.jsonl")
    supervisors = {path.stem: read_journal(path) for path in journals}
    rounds = rounds_of(supervisors)
    if rounds and not rounds[-1].ended:  # a node that waits for its end is no sign of those in it
        others = supervisors.keys() - _nodes(supervisors)
        files = [path for path in files if path.stem not in others]
    checkpoint, joined, problem = _stored(root)
    return _Seen(
        config,
        journal,
        supervisors,
        attempts_of(journal),
        rounds,
        _last_row(folder / "metrics.jsonl"),
        max(0.0, now_s - max(path.stat().st_mtime for path in files)),
        checkpoint,
        joined,
        problem,
    )


def _nodes(supervisors: dict[str, list[Entry]]) -> list[str]:
    """The members of the newest round."""
    begun = [event for events in supervisors.values() for event in events if event["event"] == Event.ROUND]
    return max(begun, key=lambda event: int(event["round"]))["nodes"] if begun else []


def _stored(root: Storage) -> tuple[str, list[str], str]:
    """The newest checkpoint, the nodes that wait for a round, and why neither is known."""
    try:
        paths, board = chain.committed(root), Board(root)
        newest = next((path for path in paths if chain.is_readable(root, path)), "".join(paths[:1]))
        return newest, board.joined(board.newest() + 1).nodes, ""
    except StorageError as error:
        return "", [], f"its checkpoints are not to be seen: {error}"


def _last_row(path: Path) -> dict[str, Any]:
    """The last whole line of the record; empty when there is none."""
    rows = read_objects(path)
    return rows[-1] if rows else {}


def _state(seen: _Seen) -> tuple[str, str]:
    """In one word, and in some more."""
    ended = seen.rounds[-1].ended if seen.rounds else {}
    if is_done(seen.attempts):
        return "finished", f"{seen.attempts[-1].last_step} steps are taken and saved"
    if seen.joined and not seen.open_round and not seen.is_quiet:
        return "waiting", f"for nodes; there are {', '.join(seen.joined)}"
    gave_up = [e for events in seen.supervisors.values() for e in events if e["event"] == Event.GAVE_UP]
    if ended and any(event.get("round") == seen.rounds[-1].number for event in gave_up):
        return "failed", f"its supervisors gave up: {ended.get('text', '')}"
    if ended.get("reason") == "mistake":
        return "failed", f"a person must mend something: {ended.get('text', '')}"
    last = seen.attempts[-1].last_event["event"] if seen.attempts else ""
    if not seen.open_round and (last == Event.WAITED or ended.get("reason") == "leaving"):
        return "stopped", "on request; the same command goes on"
    if seen.is_quiet:
        return "silent", f"no sign for {seen.silence_s / 60:.0f} min: it is dead, or cannot write here"
    return "running", _phase(seen)


def _phase(seen: _Seen) -> str:
    if seen.current is None:
        number = seen.open_round.number if seen.open_round else 0
        of_round = [e for events in seen.supervisors.values() for e in events if e.get("round") == number]
        starting = [STARTING[e["event"]] for e in of_round if e["event"] in STARTING]
        return f"starting: {starting[-1]}" if starting else "between two attempts"
    match seen.current.last_event["event"]:
        case Event.START:
            return "the first step"
        case Event.SAVE:
            return "training, with a save in flight"
    return "training"
