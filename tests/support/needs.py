"""What a test needs beyond the packages of this project: without it, it skips and says so, or fails.

`DIT_SCALE_REQUIRE_ALL=1` makes a missing component a failure: nothing may go untested unnoticed there.
"""

import os

import pytest


def needs(there: bool, what: str) -> None:
    """Go on only if it is there."""
    if not there:
        if os.environ.get("DIT_SCALE_REQUIRE_ALL") == "1":
            pytest.fail(f"missing: {what}")
        pytest.skip(f"needs {what}")
