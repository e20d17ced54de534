"""The laws of the documents: README, CONTRIBUTING and docs/ match the code."""

import re
from pathlib import Path

import pytest

from tests.architecture.source import ROOT
from tests.architecture.test_layers import LAYERS

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
PRESENT = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
"""Documents that describe the project as it is now."""


def test_the_tree_in_the_readme_shows_every_part_in_the_order_of_the_layers() -> None:
    tree = (
        (ROOT / "README.md").read_text().partition("    dit_scale/\n")[2].partition("    data_pipeline/")[0]
    )
    shown = re.findall(r"^ {6}(\w+(?:\.py|/)(?: {2}\w+(?:\.py|/))*)", tree, re.MULTILINE)
    parts = [name.removesuffix(".py").rstrip("/") for row in shown for name in row.split()]
    assert [part for part in parts if part != "configs"] == list(LAYERS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    named = re.findall(
        r"`((?:benchmarks|cluster|configs|data_pipeline|demo|dit_scale|docs|tests)/[\w./-]+)`",
        path.read_text(),
    )
    assert [name for name in named if not (ROOT / name).exists() and "NAME" not in name] == []


def test_the_glossary_is_sorted_and_defines_each_term_once() -> None:
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs/glossary.md").read_text(), re.MULTILINE)[2:]
    assert rows == sorted(set(rows), key=str.lower)
