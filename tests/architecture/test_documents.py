"""The laws of the documents: README, CONTRIBUTING and docs/ match the code and each other."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.architecture.source import PACKAGES, ROOT, parse, sources
from tests.architecture.test_layers import LAYERS
from tests.support.documents import DOCUMENTS, FENCE, inline_code

PRESENT = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
"""Documents that describe the project as it is now."""


def test_the_tree_shows_every_part_in_the_order_of_the_layers() -> None:
    tree = (
        (ROOT / "docs/architecture.md")
        .read_text()
        .partition("    dit_scale/\n")[2]
        .partition("    data_pipeline/")[0]
    )
    shown = re.findall(r"^ {6}(\w+(?:\.py|/)(?: {2}\w+(?:\.py|/))*)", tree, re.MULTILINE)
    parts = [name.removesuffix(".py").rstrip("/") for row in shown for name in row.split()]
    assert [part for part in parts if part != "configs"] == list(LAYERS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", FENCE.sub("", path.read_text()))
    local = [(path.parent / link if link else path, anchor) for link, anchor in links if "://" not in link]
    assert [link for link, _ in local if not link.exists()] == []
    assert [(link.name, anchor) for link, anchor in local if anchor and anchor not in headings(link)] == []


@cache
def headings(path: Path) -> frozenset[str]:
    """Return the anchors of a document, as GitHub and MkDocs make them from its headings."""
    found = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text()), re.MULTILINE)
    slugs = [re.sub(r"[^\w -]", "", re.sub(r"\]\([^)]*\)", "", text)).lower() for text in found]
    slugs = [slug.strip().replace(" ", "-") for slug in slugs]
    assert [slug for slug, count in Counter(slugs).items() if "--" in slug or count > 1] == []
    return frozenset(slugs)


def test_the_site_has_all_pages() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {
        name for section in yaml.safe_load(text)["nav"] for part in section.values() for name in _files(part)
    }
    from_root = {"index.md", "contributing.md", "changelog.md"}
    assert pages == from_root | {path.name for path in (ROOT / "docs").glob("*.md")}


def _files(entries: list[dict[str, str]]) -> list[str]:
    return [name for entry in entries for name in entry.values()]


def test_the_runbook_quotes_messages_of_the_program() -> None:
    """Each part of a quoted message between `...` is in a string of the source."""
    texts = "\n".join(_strings())
    text = (ROOT / "docs" / "runbook.md").read_text()
    symptoms = re.findall(r"^\*\*You see(.*?)(?=^\*\*It means)", text, re.MULTILINE | re.DOTALL)
    assert len(symptoms) > 15
    quoted = [code for symptom in symptoms for _, code in inline_code(symptom) if " " in code]
    parts = [part for code in quoted for part in re.split(r"\.\.\.", code) if len(part.strip(" .:;,()")) > 3]
    assert [part for part in parts if part.strip(" .:;,()") not in texts] == []


def test_the_runbook_has_an_entry_for_each_alert() -> None:
    groups = yaml.safe_load((ROOT / "cluster/monitoring/alerts.yml").read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"]]
    text = (ROOT / "docs" / "runbook.md").read_text()
    assert alerts
    assert [alert for alert in alerts if f"`{alert}`" not in text] == []


@cache
def _strings() -> tuple[str, ...]:
    """Return the strings of the source, with a line break where an f-string inserts a value."""
    found = []
    for path in sources(*PACKAGES):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "\n" for part in node.values]
                found.append("".join(map(str, parts)))
    return tuple(found)


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
