"""Pictures, vendored files and colours of the page of `dit-scale report`."""

import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from dit_scale.config import TrainConfig
from dit_scale.report.page.document import FOLDER
from dit_scale.report.page.pictures import chosen, grids_of, spread
from dit_scale.train.run_folder import evaluation_grid
from tests.support.report_runs import write_grid

ODD = "0.5/\u00e4 [b] %2e\n"


def test_the_newest_the_best_and_the_first_picture_are_kept(tmp_path: Path) -> None:
    for step in range(0, 600, 10):
        write_grid(str(tmp_path), step)
    (tmp_path / "evaluations" / "0000000600.paper.png").write_bytes(b"half a picture")
    for stranger in ("other.png", "0000000700.png", "ten.paper.png"):
        (tmp_path / "evaluations" / stranger).write_bytes(b"")
    path = evaluation_grid(TrainConfig(run=str(tmp_path)), 0, ODD)
    path.touch()
    assert grids_of(tmp_path)[ODD] == {0: path}
    grids = grids_of(tmp_path)["paper"]
    assert list(grids) == list(range(0, 610, 10))
    size = len(chosen({590: grids[590]}, [], 10**9)[0].uri)
    pictures = chosen(grids, [170], 14 * size)
    steps = [picture.step for picture in pictures]
    assert {0, 170, 590} <= {*steps}
    assert 11 <= len(steps) <= 15
    assert max(np.diff(steps)) <= 3 * 50
    assert sum(len(picture.uri) for picture in pictures) <= 14 * size


def test_a_tiny_budget_makes_pictures_smaller_and_then_fewer(tmp_path: Path) -> None:
    for step in (0, 10, 20):
        write_grid(str(tmp_path), step, side=512)
    grids = grids_of(tmp_path)["paper"]
    whole = chosen(grids, [], 10**9)
    assert [picture.width for picture in whole] == [512] * 3
    smaller = chosen(grids, [], sum(len(picture.uri) for picture in whole) // 4)
    assert [picture.step for picture in smaller] == [0, 10, 20]
    assert smaller[0].width < 512
    assert [picture.step for picture in chosen(grids, [], len(smaller[0].uri) // 4)] in ([20], [])


@pytest.mark.parametrize("count", range(8))
def test_steps_are_spread_evenly_with_both_ends(count: int) -> None:
    found = spread(list(range(0, 100, 10)), count)
    assert len(found) == count == len(set(found))
    assert found[-1:] == [90][:count]
    assert count < 2 or found[0] == 0


def test_the_vendored_charts_are_those_of_the_registry() -> None:
    """`make vendor` fetches them; the digests are those of uplot 1.6.32."""
    digests = {path.name: sha256(path.read_bytes()).hexdigest() for path in (FOLDER / "vendor").iterdir()}
    assert digests == {
        "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    }
    assert "(v1.6.32)" in (FOLDER / "vendor" / "uPlot.iife.min.js").read_text()[:100]


def luminance(colour: str) -> float:
    """Return the relative luminance of #rrggbb by WCAG 2."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1])
def test_lines_and_texts_have_contrast(theme: int) -> None:
    """3:1 for lines and marks, 4.5:1 for texts (WCAG 2.2, AA)."""
    css = (FOLDER / "page.css").read_text()
    colours = dict(re.findall(r"--(\w+): (#\w{6});", re.findall(r":root[^{]*{([^}]*)}", css)[theme]))
    limits = {"text": 4.5, "muted": 4.5, "accent": 4.5, "bad": 3.0, "good": 3.0, "warn": 3.0}
    limits |= {f"s{number}": 3.0 for number in range(8)}
    for ground in ("card", "bg"):
        for name, limit in limits.items():
            dark, light = sorted(luminance(colours[one]) for one in (name, ground))
            assert (light + 0.05) / (dark + 0.05) >= limit, (name, ground)
