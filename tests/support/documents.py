"""Commands in the documents: code blocks and inline code of Markdown, comments at the top of files."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")))
HEADERS = (
    *sorted((ROOT / "configs").glob("*.yaml")),
    *sorted(path for path in (ROOT / "cluster").rglob("*") if path.suffix in (".sh", ".yaml", ".yml")),
)
"""Files whose first comment shows commands."""
PROGRAMS = ("dit-scale", "deepspeed", "ray", "sbatch", "kubectl", "python", "bash", "make", "pytest", "pip")
"""Programs whose arguments are checked."""
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("sh", "bash", "console")
SEPARATORS = {"&&", "||", ";", "|", "&"}
WRAPPERS = {"timeout": re.compile(r"\d+[smh]?"), "nohup": None, "do": None, "exec": None}
"""Programs that run another one => the last word of their own, if they take any."""


@dataclass(frozen=True)
class Command:
    """One command of a document."""

    place: str
    """File and line."""
    words: tuple[str, ...]
    inline: bool
    """Whether it stands within a sentence, where it may be shortened."""

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


def commands(path: Path) -> list[Command]:
    """Return the commands of PROGRAMS in a document, or in the comment at the top of another file."""
    text = path.read_text()
    if path.suffix != ".md":
        return [*_in_lines(path, _header(text), inline=False)]
    blocks = [*_in_lines(path, "\n".join(_code_lines(text)), inline=False)]
    return blocks + [*_in_sentences(path, text)]


def shell_blocks(path: Path) -> list[str]:
    """Return the fenced shell blocks of a document, in order."""
    return [body for language, body in FENCE.findall(path.read_text()) if language in SHELL]


def inline_code(text: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of the inline code of a document; it may continue on the next line."""
    prose = FENCE.sub(lambda match: "\n" * match[0].count("\n"), text)
    for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", prose):
        yield prose.count("\n", 0, match.start()) + 1, " ".join(match[1].split())


def _code_lines(text: str) -> Iterator[str]:
    """Yield the lines of a Markdown text, empty unless they belong to a code block that may hold commands."""
    fence, was_code, was_empty = "", False, True
    for line in text.split("\n"):
        if line.startswith("```"):
            fence = "" if fence else line[3:] or "text"
            yield ""
        elif fence:
            yield line if fence in SHELL else ""
        else:
            is_code = line.startswith("    ") and (was_code or was_empty)
            yield line[4:] if is_code else ""
            was_code, was_empty = is_code or (was_code and not line.strip()), not line.strip()


def _header(text: str) -> str:
    """Return the comment at the top of a file without its marks; the lines keep their numbers."""
    comment = re.match(r"(#.*\n|\n)*", text)
    lines = comment[0].split("\n") if comment else []
    return "\n".join(line[4:] if line.startswith("#   ") else "" for line in lines)


def _in_lines(path: Path, text: str, inline: bool) -> Iterator[Command]:
    lines = text.split("\n")
    number = 0
    while number < len(lines):
        first, whole = number, lines[number]
        while whole.rstrip().endswith("\\") and number + 1 < len(lines):
            number += 1
            whole = whole.rstrip()[:-1] + " " + lines[number].strip()
        number += 1
        yield from _of_line(f"{path.relative_to(ROOT)}:{first + 1}", whole, inline)


def _in_sentences(path: Path, text: str) -> Iterator[Command]:
    for line, code in inline_code(text):
        if code.split()[0] in PROGRAMS:
            yield from _of_line(f"{path.relative_to(ROOT)}:{line}", code.replace("\\|", "|"), inline=True)


def _of_line(place: str, line: str, inline: bool) -> Iterator[Command]:
    """Yield the commands of one shell line: what stands between `&&`, pipes and redirections."""
    # a remark behind the command, or the case that it is for in front of it
    line = re.sub(r"\s{2,}\(.*\)$", "", line)
    line = re.sub(rf"^\S.*?\s{{2,}}(?=(?:{'|'.join(PROGRAMS)}) )", "", line)
    if re.search(r"\s\[", line):  # a synopsis
        return
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError:  # an apostrophe: a sentence, not a command
        return
    words: list[str] = []
    for token in [*tokens, ";"]:
        if token not in SEPARATORS:
            words.append(token)
            continue
        words = _own_words(words)
        if words and words[0] in PROGRAMS:
            yield Command(place, tuple(words), inline)
        words = []


def _own_words(words: list[str]) -> list[str]:
    """Return a command without variables in front of it, programs that run it, and redirections."""
    while words and (re.fullmatch(r"\w+=.*", words[0]) or words[0] in WRAPPERS or words[0] == "$"):
        last = WRAPPERS.get(words[0])
        end = next((i for i, word in enumerate(words) if last.fullmatch(word)), 0) if last else 0
        words = words[end + 1 :]
    kept, skip = [], False
    for word in words:
        if re.fullmatch(r"[<>]+", word):
            if kept and kept[-1].isdecimal():
                kept.pop()
            skip = True
        elif skip:
            skip = False
        elif word != "...":
            kept.append(word)
    return kept
