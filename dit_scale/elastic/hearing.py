"""Who is to blame when ranks of several nodes break off or stand still: all nodes are heard first.

A rank that is killed breaks the collectives of all others, and one that is stopped makes all others wait. So
a node that knows no first cause among its own ranks says how they stand, and nobody is blamed before the
other nodes have done so too, or have named the cause themselves by ending the round.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dit_scale.elastic.board import Board, Reason, Round
from dit_scale.elastic.node.deadlines import Standing, culprit
from dit_scale.elastic.node.group import GroupOutcome
from dit_scale.heartbeat import Phase

JUDGES = 16
"""Members that read the reports of all nodes, the first of a round: all come to the same judgement, the first
one counts, and thousands of nodes with thousands of reports are too much for a storage."""
MAX_TEXTS = 3
"""Of ranks that all say the same."""


@dataclass(frozen=True)
class Report:
    """What a node said, and when it was heard here."""

    tree: dict[str, Any]
    heard_s: float


class Hearing:
    """One node's part in it, during one round."""

    def __init__(self, board: Board, round_: Round, node: str, patience_s: float) -> None:
        """After `patience_s` nobody waits any longer for nodes that say nothing.

        A node that is none of the judges leaves it to them for twice as long, and then becomes one.
        """
        place = round_.index_of(node)
        self._is_judge = place is not None and place < JUDGES
        self._board, self._round, self._node, self._patience_s = board, round_, node, patience_s
        self._said: Any = None
        self._heard: dict[str, Report] = {}
        self._began_s: float | None = None
        self._leases: dict[str, int] | None = None

    def say(self, outcome: GroupOutcome | None, quiet: tuple[Standing, ...]) -> None:
        """Tell the others what has changed about the ranks of this node since the last time."""
        failed = outcome is not None and outcome.reason == Reason.FAILED
        said = (failed, [(one.rank, one.section, one.step, one.stopped, one.waits) for one in quiet])
        if said == self._said:
            return
        if failed or quiet:
            text = outcome.text if outcome is not None and failed else ""
            tree = {"failed": failed, "text": text, "ranks": [dict(vars(one)) for one in quiet]}
            if not self._board.report(self._round.number, self._node, tree):
                return
        elif self._said is not None:
            self._board.take_back(self._round.number, self._node)
        self._said = said

    def judge(self, now_s: float) -> GroupOutcome | None:
        """What the reports of all nodes come to; None as long as there is somebody to wait for."""
        if self._began_s is None:
            self._began_s = now_s + (0.0 if self._is_judge else 2 * self._patience_s)
        if now_s < self._began_s:
            return None
        for node, tree in self._board.reports(self._round.number).items():
            if node not in self._heard or self._heard[node].tree != tree:
                self._heard[node] = Report(tree, now_s)
        silent = [node for node in self._round.places if node not in self._heard]
        if silent and not self._is_over(silent, now_s):
            return None
        if (lost := self._lost(silent)) is not None:
            return lost
        if any(report.tree["failed"] for report in self._heard.values()):
            return _broken(self._heard)
        return _stalled(self._heard, now_s)

    def forget(self) -> None:
        """The ranks of this node get on: what was heard so far does not count any more."""
        self._heard, self._began_s, self._leases = {}, None, None

    def _is_over(self, silent: list[str], now_s: float) -> bool:
        """Whether the nodes that say nothing had their time; their leases are looked at early in it."""
        assert self._began_s is not None
        if self._leases is None and now_s - self._began_s > self._patience_s / 5:
            self._leases = {node: self._board.lease(node) for node in silent}
        return now_s - self._began_s > self._patience_s

    def _lost(self, silent: list[str]) -> GroupOutcome | None:
        """A node that says nothing and does not renew its lease either."""
        for node in silent:
            if (self._leases or {}).get(node) == self._board.lease(node):
                return GroupOutcome(
                    Reason.LOST, "the other nodes' ranks stand still, its supervisor gives no sign", node=node
                )
        return None


def _broken(heard: Mapping[str, Report]) -> GroupOutcome:
    texts = [f"{node}: {report.tree['text']}" for node, report in heard.items() if report.tree["failed"]]
    more = f"; and {len(texts) - MAX_TEXTS} more nodes" if len(texts) > MAX_TEXTS else ""
    return GroupOutcome(Reason.FAILED, "no rank says why: " + "; ".join(texts[:MAX_TEXTS]) + more)


def _stalled(heard: Mapping[str, Report], now_s: float) -> GroupOutcome | None:
    found = [
        (_standing(tree, now_s - report.heard_s), node)
        for node, report in heard.items()
        for tree in report.tree["ranks"]
    ]
    if not found:
        return None
    worst = culprit(one for one, _ in found)
    if not worst.is_overdue:
        return None
    node = next(node for one, node in found if one == worst)
    details = {
        "rank": worst.rank,
        "step": worst.step,
        "section": worst.section.name,
        "age_s": round(worst.age_s, 1),
        "ranks": [f"{node}: {one}" for one, node in sorted(found, key=lambda pair: pair[0].rank)],
    }
    return GroupOutcome(Reason.HUNG, str(worst), details, node=node)


def _standing(tree: dict[str, Any], since_s: float) -> Standing:
    one = Standing(**{**tree, "section": Phase(tree["section"])})
    return replace(one, age_s=one.age_s + since_s)
