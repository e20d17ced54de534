"""The benchmark of the report prints how large a page is, and makes a picture of it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.support.needs import needs


def test_it_measures_a_page_and_makes_a_picture(tmp_path: Path) -> None:
    needs(shutil.which("chromium") is not None, "chromium (apt-get install chromium)")
    picture = tmp_path / "page.png"
    command = [sys.executable, "-m", "benchmarks.report", "--smoke", "--picture", str(picture)]
    row = json.loads(subprocess.check_output(command, text=True))
    assert row["rows"] == 2000
    assert 0.1 < row["megabytes"] < 2
    assert 0 < row["drawn_after_ms"] <= row["longest_ms"]
    with Image.open(picture) as image:
        assert image.width == 1440
