"""Which node is at fault when ranks of several nodes fail or hang: all nodes report before any is blamed.

A killed rank breaks the collectives of all others, and a stopped rank makes all others wait. So a node that
sees no first cause among its own ranks reports where they stand. No node is blamed before the others have
reported as well, or have named the cause themselves by ending the round.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dit_scale.elastic.board import Board, Reason, Round
from dit_scale.elastic.node.deadlines import Standing, culprit
from dit_scale.elastic.node.outcomes import GroupOutcome
from dit_scale.heartbeat import Phase

JUDGES = 16
"""Number of judges: the first members of a round, which read the reports of all nodes. They come to the same
judgement, and the first one recorded counts. If thousands of nodes read thousands of reports, they would
overload a storage."""
MAX_TEXTS = 3
"""Nodes that a message quotes when all report the same."""


@dataclass(frozen=True)
class Report:
    """The report of a node, and when it arrived here."""

    tree: dict[str, Any]
    heard_s: float


class Hearing:
    """One node's part in the hearing of one round."""

    def __init__(self, board: Board, round_: Round, node: str, patience_s: float) -> None:
        """`patience_s` is the longest wait for nodes that have not reported.

        A node that is not a judge waits twice as long for a judgement, and then becomes a judge.
        """
        index = round_.index_of(node)
        self._is_judge = index is not None and index < JUDGES
        self._board, self._round, self._node, self._patience_s = board, round_, node, patience_s
        self._reported: object = None
        self._heard: dict[str, Report] = {}
        self._start_s: float | None = None
        self._leases: dict[str, int] | None = None

    def report(self, outcome: GroupOutcome | None, quiet: tuple[Standing, ...]) -> None:
        """Report to the other nodes what has changed about the ranks of this node since the last report."""
        failed = outcome is not None and outcome.reason == Reason.FAILED
        state = (failed, [(one.rank, one.phase, one.step, one.stopped, one.waits) for one in quiet])
        if state == self._reported:
            return
        if failed or quiet:
            text = outcome.text if outcome is not None and failed else ""
            tree = {"failed": failed, "text": text, "ranks": [_tree(one) for one in quiet]}
            if not self._board.report(self._round.number, self._node, tree):
                return
        elif self._reported is not None:
            self._board.take_back(self._round.number, self._node)
        self._reported = state

    def judge(self, now_s: float) -> GroupOutcome | None:
        """Return what the reports of all nodes add up to; None while there are nodes to wait for."""
        if self._start_s is None:
            self._start_s = now_s + (0.0 if self._is_judge else 2 * self._patience_s)
        if now_s < self._start_s:
            return None
        for node, tree in self._board.reports(self._round.number).items():
            if node not in self._heard or self._heard[node].tree != tree:
                self._heard[node] = Report(tree, now_s)
        silent = [node for node in self._round.places if node not in self._heard]
        if silent and not self._is_over(silent, now_s, self._start_s):
            return None
        if (lost := self._lost(silent)) is not None:
            return lost
        if any(report.tree["failed"] for report in self._heard.values()):
            return _broken(self._heard)
        return _stalled(self._heard, now_s)

    def reset(self) -> None:
        """Discard what was heard so far, because the ranks of this node make progress."""
        self._heard, self._start_s, self._leases = {}, None, None

    def _is_over(self, silent: list[str], now_s: float, start_s: float) -> bool:
        """Whether the silent nodes have had their time. Their leases are read early in it."""
        if self._leases is None and now_s - start_s > self._patience_s / 5:
            self._leases = {node: self._board.lease(node) for node in silent}
        return now_s - start_s > self._patience_s

    def _lost(self, silent: list[str]) -> GroupOutcome | None:
        """Return the loss of a silent node that has not renewed its lease either."""
        for node in silent:
            if (self._leases or {}).get(node) == self._board.lease(node):
                return GroupOutcome(
                    Reason.LOST,
                    "ranks of the other nodes are waiting, and its supervisor has stopped renewing its lease",
                    node=node,
                )
        return None


def _broken(heard: Mapping[str, Report]) -> GroupOutcome:
    texts = [f"{node}: {report.tree['text']}" for node, report in heard.items() if report.tree["failed"]]
    more = f"; and {len(texts) - MAX_TEXTS} more nodes" if len(texts) > MAX_TEXTS else ""
    return GroupOutcome(Reason.FAILED, "cause unknown: " + "; ".join(texts[:MAX_TEXTS]) + more)


def _stalled(heard: Mapping[str, Report], now_s: float) -> GroupOutcome | None:
    standings = [
        (_standing(tree, now_s - report.heard_s), node)
        for node, report in heard.items()
        for tree in report.tree["ranks"]
    ]
    if not standings:
        return None
    worst = culprit(one for one, _ in standings)
    if not worst.is_overdue:
        return None
    node = next(node for one, node in standings if one == worst)
    details = {
        "rank": worst.rank,
        "step": worst.step,
        "section": worst.phase.name,
        "age_s": round(worst.age_s, 1),
        "ranks": [f"{node}: {one}" for one, node in sorted(standings, key=lambda pair: pair[0].rank)],
    }
    return GroupOutcome(Reason.HUNG, str(worst), details, node=node)


def _tree(one: Standing) -> dict[str, Any]:
    tree = dict(vars(one))
    tree["section"] = tree.pop("phase")
    return tree


def _standing(tree: dict[str, Any], since_s: float) -> Standing:
    fields = {key: value for key, value in tree.items() if key != "section"}
    one = Standing(**fields, phase=Phase(tree["section"]))
    return replace(one, age_s=one.age_s + since_s)
