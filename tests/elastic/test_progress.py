"""A rank that makes progress in long reads and waits sends heartbeats meanwhile."""

from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest

from dit_scale.config import TrainConfig
from dit_scale.heartbeat import Heart, Phase
from dit_scale.train import loop
from tests.support.nodes.nodes import config_of
from tests.support.ranks.processes import run

pytestmark = pytest.mark.dist


def test_there_is_a_heartbeat_for_each_restored_tensor_and_for_each_vote_on_a_commit(tmp_path: Path) -> None:
    config = config_of(tmp_path, steps=3)
    (first,) = run(1, beats_of, config)
    # There was nothing to restore. Then it waited for its claim, with a heartbeat for each try.
    assert (first[Phase.RESTORE], first[Phase.RESTORED]) == (2, 1)
    assert first[Phase.WAIT_SAVE] > 2

    (second,) = run(1, beats_of, config.model_copy(update={"steps": 4}))
    assert second[Phase.RESTORE] > 100
    assert second[Phase.RESTORED] == 2


def beats_of(config: TrainConfig) -> Counter[Phase]:
    """Number of heartbeats in each phase of a run."""
    counts = Counter[Phase]()

    def beat(heart: Heart, phase: Phase, step: int) -> None:
        counts[phase] += 1

    with patch.object(Heart, "beat", beat):
        assert loop.train(config) == 0
    return counts
