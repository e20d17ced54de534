"""docs/commands.md matches the parser."""

import re
from pathlib import Path

from dit_scale import cli
from tests.support.commands_page import page

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.support.commands_page > docs/commands.md"


def test_every_command_has_a_section() -> None:
    headings = re.findall(r"^### dit-scale (.+)$", PAGE.read_text(), re.MULTILINE)
    assert headings == list(cli._parser()[1])
