"""docs/commands.md matches the parser."""

from pathlib import Path

from dit_scale import cli
from tests.support.commands_page import page

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run python -m tests.support.commands_page > docs/commands.md"


def test_every_command_has_a_section() -> None:
    headings = [line[4:] for line in PAGE.read_text().splitlines() if line.startswith("### ")]
    assert headings == list(cli._parser()[1])
