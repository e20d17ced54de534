"""Read equivalent.txt, the list of mutants without an observable effect, one paragraph each:

    file, function or class
    - original line
    + mutated line
    reason

Both lines have the format of the report. Lines that start with # are comments.
"""

import re
from pathlib import Path

Name = tuple[str, str, str, str]
"""(file, definition, original line, mutated line) of a mutant."""

LIST = Path(__file__).with_name("equivalent.txt")
_ENTRY = re.compile(r"(\S+),(?: (\S+))?\n- ([^\n]*)\n\+ ?([^\n]*)\n(\S.*)", re.DOTALL)


def read(text: str) -> dict[Name, str]:
    """Return the reason by mutant. Raises ValueError that quotes an invalid paragraph."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    reasons: dict[Name, str] = {}
    for paragraph in filter(None, (part.strip() for part in "\n".join(lines).split("\n\n"))):
        match = _ENTRY.fullmatch(paragraph)
        if match is None:
            raise ValueError(f"expected file, definition / - line / + line / reason, got:\n{paragraph}")
        file, definition, removed, added, reason = match.groups(default="")
        reasons[file, definition, removed, added] = reason
    return reasons
