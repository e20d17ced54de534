"""What the ranks of the tests in this folder run."""

import os
import sys
from contextlib import ExitStack
from unittest.mock import patch

from dit_scale.checkpoint import saver
from dit_scale.config import TrainConfig
from dit_scale.train import loop
from tests.storm import hasty
from tests.support.ranks.points import Hold, held


def train(config: TrainConfig, hold: Hold | None = None) -> int:
    """Train as one rank with short timeouts; hold rank 0 or its writer at a point if asked."""
    hasty.hurry()
    with ExitStack() as stack:
        if hold and os.environ["RANK"] == "0":
            stack.enter_context(held(hold))
        command = (sys.executable, "-m", "tests.storm.hasty", *saver.WRITER[2:])
        stack.enter_context(patch.object(saver, "WRITER", command))
        return loop.train(config)
