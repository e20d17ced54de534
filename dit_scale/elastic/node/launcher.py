"""Starts the ranks of this node: DeepSpeed's per-node launcher with one process per slot.

It is the program that `deepspeed` itself starts on each node. Starting it directly saves one more import of
torch before the ranks can start.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dit_scale.elastic.board import Round
from dit_scale.elastic.node.deadlines import Deadlines
from dit_scale.elastic.node.diagnosis import Diagnosis
from dit_scale.elastic.node.group import MARK_VARIABLE, LaunchedGroup, StartMilestones
from dit_scale.elastic.node.processes import ProcessTable
from dit_scale.elastic.node.rank import SUPERVISOR_VARIABLE
from dit_scale.elastic.node.rank_files import RankFiles
from dit_scale.elastic.node.stacks import StackArchive
from dit_scale.heartbeat import FOLDER_VARIABLE
from dit_scale.lines import Say
from dit_scale.signals import ALWAYS, UNLESS_IGNORED


class Launcher:
    """Starts the ranks of this node, round by round."""

    def __init__(
        self,
        *,
        command: Sequence[str],
        folder: Path,
        deadlines: Deadlines,
        stacks: Path,
        record: Callable[..., None],
        say: Say,
    ) -> None:
        """`command` is what each rank runs, as arguments of the launcher: --module NAME ARGUMENTS.

        Heartbeats and verdicts are written to `folder`, on this node. Stacks of ranks that make no progress
        are kept in `stacks`.
        """
        self._command, self._folder, self._deadlines = command, folder, deadlines
        self._stacks, self._record, self._say = stacks, record, say

    def start(self, round_: Round, index: int) -> LaunchedGroup:
        """Start the ranks of member `index` of a round."""
        first = sum(member.slots for member in round_.members[:index])
        ranks = range(first, first + round_.members[index].slots)
        folder = self._folder / f"round-{round_.number:06d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark = uuid.uuid4().hex
        files, processes = RankFiles(folder, ranks), ProcessTable()
        return LaunchedGroup(
            launcher=self._run(round_, index, folder, mark),
            mark=mark,
            files=files,
            processes=processes,
            diagnosis=Diagnosis(
                round_number=round_.number,
                files=files,
                processes=processes,
                deadlines=self._deadlines,
                archive=StackArchive(self._stacks, round_.number, self._say),
                record=self._record,
                say=self._say,
            ),
            milestones=StartMilestones(round_.number, len(ranks), self._record),
        )

    def _run(self, round_: Round, index: int, folder: Path, mark: str) -> "subprocess.Popen[bytes]":
        head = round_.members[0]
        devices = {member.node: list(range(member.slots)) for member in round_.members}
        world = base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()
        launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
        launcher += [f"--node_rank={index}", f"--master_addr={head.address}", f"--master_port={head.port}"]
        # Its error says only that a rank failed; the rank and the supervisor say why.
        launcher += ["--log_level=critical", "--no_local_rank"]
        return subprocess.Popen(
            [*launcher, *self._command],
            env=os.environ | _variables(folder, mark),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_shield,
        )


def _variables(folder: Path, mark: str) -> Mapping[str, str]:
    return {
        MARK_VARIABLE: mark,
        FOLDER_VARIABLE: str(folder),
        SUPERVISOR_VARIABLE: str(os.getpid()),
        # For the launcher, which computes nothing but would look for devices twice, and warn where there are
        # none. Ranks choose their device themselves.
        "DS_ACCELERATOR": "cpu",
    }


def _shield() -> None:
    """Shield the launcher, before it starts, from signals that a scheduler sends to all processes.

    They would kill it, or make it kill its ranks. A blocked signal stays blocked across exec and in children;
    ranks unblock it. An ignored signal stays ignored in ranks as well: the supervisor receives it and asks
    them to stop.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, ALWAYS)
    for number in UNLESS_IGNORED:
        signal.signal(number, signal.SIG_IGN)
