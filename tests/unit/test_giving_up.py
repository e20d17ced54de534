"""What a person is told when a run gives up: no samples are blamed for what happened outside of steps."""

from typing import Any

import pytest

from dit_scale.elastic.board import Ending, Reason
from dit_scale.elastic.giving_up import failed_step, why
from dit_scale.heartbeat import Phase


def ending(**details: Any) -> Ending:
    return Ending(3, Reason.FAILED, "n1", "it broke", -1, details)


@pytest.mark.parametrize("section", Phase, ids=lambda section: section.name)
def test_samples_belong_to_steps_alone(section: Phase) -> None:
    expected = 7 if section in (Phase.DATA, Phase.COMPUTE, Phase.AGREE) else None
    assert failed_step(ending(rank=0, step=7, section=section.name)) == expected


@pytest.mark.parametrize(
    ("details", "committed", "said"),
    [
        ({}, -1, "without a first checkpoint: no further try. The last one was on n1: it broke."),
        (
            {"rank": 4, "step": 0, "section": "START"},
            20,
            "without a checkpoint newer than step 20: no further try. The last one was of rank 4 on n1 while "
            "it started: it broke.",
        ),
        (
            {"rank": 4, "step": 25, "section": "COMPUTE"},
            20,
            "without a checkpoint newer than step 20: no further try. The last one was of rank 4 on n1 after "
            "step 25: it broke. The samples of the step that it was in: 1, 2.",
        ),
        (
            {"rank": 4, "step": 25, "section": "WAIT_SAVE"},
            20,
            "without a checkpoint newer than step 20: no further try. The last one was of rank 4 on n1 while "
            "it saved step 25: it broke.",
        ),
    ],
    ids=["nobody knows", "start", "step", "save"],
)
def test_the_words(details: dict[str, Any], committed: int, said: str) -> None:
    last = ending(**details)
    samples = [1, 2] if failed_step(last) is not None else []
    expected = f"3 failures in a row {said} Mend the cause, then start the same command again"
    assert why(3, committed, last, samples) == expected
