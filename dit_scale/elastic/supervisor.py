"""The supervisor of one node: a state machine over the board, the ranks of the node and a clock.

    join -> sealed -> take part -> ended -> join ...        (docs/elasticity.md has the complete diagram)

It only decides and waits. Everything real, including the clock, is behind its arguments, so that the same
code runs a cluster and a simulation of one. `run` is a generator: it yields the time until which nothing
needs to be done unless something changes.
"""

from collections.abc import Generator

from dit_scale.elastic.board import Board, Ending, Member, Reason, Round
from dit_scale.elastic.gathering import Gathering
from dit_scale.elastic.giving_up import failed_step, fruitless_after, why
from dit_scale.elastic.lease import DesertionWatch
from dit_scale.elastic.local_node import Dependencies, LocalNode
from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.participation import Participation
from dit_scale.elastic.policy import Policy
from dit_scale.journal import Event

Wait = Generator[float, None, Exit]
JOB_RESTARTED = "the job was restarted"


class Supervisor:
    """Runs rounds until the run is done, this node is wanted back, or another try makes no sense."""

    def __init__(self, member: Member, board: Board, policy: Policy, dependencies: Dependencies) -> None:
        self._node = LocalNode(member, board, policy, dependencies)
        self._board, self._policy, self._dependencies = board, policy, dependencies

    def run(self) -> Wait:
        """Supervise from start to exit; returns the exit code."""
        if problems := self._dependencies.problems():
            return self._stay_out(problems)
        number = self._board.newest()
        before = self._board.sealed(number) if number else None
        ending = self._board.ending(number) if number else None
        if ending is not None and ending.reason == Reason.DONE and self._is_same_run(before):
            self._dependencies.say(f"the run is done: {ending.text}")
            return Exit.DONE
        newest = max(before.start if before else 0, self._board.joined(number + 1).start)
        if not self._node.start:  # not given: continue what is there
            self._node.adopt_start(newest)
        if newest > self._node.start:
            return self._node.make_way()
        if before is not None and ending is None and (text := self._superseded_by(before)):
            self._node.join(number + 1)  # first, so that the others wait for this node, or make way for it
            self._node.end_round(number, Reason.LOST, text)
        # An ending from before this start has been reported: it does not end this supervisor as well.
        is_ending_new, has_taken_part = ending is None, False
        while True:
            if is_ending_new:
                ended = yield from self._wait_for_end(number)
                if isinstance(ended, Exit):
                    return ended
                if ended is not None and (code := self._conclude(ended)) is not None:
                    return code
                ending = ended
            is_ending_new = True
            if self._dependencies.is_wanted_back():
                return self._node.give_back(number + 1)
            if has_taken_part and (problems := self._dependencies.problems()):
                self._node.withdraw(number + 1)
                return self._stay_out(problems)
            sealed = yield from Gathering(self._node, number + 1, before, ending).run()
            if isinstance(sealed, Exit):
                return sealed
            number, before = sealed.number, sealed
            if sealed.start > self._node.start:
                return self._node.make_way()
            if sealed.start < self._node.start:
                self._node.end_round(number, Reason.LOST, JOB_RESTARTED)
            elif (index := sealed.index_of(self._node.name)) is not None:
                yield from Participation(self._node, sealed, index).run()
                has_taken_part = True

    def _is_same_run(self, round_: Round | None) -> bool:
        """Whether a round had the configuration of this node."""
        return round_ is not None and round_.members[0].config_sha256 == self._node.member.config_sha256

    def _superseded_by(self, round_: Round) -> str:
        """Why this supervisor supersedes one that is in a running round; empty if it does not."""
        if round_.start < self._node.start:
            return JOB_RESTARTED
        index = round_.index_of(self._node.name)
        is_me = index is not None and round_.members[index].boot != self._node.member.boot
        return "its supervisor was restarted" if is_me else ""

    def _stay_out(self, problems: list[str]) -> Exit:
        """Exit because ranks would fail on this node; the others continue without it."""
        self._dependencies.record(Event.PREFLIGHT_FAILED, problems=problems)
        for problem in problems:
            self._dependencies.say(f"node excluded: {problem}")
        return Exit.FAILED

    def _wait_for_end(self, number: int) -> Generator[float, None, Ending | Exit | None]:
        """Return how a round ended in which this node takes no part any more, or never did."""
        if number == 0:
            return None
        watch: DesertionWatch | None = None
        while (ending := self._board.ending(number)) is None:
            if watch is None:
                self._node.join(number + 1)
                self._dependencies.say(
                    f"round {number} is running without this node: waiting for the next one"
                )
                sealed = self._board.sealed(number)
                assert sealed is not None
                watch = DesertionWatch(self._board, sealed, self._policy.lease_s)
            if watch.is_deserted(self._dependencies.clock()):
                # A running member would detect the lost ones itself. Here none is left to do so.
                text = "all of its supervisors have stopped renewing their leases"
                self._node.end_round(number, Reason.LOST, text, node=watch.watched)
                continue
            if self._dependencies.is_wanted_back():
                return self._node.give_back(number + 1)
            yield self._node.next_look()
        return ending

    def _conclude(self, ending: Ending) -> Exit | None:
        """Return the exit code that follows from the end of a round; None when another round follows."""
        self._dependencies.say(f"round {ending.round} ended: {ending.reason} ({ending.node}): {ending.text}")
        if ending.reason == Reason.DONE:
            return Exit.DONE
        if ending.reason == Reason.MISTAKE:
            return Exit.DO_NOT_RESTART
        sealed = self._board.sealed(ending.round)
        assert sealed is not None
        if fruitless_after(sealed, ending) >= self._policy.max_fruitless:
            self._give_up(sealed, ending)
            return Exit.DO_NOT_RESTART
        return None

    def _give_up(self, sealed: Round, ending: Ending) -> None:
        """Log and record in the journal what is known about the last failure."""
        step = failed_step(ending)
        samples = self._dependencies.samples_of(step) if step is not None else []
        failures = fruitless_after(sealed, ending)
        self._dependencies.record(
            Event.GAVE_UP,
            round=ending.round,
            failures=failures,
            committed_step=sealed.committed_step,
            failed_node=ending.node,
            rank=ending.details.get("rank"),
            after_step=step,
            sample_ids=samples,
            text=ending.text,
        )
        self._dependencies.say(why(failures, sealed.committed_step, ending, samples))
