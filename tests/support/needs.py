"""Components that a test needs beyond this project's packages: without one, it skips or fails.

`DIT_SCALE_REQUIRE_ALL=1` turns a missing component into a failure, so that no test is left out unnoticed.
"""

import os

import pytest


def needs(there: bool, what: str) -> None:
    """Continue only if the component is there."""
    if not there:
        if os.environ.get("DIT_SCALE_REQUIRE_ALL") == "1":
            pytest.fail(f"missing: {what}")
        pytest.skip(f"needs {what}")
