"""The ledger of a measured run: small runs checked by hand, and exact sums for arbitrary journals."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dit_scale.journal import Entry, Journal, read_journal, read_outline
from dit_scale.ledger import Heading, Ledger
from dit_scale.report.goodput import MEASURED, ledger
from dit_scale.report.spans import MICRO, attempts_of, rounds_of

BOOT_S = 990.0
"""How far the wall clock is ahead of the monotonic one here."""


def event(at_s: float, kind: str, **details: Any) -> Entry:
    return {"time_s": at_s, "monotonic_s": at_s - BOOT_S, "event": kind, **details}


def of_attempt(number: int, *rows: tuple[float, str, int, dict[str, Any]]) -> list[Entry]:
    return [event(at_s, name, attempt=number, step=step, **more) for at_s, name, step, more in rows]


def spent_s(found: Ledger) -> dict[str, float]:
    assert sum(found.spent.values()) == found.end - found.begin
    return {heading.name: us / MICRO for heading, us in found.spent.items() if us}


FIRST = of_attempt(
    1,
    (1010.0, "start", 0, {"restore_s": 0.5}),
    (1012.0, "first_step", 1, {"data_s": 1.0}),
    (1021.0, "log", 10, {"data_s": 1.5}),
    (1031.0, "save", 20, {"stall_s": 0.25}),
    (1032.0, "checkpoint", 21, {"name": "0000000020-0001"}),
    (1041.0, "log", 30, {"data_s": 1.5}),
)
SECOND = of_attempt(
    2,
    (1070.0, "start", 20, {"restore_s": 4.0}),
    (1072.0, "first_step", 21, {"data_s": 0.0}),
    (1082.0, "log", 31, {"data_s": 0.0}),
    (1090.0, "save", 40, {"stall_s": 0.0}),
    (1091.0, "checkpoint", 40, {"name": "0000000040-0002"}),
    (1092.0, "waited", 40, {"stall_s": 3.0}),
    (1092.0, "done", 40, {}),
)
NODE0 = [
    event(1000.0, "joined", round=1),
    event(1002.0, "round", round=1, nodes=["node0", "node1"]),
    event(1003.0, "ranks_started", round=1),
    event(1050.0, "round_ended", round=1, reason="hung", details={"age_s": 6.0}),
    event(1052.0, "ranks_gone", round=1),
    event(1055.0, "round", round=2, nodes=["node0", "node1"]),
    event(1093.0, "round_ended", round=2, reason="done", details={}),
    event(1093.5, "ranks_gone", round=2),
]


def test_a_restarted_run() -> None:
    found = ledger([*FIRST, *SECOND], {"node0": NODE0})
    assert spent_s(found) == {
        "WAITING": 2.0 + 3.0,  # for node1, and from the exit of the ranks of round 1 to the start of round 2
        "STARTUP": 10.0 - 0.5,  # from the start of round 1 to its first step, without the restore
        # round 2 likewise, and stopping the ranks of both rounds
        "RESTART": 2.0 + (17.0 - 4.0) + 1.5,
        "RESTORE": 0.5 + 4.0,
        # steps 2 to 20 of 30, without a wait for data and a stall; then step 21 to the last save
        "PRODUCTIVE": (19.0 - 0.5 - 0.25) + 17.0,
        "REPLAYED": 1044.0 - 1031.0,  # after step 20, until the last heartbeat
        "DATA": 0.5,
        "CHECKPOINT": 0.25 + 3.0,
        "DETECT": 6.0,
    }
    assert found.goodput == (18.25 + 17.0) / 93.5


def test_a_run_without_supervisors() -> None:
    found = spent_s(ledger([*FIRST, *SECOND], {}))
    assert found["STOPPED"] == (1070.0 - 4.0) - 1041.0
    assert found["REPLAYED"] == 1041.0 - 1031.0
    assert found["STARTUP"] == 2.0
    assert found["RESTART"] == 2.0


def test_a_first_start_that_failed_is_a_startup_and_the_next_one_a_restart() -> None:
    failed = [*NODE0[:3], event(1008.0, "round_ended", round=1, reason="failed"), *NODE0[5:]]
    found = spent_s(ledger(SECOND, {"node0": failed}))
    assert found["STARTUP"] == 1008.0 - 1002.0
    assert found["RESTART"] == (17.0 - 4.0) + 1.5


def test_damaged_entries_do_not_count() -> None:
    assert spent_s(ledger([*FIRST, event(1040.0, "log", step=1), event(1.0, "log")], {})) == spent_s(
        ledger(FIRST, {})
    )


def test_steps_between_two_entries_are_split_in_proportion() -> None:
    """The second attempt resumes from step 15, which lies between two entries of the first."""
    later = of_attempt(2, (1070.0, "start", 15, {"restore_s": 0.0}))
    found = spent_s(ledger([*FIRST, *later], {}))
    assert found["REPLAYED"] == (1041.0 - 1026.0) - 0.25
    assert found["PRODUCTIVE"] == 1026.0 - 1012.0 - 0.5


def test_steps_that_are_not_committed_are_lost_only_if_the_run_is_dead() -> None:
    dead, alive = (spent_s(ledger(FIRST, {}, 1051.0, alive=alive)) for alive in (False, True))
    assert dead["REPLAYED"] == 10.0
    assert dead["STOPPED"] == 10.0
    assert "REPLAYED" not in alive
    assert alive["PRODUCTIVE"] == 1051.0 - 1012.0 - 0.75


def test_a_rollback_loses_the_steps_after_its_checkpoint() -> None:
    rolled = of_attempt(1, (1043.0, "rollback", 32, {}))
    found = spent_s(ledger([*FIRST, *rolled, *SECOND], {"node0": NODE0}))
    assert found["REPLAYED"] == 1043.0 - 1031.0


def test_a_node_that_was_preempted_is_stopped_until_its_supervisor_starts() -> None:
    left = [*NODE0[:3], event(1042.0, "round_ended", round=1, reason="leaving")]
    back = [event(1053.0, "joined", round=2), *NODE0[5:]]
    later = [event(1042.5, "ranks_gone", round=1)]
    found = spent_s(ledger([*FIRST, *SECOND], {"node0": left + back, "node1": [NODE0[1], *later]}))
    assert found["STOPPED"] == 1053.0 - 1042.0
    assert found["WAITING"] == 2.0 + 2.0


def test_a_round_without_a_recorded_end_ends_with_its_last_entry() -> None:
    """All nodes were switched off; a supervisor started again 10 s before the second round."""
    killed = [*NODE0[:3], event(1045.0, "joined", round=2), *NODE0[5:]]
    found = spent_s(ledger([*FIRST, *SECOND], {"node0": killed}))
    assert found["STOPPED"] == 1045.0 - 1041.0
    assert found["WAITING"] == 2.0 + 10.0
    assert "DETECT" not in found


def test_time_before_the_first_round_is_waiting() -> None:
    joined = [event(1000.0, "joined", round=1), event(1030.0, "joined", round=1)]
    assert spent_s(ledger([], {"node0": joined}, 1100.0)) == {"WAITING": 100.0}


def test_a_jump_of_the_wall_clock_within_a_process_changes_nothing() -> None:
    jumped = [{**e, "time_s": e["time_s"] + 3600 * (e["step"] > 10)} for e in FIRST]
    assert ledger(jumped, {}) == ledger(FIRST, {})


def test_a_wall_clock_that_is_set_back_between_attempts_does_not_make_time_negative() -> None:
    back = [{**e, "time_s": e["time_s"] - 3600} for e in SECOND]
    first, second = attempts_of([*FIRST, *back])
    assert first.start_us == second.start_us
    spent_s(ledger([*FIRST, *back], {"node0": NODE0}))


def test_entries_of_a_stale_process_do_not_count_twice() -> None:
    late = of_attempt(1, (1075.0, "log", 50, {"data_s": 1.5}))
    found = ledger([*FIRST, *SECOND, *late], {"node0": NODE0})
    assert found.spent[Heading.PRODUCTIVE] == 35.25 * MICRO
    spent_s(found)


def test_the_journal_of_the_node_with_rank_0_counts() -> None:
    ahead = [{**e, "time_s": e["time_s"] + 500} for e in NODE0]
    assert rounds_of({"node1": ahead, "node0": NODE0}) == rounds_of({"node0": NODE0})
    assert [span.start_us for span in rounds_of({"node1": ahead})] == [1502 * MICRO, 1555 * MICRO]


def test_another_journal_counts_if_the_node_with_rank_0_was_lost() -> None:
    lost = [e for e in NODE0 if e["event"] not in ("round_ended", "ranks_gone")]
    assert rounds_of({"node0": lost, "node1": NODE0}) == rounds_of({"node0": NODE0})
    found = spent_s(ledger([*FIRST, *SECOND], {"node0": lost}))
    assert found["REPLAYED"] == 1041.0 - 1031.0  # nothing is known after the last entry


def test_journals_without_a_monotonic_clock_can_be_read() -> None:
    old = [{key: value for key, value in e.items() if key != "monotonic_s"} for e in FIRST]
    assert ledger(old, {}) == ledger(FIRST, {})


def test_empty_journals_give_an_empty_ledger() -> None:
    for until_s in (None, 1e9):
        empty = ledger([], {}, until_s)
        assert empty.goodput == 0.0
        assert spent_s(empty) == {}


def test_half_a_line_of_a_journal_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    assert read_journal(path) == []
    journal = Journal(path, print)
    journal.write("start", attempt=1, step=0)
    journal.close()
    with path.open("a") as file:
        file.write('{"time_s": 3, "eve')
    assert [e["event"] for e in read_journal(path)] == ["start"]


SECONDS = st.floats(0, 5000, allow_nan=False)
NAMES = (
    "start",
    "first_step",
    "log",
    "save",
    "checkpoint",
    "waited",
    "rollback",
    "save_failed",
    "alarm",
    "done",
)


@st.composite
def of_rank_0(draw: st.DrawFn) -> Entry:
    step = draw(st.integers(0, 50))
    return {
        "time_s": draw(SECONDS),
        "monotonic_s": draw(SECONDS),
        "event": draw(st.sampled_from(NAMES)),
        "attempt": draw(st.integers(1, 4)),
        "step": step,
        "name": f"{step:010d}-0001",
        **draw(
            st.fixed_dictionaries({}, optional={"stall_s": SECONDS, "restore_s": SECONDS, "data_s": SECONDS})
        ),
    }


@st.composite
def of_supervisor(draw: st.DrawFn) -> Entry:
    name = draw(st.sampled_from(["joined", "round", "ranks_started", "round_ended", "ranks_gone"]))
    clocks = {"time_s": draw(SECONDS), "monotonic_s": draw(SECONDS), "event": name}
    nodes = draw(st.permutations(["a", "b"]))
    reason = draw(st.sampled_from(["done", "failed", "leaving", "lost"]))
    number = draw(st.integers(1, 3))
    return {**clocks, "round": number, "nodes": nodes, "reason": reason, "details": {"age_s": draw(SECONDS)}}


@given(
    journal=st.lists(of_rank_0(), max_size=25),
    supervisors=st.dictionaries(st.sampled_from("ab"), st.lists(of_supervisor(), max_size=12)),
    until_s=st.none() | SECONDS,
    alive=st.booleans(),
)
def test_the_ledger_of_arbitrary_journals_sums_to_the_wall_clock_time(
    journal: list[Entry], supervisors: dict[str, list[Entry]], until_s: float | None, alive: bool
) -> None:
    found = ledger(journal, supervisors, until_s, alive)
    assert list(found.spent) == list(MEASURED)
    assert all(us >= 0 for us in found.spent.values())
    assert sum(found.spent.values()) == found.end - found.begin
    assert 0 <= found.goodput <= 1
    for attempt in attempts_of(journal):
        times = [at_us for at_us, _ in attempt.entries]
        assert times == sorted(times)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["log", "log", "log", "log", "save", "evaluation", "start", "stale"]),
            st.integers(1, 20_000_000),
            st.floats(0, 1),
        ),
        max_size=60,
    )
)
def test_an_outline_gives_the_same_ledger(parts: list[tuple[str, int, float]]) -> None:
    """Each part is an event, the us before it, and the share of them spent on data or on the event."""
    at_us, attempt, step, saved, data_s = 1_000_000_000, 1, 0, 0, 0.0
    journal = of_attempt(
        1, (at_us / MICRO, "start", 0, {}), (at_us / MICRO, "first_step", 1, {"data_s": 0.0})
    )
    for kind, took_us, share in parts:
        at_us, step = at_us + took_us, step + 10
        at_s, spent = at_us / MICRO, round(share * took_us / MICRO, 6)
        data_s += spent if kind == "log" else 0.0
        more: dict[str, Any] = {"log": {"data_s": data_s}, "save": {"stall_s": spent}}.get(kind, {})
        if kind == "start":
            attempt, step, data_s = attempt + 1, saved, 0.0
            journal += of_attempt(attempt, (at_s, "start", step, {}))
            journal += of_attempt(attempt, (at_s, "first_step", step + 1, {"data_s": 0.0}))
        elif kind == "stale":  # a process of an earlier attempt logs among the lines of this one
            journal += of_attempt(max(1, attempt - 1), (at_s, "log", step, {"data_s": data_s}))
        else:
            journal += of_attempt(attempt, (at_s, kind, step, more | {"seconds": spent}))
        if kind == "save":
            saved = step
            name = {"name": f"{step:010d}-{attempt:04d}"}
            journal += of_attempt(attempt, (at_s, "checkpoint", step, name))
    with tempfile.NamedTemporaryFile("w") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in journal)
        file.flush()
        outline = read_outline(Path(file.name))
    assert [entry for entry in journal if entry["event"] != "log" or entry in outline] == outline
    for heading, us in ledger(journal, {}).spent.items():
        assert abs(ledger(outline, {}).spent[heading] - us) <= len(journal)


def test_an_outline_drops_log_points_between_log_points(tmp_path: Path) -> None:
    journal = of_attempt(1, (0.0, "start", 0, {}), *((1.0 + i, "log", i, {}) for i in range(50)))
    journal += of_attempt(1, (99.0, "save", 50, {}), *((100.0 + i, "log", 50 + i, {}) for i in range(50)))
    (tmp_path / "j").write_text("".join(json.dumps(entry) + "\n" for entry in journal))
    assert [entry["step"] for entry in read_outline(tmp_path / "j")] == [0, 0, 49, 50, 50, 99]
