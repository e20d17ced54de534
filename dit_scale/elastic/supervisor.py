"""The supervisor of one node: a state machine over the board, the group of its ranks and a clock.

    join -> sealed -> take part -> ended -> join ...        (docs/elasticity.md has the whole of it)

It decides and waits, nothing else: what is real, the clock included, is behind its arguments, so that the
same code runs a cluster and a simulation of one. `run` is a generator; what it yields is the time until
which nothing needs to be done unless something changes.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace

from dit_scale.elastic.board import FRUITLESS, SAVING, Board, Ending, Joined, Member, Reason, Round
from dit_scale.elastic.giving_up import failed_step, why
from dit_scale.elastic.hearing import Hearing
from dit_scale.elastic.lease import Leases, Outside
from dit_scale.elastic.node.exits import Exit
from dit_scale.elastic.node.group import Group, GroupOutcome
from dit_scale.journal import Event

Wait = Generator[float, None, Exit]
LOOKS_PER_S = 1024
"""Each is two to five requests; a prefix on S3 answers 5,500 a second."""
STARTED_AGAIN = "the job was started again"
MAX_NAMES = 8
"""That a message names; the journal has all."""


@dataclass(frozen=True)
class Policy:
    """How many nodes, and how long to wait for what (seconds)."""

    min_nodes: int = 1
    max_nodes: int = 1
    poll_s: float = 0.25
    lease_s: float = 15.0
    """A node whose counter stands still so long is lost."""
    settle_s: float = 10.0
    """Without a newcomer for so long, a round begins with the nodes that are there."""
    patience_s: float = 3.0
    """The first node begins a round; after this any other does."""
    gather_s: float = 3600.0
    """Time in which `min_nodes` must come."""
    save_s: float = 900.0
    """Time in which ranks that were asked to save and leave must do so."""
    grow_s: float = 60.0
    """A round that newcomers wait for lasts at least so long, and until its next commit."""
    max_fruitless: int = 3
    """Failures in a row without a newer committed step, after which there is no further try."""

    @property
    def look_s(self) -> float:
        """Time between two looks: the more nodes, the longer, for all of them ask one storage.

        All nodes together take no more than LOOKS_PER_S, as far as leases are renewed in time.
        """
        return max(self.poll_s, min(self.max_nodes / LOOKS_PER_S, self.lease_s / 5))


@dataclass
class Dependencies:
    """What a supervisor sees of the world."""

    clock: Callable[[], float]
    """Monotonic seconds."""
    committed_step: Callable[[], int]
    """Of the newest checkpoint; -1 when there is none."""
    wanted_back: Callable[[], bool]
    """Whether the scheduler has asked for this node."""
    say: Callable[[str], None]
    record: Callable[..., None] = field(default=lambda event, **details: None)
    """Writes an event into the journal of this supervisor."""
    free_port: Callable[[], int] = field(default=lambda: 29500)
    """A port of this node that nobody listens on; asked for before every round."""
    samples_of: Callable[[int], list[int]] = field(default=lambda step: [])
    """The ids of the samples of the step after so many steps."""
    problems: Callable[[], list[str]] = field(default=list)
    """Of this node, that keep it from taking part: looked for at the start and before every further round."""


class Supervisor:
    """Runs rounds until the run is done, or this node is wanted back, or another try makes no sense."""

    def __init__(self, me: Member, board: Board, group: Group, policy: Policy, world: Dependencies) -> None:
        self._me, self._board, self._group = me, board, group
        self._policy, self._world = policy, world
        self._leases = Leases(board, me.node, policy.lease_s)

    def run(self) -> Wait:
        """The whole life; returns the exit code."""
        if problems := self._world.problems():
            return self._stay_out(problems)
        number = self._board.newest()
        before = self._board.sealed(number) if number else None
        ending = self._board.ending(number) if number else None
        if ending is not None and ending.reason == Reason.DONE and self._is_same_run(before):
            self._world.say(f"the run is done: {ending.text}")
            return Exit.DONE
        newest = max(before.start if before else 0, self._board.joined(number + 1).start)
        if not self._me.start:  # nobody says: a part of what is there
            self._me = replace(self._me, start=newest)
        if newest > self._me.start:
            return self._make_way()
        if before is not None and ending is None and (text := self._what_replaces(before)):
            self._join(number + 1)  # first, so that the others wait for this node, or make way for it
            self._end(number, Reason.LOST, text)
        begun_after, has_taken_part = ending is None, False
        while True:
            if begun_after:  # what ended before this start was for a person to see and mend
                said = yield from self._wait_for_end(number)
                if isinstance(said, Exit):
                    return said
                if said is not None and (code := self._conclude(said)) is not None:
                    return code
                ending = said
            begun_after = True
            if self._world.wanted_back():
                return self._leave(number + 1)
            if has_taken_part and (problems := self._world.problems()):
                self._board.withdraw(number + 1, self._me)
                return self._stay_out(problems)
            found = yield from self._gather(number + 1, before, ending)
            if isinstance(found, Exit):
                return found
            number, before = found.number, found
            if found.start > self._me.start:
                return self._make_way()
            if found.start < self._me.start:
                self._end(number, Reason.LOST, STARTED_AGAIN)
            elif (index := found.index_of(self._me.node)) is not None:
                yield from self._take_part(found, index)
                has_taken_part = True

    def _what_replaces(self, round_: Round) -> str:
        """What became of an earlier start that takes part in a round that goes on; empty: there was none."""
        if round_.start < self._me.start:
            return STARTED_AGAIN
        index = round_.index_of(self._me.node)
        is_me = index is not None and round_.members[index].boot != self._me.boot
        return "its supervisor was started again" if is_me else ""

    def _leave(self, number: int) -> Exit:
        """Leave, for the scheduler wants this node back; nobody waits for it to take part in a round."""
        self._board.withdraw(number, self._me)
        return Exit.REQUEUE

    def _make_way(self) -> Exit:
        """Leave, for a later start of the job is there: this node is what was left running of this one."""
        self._world.say("a later start of this job has taken over, or another job of the same run")
        self._world.record(Event.MADE_WAY, start=self._me.start)
        return Exit.DO_NOT_RESTART

    def _stay_out(self, problems: list[str]) -> Exit:
        """Leave, for the ranks would fail here: the others go on without this node."""
        self._world.record(Event.PREFLIGHT_FAILED, problems=problems)
        for problem in problems:
            self._world.say(f"this node takes no part: {problem}")
        return Exit.FAILED

    def _is_same_run(self, round_: Round | None) -> bool:
        """Whether a round was of the configuration that this node has."""
        return round_ is not None and round_.members[0].config_sha256 == self._me.config_sha256

    def _join(self, number: int) -> None:
        """Ask to take part in a round, with a port that is free now."""
        self._me = replace(self._me, port=self._world.free_port())
        self._board.join(number, self._me)
        self._world.record(Event.JOINED, round=number)

    # Between two rounds

    def _wait_for_end(self, number: int) -> Generator[float, None, Ending | Exit | None]:
        """The ending of a round that this node takes no part in any more, or never did."""
        if number == 0:
            return None
        outside: Outside | None = None
        while (ending := self._board.ending(number)) is None:
            if outside is None:
                self._join(number + 1)
                self._world.say(f"round {number} runs without this node, which waits for the next one")
                sealed = self._board.sealed(number)
                assert sealed is not None
                outside = Outside(self._board, sealed, self._policy.lease_s)
            if outside.is_deserted(self._world.clock()):
                # Where one of the members lives it finds the others lost itself; here nobody is left to.
                text = "none of its supervisors gives a sign"
                self._board.end(self._ending(number, Reason.LOST, text, outside.watched))
                continue
            if self._world.wanted_back():
                return self._leave(number + 1)
            yield self._rest()
        return ending

    def _conclude(self, ending: Ending) -> Exit | None:
        """What a round's end means for this node; None: there is another round."""
        self._world.say(f"round {ending.round} ended: {ending.reason} ({ending.node}): {ending.text}")
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
        """Say, and write into the journal, what a person needs to mend it."""
        step = failed_step(ending)
        samples = self._world.samples_of(step) if step is not None else []
        failures = fruitless_after(sealed, ending)
        self._world.record(
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
        self._world.say(why(failures, sealed.committed_step, ending, samples))

    def _gather(
        self, number: int, before: Round | None, ending: Ending | None
    ) -> Generator[float, None, Round | Exit]:
        """Join a round and wait until its members are fixed, by this node or another."""
        policy, begin_s = self._policy, self._world.clock()
        self._join(number)
        names: list[str] = []
        changed_s = begin_s
        while (sealed := self._board.sealed(number)) is None:
            now_s = self._world.clock()
            if self._world.wanted_back():
                return self._leave(number)
            found = self._board.joined(number)
            if found.start > self._me.start:
                self._board.withdraw(number, self._me)
                return self._make_way()
            if found.nodes != names:
                names, changed_s = found.nodes, now_s
            if self._may_begin(found, now_s - changed_s, before, ending):
                if self._seal(number, names, before, ending):
                    continue
            elif len(names) < policy.min_nodes and now_s - begin_s > policy.gather_s:
                self._world.say(
                    f"{len(names)} of at least {policy.min_nodes} nodes came within {policy.gather_s:g} s "
                    f"({', '.join(names)}); are the others up, is {self._board.url} the same place for all?"
                )
                return Exit.FAILED
            yield self._rest()
        return sealed

    def _may_begin(self, found: Joined, still_s: float, before: Round | None, ending: Ending | None) -> bool:
        """Whether a round can begin with these nodes, the same for `still_s`, and this one is to begin it."""
        policy, names = self._policy, found.nodes
        is_first = names[:1] == [self._me.node]
        late_s = 0.0 if is_first else policy.patience_s
        if len(names) < policy.min_nodes or not (is_first or still_s > late_s):
            return False
        expected = _expected(before, ending, self._me.start) - found.left
        all_back = expected <= set(names)
        if len(names) >= policy.max_nodes or (bool(expected) and all_back):
            return True
        # Who was in a round that saves before it ends comes when its save is done.
        saving = ending is not None and ending.reason in SAVING and not all_back
        return still_s > late_s + (policy.save_s if saving else policy.settle_s)

    def _seal(self, number: int, names: list[str], before: Round | None, ending: Ending | None) -> bool:
        """Fix the members of a round; True when they are fixed, by whomever."""
        members = self._board.members(number, self._me.start, names[: self._policy.max_nodes])
        if any(member is None for member in members):
            return False  # one withdrew just now
        fixed = tuple(member for member in members if member is not None)
        fruitless = fruitless_after(before, ending) if before and ending else 0
        if fruitless >= self._policy.max_fruitless:
            fruitless = 0  # a person has started it again
        self._board.seal(Round(number, fixed, self._world.committed_step(), fruitless))
        odd = [member.node for member in fixed if member.config_sha256 != fixed[0].config_sha256]
        if odd:
            text = f"the configuration of {', '.join(odd)} differs from that of {fixed[0].node}"
            self._end(number, Reason.MISTAKE, text + "; start all nodes with the same file and overrides")
        return True

    # In a round

    def _take_part(self, round_: Round, index: int) -> Generator[float, None, None]:
        """Run this node's ranks until the round ends, and see them gone."""
        nodes = list(round_.places)
        named = ", ".join(nodes[:MAX_NAMES]) + (", ..." if len(nodes) > MAX_NAMES else "")
        room = self._policy.max_nodes - len(nodes)
        free = f"; room for {room} more, which must see the same {self._board.url}" if room > 0 else ""
        self._world.say(f"round {round_.number}: node {index + 1} of {len(nodes)} ({named}){free}")
        self._world.record(Event.ROUND, round=round_.number, nodes=nodes)
        begin_s = self._world.clock()
        self._leases.watch(round_, index, begin_s)
        self._hearing = Hearing(self._board, round_, self._me.node, self._policy.lease_s / 2)
        try:
            if self._board.ending(round_.number) is None:
                self._group.start(round_, index)
                self._world.record(Event.RANKS_STARTED, round=round_.number)
            while (ending := self._board.ending(round_.number)) is None:
                self._look(round_, index, begin_s)
                yield self._rest()
            self._world.record(
                Event.ROUND_ENDED,
                round=round_.number,
                reason=ending.reason,
                failed_node=ending.node,
                text=ending.text,
                details=ending.details,
            )
            if ending.reason == Reason.HUNG:
                self._group.keep_stacks()
            if ending.reason in (*SAVING, Reason.DONE):
                yield from self._let_leave(ending)
        finally:
            self._group.stop()
            self._world.record(Event.RANKS_GONE, round=round_.number)

    def _look(self, round_: Round, index: int, begin_s: float) -> None:
        """End the round when there is a reason that this node sees."""
        number = round_.number
        if self._world.wanted_back():
            self._end(number, Reason.LEAVING, "the scheduler wants the node back")
        elif (outcome := self._find_cause()) is not None:
            self._end_by(number, outcome)
        elif (lost := self._leases.lost(self._world.clock())) is not None:
            self._board.end(self._ending(number, Reason.LOST, "its supervisor gives no sign", lost))
        elif index == 0 and self._may_grow(round_, begin_s):
            self._end(number, Reason.GROWING, "further nodes are waiting")

    def _find_cause(self) -> GroupOutcome | None:
        """Why the ranks broke off or stand still; None while they get on, or other nodes are to be heard."""
        outcome = self._group.poll()
        if outcome is not None and outcome.first_hand:
            return outcome
        self._hearing.say(outcome, self._group.quiet())
        if outcome is None:
            self._hearing.forget()
            return None
        return self._hearing.judge(self._world.clock())

    def _let_leave(self, ending: Ending) -> Generator[float, None, None]:
        """Wait for the ranks to leave by themselves, with their state saved."""
        deadline_s = self._world.clock() + self._policy.save_s
        while self._group.poll() is None:
            if ending.reason in SAVING:
                self._group.ask_to_stop()
            if self._world.clock() > deadline_s:
                self._world.say(f"the ranks did not leave within {self._policy.save_s:g} s and are ended")
                return
            yield self._rest()

    def _may_grow(self, round_: Round, begin_s: float) -> bool:
        policy = self._policy
        return (
            len(round_.members) < policy.max_nodes
            and self._world.clock() - begin_s > policy.grow_s
            and bool(self._board.joined(round_.number + 1).nodes)
            and self._world.committed_step() > round_.committed_step
        )

    def _end_by(self, number: int, outcome: GroupOutcome) -> None:
        ending = self._ending(number, outcome.reason, outcome.text, outcome.node or self._me.node)
        self._board.end(replace(ending, details=outcome.details))

    def _end(self, number: int, reason: Reason, text: str) -> None:
        self._board.end(self._ending(number, reason, text, self._me.node))

    def _ending(self, number: int, reason: Reason, text: str, node: str) -> Ending:
        return Ending(number, reason, node, text, self._world.committed_step())

    def _rest(self) -> float:
        """Renew the lease when it is time; the time of the next look."""
        now_s = self._world.clock()
        self._leases.renew(now_s)
        return now_s + self._policy.look_s


def fruitless_after(round_: Round, ending: Ending) -> int:
    """Rounds in a row, up to this one, that failed without a newer committed step."""
    if ending.committed_step > round_.committed_step:
        return 0
    return round_.fruitless + (ending.reason in FRUITLESS)


def _expected(before: Round | None, ending: Ending | None, start: int) -> set[str]:
    """The nodes with which the next round need not wait for others any longer.

    None when the job was started again since: its nodes may be others, and also who left has come back.
    """
    if before is None or ending is None or before.start < start:
        return set()
    gone = {ending.node} if ending.reason in (Reason.LOST, Reason.LEAVING) else set()
    return before.places.keys() - gone
