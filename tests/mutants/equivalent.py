"""The list of mutants that change nothing that anyone could see: equivalent.txt, a paragraph for each.

    file, function or class
    - the line as it is
    + the line as the mutant has it
    the reason

Both lines are as a report prints them. Lines that begin with # are comments.
"""

import re
from pathlib import Path

Name = tuple[str, str, str, str]
"""Of a mutant: file, definition, the line as it is, the line as the mutant has it."""

LIST = Path(__file__).with_name("equivalent.txt")
_ENTRY = re.compile(r"(\S+),(?: (\S+))?\n- ([^\n]*)\n\+ ?([^\n]*)\n(\S.*)", re.DOTALL)


def read(text: str) -> dict[Name, str]:
    """The reason of each. Raises ValueError that quotes a paragraph which it cannot read."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    reasons: dict[Name, str] = {}
    for paragraph in filter(None, (part.strip() for part in "\n".join(lines).split("\n\n"))):
        match = _ENTRY.fullmatch(paragraph)
        if match is None:
            raise ValueError(f"expected file, definition / - line / + line / reason, got:\n{paragraph}")
        file, definition, removed, added, reason = match.groups(default="")
        reasons[file, definition, removed, added] = reason
    return reasons
