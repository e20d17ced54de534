"""The last message of a run that gives up: it says what is known, and blames no samples outside of steps."""

import itertools
from typing import Any

import pytest

from dit_scale.elastic.board import Ending, Reason
from dit_scale.elastic.giving_up import failed_step, why
from dit_scale.heartbeat import Phase

HEAD = "giving up after 3 consecutive failures without a"
TAIL = "Fix the cause, then run the same command again"


def ending(**details: Any) -> Ending:
    return Ending(3, Reason.FAILED, "n1", "it broke", details=details)


@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.name)
def test_samples_are_reported_only_for_failures_within_a_step(phase: Phase) -> None:
    expected = 7 if phase in (Phase.DATA, Phase.COMPUTE, Phase.AGREE) else None
    assert failed_step(ending(rank=0, step=7, section=phase.name)) == expected


@pytest.mark.parametrize(
    ("details", "committed", "text"),
    [
        ({}, -1, "first checkpoint. The last failure was on node n1: it broke."),
        (
            {"rank": 4, "step": 0, "section": "START"},
            20,
            "checkpoint newer than step 20. The last failure was on node n1, rank 4, while starting: it "
            "broke.",
        ),
        (
            {"rank": 4, "step": 25, "section": "COMPUTE"},
            20,
            "checkpoint newer than step 20. The last failure was on node n1, rank 4, while computing a step "
            "after step 25: it broke. Samples of that step: 1, 2.",
        ),
        (
            {"rank": 4, "step": 25, "section": "WAIT_SAVE"},
            20,
            "checkpoint newer than step 20. The last failure was on node n1, rank 4, while saving after step "
            "25: it broke.",
        ),
        (
            {"rank": 4, "step": 0, "section": ""},
            -1,
            "first checkpoint. The last failure was on node n1, rank 4: it broke.",
        ),
    ],
    ids=["unknown", "start", "step", "save", "no heartbeat"],
)
def test_the_message(details: dict[str, Any], committed: int, text: str) -> None:
    last = ending(**details)
    samples = [1, 2] if failed_step(last) is not None else []
    assert why(3, committed, last, samples) == f"{HEAD} {text} {TAIL}"


def test_what_is_unknown_is_left_out() -> None:
    """Every combination of known and unknown rank, step and phase, null or missing."""
    phases = (*(phase.name for phase in Phase), "", None, "A_LATER_PHASE")
    for rank, step, phase in itertools.product((0, None), (0, 7, None), phases):
        known = {"rank": rank, "step": step, "section": phase}
        present = {key: value for key, value in known.items() if value is not None}
        for details in (known, present):
            message = why(3, -1, ending(**details), [])
            assert "None" not in message
            assert ("rank 0" in message) == (rank is not None)
            assert ("step 7" in message) == (step == 7 and phase in Phase.__members__)
            assert failed_step(ending(**details)) in (step, None)
