"""Long reads and long waits of a rank that gets on are told from those of one that does not: it beats."""

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


def test_a_restore_beats_for_each_tensor_and_a_wait_for_a_commit_for_each_vote(tmp_path: Path) -> None:
    config = config_of(tmp_path, steps=3)
    (first,) = run(1, beats_of, config)
    # There was nothing to read; then it waited for the claim, which beats for each try.
    assert (first[Phase.RESTORE], first[Phase.RESTORED]) == (2, 1)
    assert first[Phase.WAIT_SAVE] > 2

    (second,) = run(1, beats_of, config.model_copy(update={"steps": 4}))
    assert second[Phase.RESTORE] > 100
    assert second[Phase.RESTORED] == 2


def beats_of(config: TrainConfig) -> Counter[Phase]:
    """How often a rank beats in each section of a run."""
    counts = Counter[Phase]()

    def beat(heart: Heart, section: Phase, step: int) -> None:
        counts[section] += 1

    with patch.object(Heart, "beat", beat):
        assert loop.train(config) == 0
    return counts
