"""How supervisors agree on the members of the next round: all join, one of them seals it."""

from collections.abc import Generator

from dit_scale.elastic.board import SAVING, Ending, Joined, Reason, Round
from dit_scale.elastic.giving_up import fruitless_after
from dit_scale.elastic.local_node import LocalNode
from dit_scale.elastic.node.exits import Exit


class Gathering:
    """One node's part in the agreement on one round."""

    def __init__(self, node: LocalNode, number: int, before: Round | None, ending: Ending | None) -> None:
        """`before` is the round before and `ending` how it ended, where known."""
        self._node, self._number = node, number
        self._before, self._ending = before, ending

    def run(self) -> Generator[float, None, Round | Exit]:
        """Join, and wait until the members are sealed, by this node or another."""
        node, number = self._node, self._number
        clock = node.dependencies.clock
        start_s = clock()
        node.join(number)
        names: list[str] = []
        changed_s = start_s
        while (sealed := node.board.sealed(number)) is None:
            now_s = clock()
            if node.dependencies.is_wanted_back():
                return node.give_back(number)
            joined = node.board.joined(number)
            if joined.start > node.start:
                node.withdraw(number)
                return node.make_way()
            if joined.nodes != names:
                names, changed_s = joined.nodes, now_s
            if self._may_seal(joined, now_s - changed_s):
                if self._seal(names):
                    continue
            elif len(names) < node.policy.min_nodes and now_s - start_s > node.policy.gather_s:
                self._say_too_few(names)
                return Exit.FAILED
            yield node.next_look()
        return sealed

    def _say_too_few(self, names: list[str]) -> None:
        policy = self._node.policy
        self._node.dependencies.say(
            f"{len(names)} of at least {policy.min_nodes} nodes ({', '.join(names)}) joined within "
            f"{policy.gather_s:g} s; check that the others are running and that all of them see the same "
            f"{self._node.board.url}"
        )

    def _may_seal(self, joined: Joined, unchanged_s: float) -> bool:
        """Whether this node may seal a round of these nodes, which have not changed for `unchanged_s`."""
        policy, names = self._node.policy, joined.nodes
        is_first = names[:1] == [self._node.name]
        late_s = 0.0 if is_first else policy.patience_s
        if len(names) < policy.min_nodes or not (is_first or unchanged_s > late_s):
            return False
        expected = self._expected() - joined.left
        all_back = expected <= set(names)
        if len(names) >= policy.max_nodes or (bool(expected) and all_back):
            return True
        # The members of a round that saves before it ends join once their save is done.
        saving = self._ending is not None and self._ending.reason in SAVING and not all_back
        return unchanged_s > late_s + (policy.save_s if saving else policy.settle_s)

    def _expected(self) -> set[str]:
        """Return the nodes with which the round can be sealed immediately; empty if they are unknown.

        They are unknown after a restart of the job: it may have other nodes, and those that left may be back.
        """
        before, ending = self._before, self._ending
        if before is None or ending is None or before.start < self._node.start:
            return set()
        absent = {ending.node} if ending.reason in (Reason.LOST, Reason.LEAVING) else set()
        return before.places.keys() - absent

    def _seal(self, names: list[str]) -> bool:
        """Fix the members of the round. True once they are fixed, by this node or another."""
        node = self._node
        members = node.board.members(self._number, node.start, names[: node.policy.max_nodes])
        if any(member is None for member in members):
            return False  # one has just withdrawn
        fixed = tuple(member for member in members if member is not None)
        fruitless = fruitless_after(self._before, self._ending) if self._before and self._ending else 0
        if fruitless >= node.policy.max_fruitless:
            fruitless = 0  # restarted after it gave up
        node.board.seal(Round(self._number, fixed, node.dependencies.committed_step(), fruitless))
        odd = [member.node for member in fixed if member.config_sha256 != fixed[0].config_sha256]
        if odd:
            node.end_round(
                self._number,
                Reason.MISTAKE,
                f"the configuration of {', '.join(odd)} differs from that of {fixed[0].node}; "
                "start all nodes with the same file and overrides",
            )
        return True
