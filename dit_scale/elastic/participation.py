"""What a member does in one round: run its ranks, watch them and its neighbour, end the round if needed."""

from collections.abc import Generator

from dit_scale.elastic.board import SAVING, Ending, Reason, Round
from dit_scale.elastic.hearing import Hearing
from dit_scale.elastic.lease import NeighbourWatch
from dit_scale.elastic.local_node import LocalNode
from dit_scale.elastic.node.group import Group
from dit_scale.elastic.node.outcomes import GroupOutcome
from dit_scale.journal import Event

MAX_NAMES = 8
"""Nodes that a log line names; the journal has all."""


class Participation:
    """One node's part in one round; a new object for every round."""

    def __init__(self, node: LocalNode, round_: Round, index: int) -> None:
        self._node, self._round, self._index = node, round_, index
        self._dependencies = node.dependencies
        self._start_s = node.dependencies.clock()
        self._neighbour = NeighbourWatch(node.board, node.lease, round_, index, self._start_s)
        self._hearing = Hearing(node.board, round_, node.name, node.policy.lease_s / 2)

    def run(self) -> Generator[float, None, None]:
        """Run the ranks of this node until the round ends, and return once none is left."""
        board, number = self._node.board, self._round.number
        self._announce()
        try:
            if (ending := board.ending(number)) is not None:
                self._record_ending(ending)
                return
            group = self._dependencies.start_group(self._round, self._index)
            try:
                self._dependencies.record(Event.RANKS_STARTED, round=number)
                while (ending := board.ending(number)) is None:
                    self._look(group)
                    yield self._node.next_look()
                self._record_ending(ending)
                if ending.reason == Reason.HUNG:
                    group.keep_stacks()
                if ending.reason in (*SAVING, Reason.DONE):
                    yield from self._wait_for_ranks(group, ending)
            finally:
                group.stop()
        finally:
            self._dependencies.record(Event.RANKS_GONE, round=number)

    def _announce(self) -> None:
        nodes = list(self._round.places)
        named = ", ".join(nodes[:MAX_NAMES]) + (", ..." if len(nodes) > MAX_NAMES else "")
        room = self._node.policy.max_nodes - len(nodes)
        more = f"; {room} more may join, if they see the same {self._node.board.url}" if room > 0 else ""
        self._dependencies.say(
            f"round {self._round.number}: node {self._index + 1} of {len(nodes)} ({named}){more}"
        )
        self._dependencies.record(Event.ROUND, round=self._round.number, nodes=nodes)

    def _record_ending(self, ending: Ending) -> None:
        self._dependencies.record(
            Event.ROUND_ENDED,
            round=ending.round,
            reason=ending.reason,
            failed_node=ending.node,
            text=ending.text,
            details=ending.details,
        )

    def _look(self, group: Group) -> None:
        """End the round if this node sees a reason to."""
        node, number = self._node, self._round.number
        if self._dependencies.is_wanted_back():
            node.end_round(number, Reason.LEAVING, "the scheduler wants the node back")
        elif (outcome := self._find_cause(group)) is not None:
            node.end_round(number, outcome.reason, outcome.text, node=outcome.node, details=outcome.details)
        elif (lost := self._neighbour.lost(self._dependencies.clock())) is not None:
            node.end_round(number, Reason.LOST, "its supervisor has stopped renewing its lease", node=lost)
        elif self._index == 0 and self._may_grow():
            node.end_round(number, Reason.GROWING, "more nodes are waiting to join")

    def _find_cause(self, group: Group) -> GroupOutcome | None:
        """Return why ranks failed or hang; None while they make progress or other nodes are to be heard."""
        outcome = group.poll()
        if outcome is not None and outcome.first_hand:
            return outcome
        self._hearing.report(outcome, group.quiet())
        if outcome is None:
            self._hearing.reset()
            return None
        return self._hearing.judge(self._dependencies.clock())

    def _wait_for_ranks(self, group: Group, ending: Ending) -> Generator[float, None, None]:
        """Wait for the ranks to save and exit by themselves."""
        save_s = self._node.policy.save_s
        deadline_s = self._dependencies.clock() + save_s
        while group.poll() is None:
            if ending.reason in SAVING:
                group.ask_to_stop()
            if self._dependencies.clock() > deadline_s:
                self._dependencies.say(f"the ranks did not save and exit within {save_s:g} s: killing them")
                return
            yield self._node.next_look()

    def _may_grow(self) -> bool:
        policy = self._node.policy
        return (
            len(self._round.members) < policy.max_nodes
            and self._dependencies.clock() - self._start_s > policy.grow_s
            and bool(self._node.board.joined(self._round.number + 1).nodes)
            and self._dependencies.committed_step() > self._round.committed_step
        )
