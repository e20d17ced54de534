"""Runs the supervisor of this node with real storage, processes, clock and signals."""

import hashlib
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

from dit_scale import signals
from dit_scale.config import TrainConfig, dump
from dit_scale.elastic.board import Board, Member, Reason
from dit_scale.elastic.local_node import Dependencies
from dit_scale.elastic.node.address import check_address, free_port
from dit_scale.elastic.node.deadlines import LEAVE_S, Deadlines
from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.node.gpus import check_device
from dit_scale.elastic.node.launcher import Launcher
from dit_scale.elastic.node.preflight import Preflight, say_unless_shared
from dit_scale.elastic.policy import Policy
from dit_scale.elastic.run_progress import committed_step, samples_of
from dit_scale.elastic.supervisor import Supervisor, Wait
from dit_scale.errors import StorageError
from dit_scale.journal import Event, Journal
from dit_scale.paths import without_paths
from dit_scale.storage import open_storage
from dit_scale.telemetry.webhook import Notice, Webhook

MODULE = "dit_scale.cli"


class StopSignals:
    """Whether a signal has asked for this node: from the scheduler, by Ctrl-C or from a closed terminal."""

    def __init__(self) -> None:
        self.received = False
        for number in signals.caught():
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True


class NodeLog:
    """What a supervisor prints, and its journal; an observer in another thread may write as well."""

    def __init__(self, node: str, path: Path) -> None:
        self.node = node
        self._journal = Journal(path, lambda text: self.say(f"ALARM: {text}"))
        self._writing = threading.RLock()

    def say(self, message: str) -> None:
        """Print a line."""
        print(f"[{self.node}] {message}", flush=True)

    def record(self, event: Event, **details: object) -> None:
        """Write an event to the journal."""
        with self._writing:
            self._journal.write(event, node=self.node, **details)

    def alarm(self, text: str) -> None:
        """Print and record a failure that does not stop the run."""
        self.say(f"ALARM: {text}")
        self.record(Event.ALARM, text=text)

    def close(self) -> None:
        """Write what is still in memory; an alarm if that fails."""
        if problem := self._journal.close():
            self.say(f"ALARM: {problem}")


Observer = Callable[[Path, NodeLog], AbstractContextManager[object]]
"""Watches a node while it is supervised, given the folder of the ranks' heartbeats and the log."""


def launch(
    config: TrainConfig,
    arguments: Sequence[str],
    policy: Policy,
    *,
    node: str,
    address: str,
    slots: int,
    start: int,
    observers: Sequence[Observer] = (),
) -> Exit:
    """Supervise this node's ranks of a run; `arguments` are those of `dit-scale train`."""
    check_address(address)
    check_device(config.engine.device)
    root = open_storage(config.checkpoint.url or config.run)
    folder = _folder_of_supervisors(config)
    stop_signals = StopSignals()
    log = NodeLog(node, folder / f"{node}.jsonl")
    webhook = Webhook(config.run, root, node, log.alarm)
    say_unless_shared(root, policy.max_nodes, log.say)
    member = Member(
        node=node,
        boot=secrets.token_hex(8),
        address=address,
        port=free_port(),
        slots=slots,
        config_sha256=digest(config),
        start=start,
    )

    def record(event: Event, **details: Any) -> None:
        log.record(event, **details)
        notify(webhook, event, details)

    with ExitStack() as stack:
        stack.callback(log.close)
        heartbeats = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dit-scale-")))
        for observer in observers:
            stack.enter_context(observer(heartbeats, log))
        launcher = Launcher(
            command=["--module", MODULE, "train", *arguments],
            folder=heartbeats,
            deadlines=Deadlines(data_s=config.data.deadline_s + LEAVE_S),
            stacks=folder / "stacks",
            record=log.record,
            say=log.say,
        )
        dependencies = Dependencies(
            clock=time.monotonic,
            committed_step=lambda: committed_step(root),
            is_wanted_back=lambda: stop_signals.received,
            start_group=launcher.start,
            say=log.say,
            record=record,
            free_port=free_port,
            samples_of=lambda step: samples_of(config, root, step),
            problems=Preflight(config, slots, log.say),
        )
        return _supervise(Supervisor(member, Board(root), policy, dependencies), log)


def _supervise(supervisor: Supervisor, log: NodeLog) -> Exit:
    try:
        return drive(supervisor.run())
    except StorageError as error:
        log.record(Event.BOARD_GONE, problem=str(error))
        raise StorageError(
            f"the supervisors cannot reach their shared storage, so the ranks of {log.node} were killed: "
            f"{error}; fix the cause, then run the same command again"
        ) from error


def notify(webhook: Webhook, event: Event, details: Mapping[str, Any]) -> None:
    """Send a message if this event of the supervisor means that no restart follows."""
    step = max(0, details.get("after_step") or details.get("committed_step") or 0)
    if event == Event.ROUND_ENDED and details["reason"] == Reason.MISTAKE:
        step = details["details"].get("step") or 0
    elif event != Event.GAVE_UP:
        return
    webhook.send(
        Notice.GAVE_UP, step, details["text"], once=f"{details['round']:06d}", node=details["failed_node"]
    )


def _folder_of_supervisors(config: TrainConfig) -> Path:
    folder = Path(config.run) / "supervisors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            f"cannot create run={config.run}: {error.strerror}; it must be the same folder on all nodes"
        ) from None
    return folder


def drive(supervision: Wait) -> Exit:
    """Run a supervisor in real time. Its ranks are killed however it ends."""
    try:
        while True:
            until_s = next(supervision)
            time.sleep(max(0.0, until_s - time.monotonic()))
    except StopIteration as end:
        code: Exit = end.value
        return code
    finally:
        supervision.close()


def digest(config: TrainConfig) -> str:
    """SHA-256 of the resolved configuration without its paths, which may differ between nodes.

    Nodes that meet have the same root, and their ranks compare the data sets that they see.
    """
    return hashlib.sha256(dump(without_paths(config)).encode()).hexdigest()
