"""How a command reports an error: one line on the screen, and the traceback in a file if it may be a bug.

A mistake of the user, such as a missing file, explains itself. Any other error may be a bug, and a bug report
needs its traceback. That goes to RUN/errors if the command works on a run. Otherwise it goes to a temporary
file if the user sits at a terminal, and to standard error if that is a log.
"""

import argparse
import errno
import os
import re
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

from dit_scale.cli.arguments import USER_ERROR_EXIT_CODE
from dit_scale.cli.versions import version_report
from dit_scale.errors import DitScaleError

TRACEBACK_VARIABLE = "DIT_SCALE_TRACEBACK"
"""Environment variable; if it is set, the traceback of every error is printed as well."""
FOLDER = "errors"
"""The folder of tracebacks in a run folder."""
MISTAKES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
"""Errors of the operating system that the user can fix, if they name a file."""
MAX_MESSAGE = 300
"""Characters of an error's message on the screen."""
MAX_NOISE = 120
"""Characters of a message that says only that another rank does not respond."""
ERASE_LINE = "\r\x1b[K"
"""Erases the current line of a terminal."""
_FOREIGN_PLACE = re.compile(r"\[\S+\.(cc|cpp|h):\d+\] ")
"""Place in foreign source code, at the start of messages of gloo."""
MEMORY = {
    "dit-scale train": "lower engine.micro_batch, set engine.memory_gib to the memory of one device, or set "
    "engine.activation_checkpointing=block; `--dry-run` estimates what a step needs",
    "dit-scale encode": "lower vae_batch",
    "dit-scale sample": "lower --tile",
    "dit-scale evaluate": "lower --tile",
}
"""What to do when memory is exhausted, by command."""


def report(error: Exception, args: argparse.Namespace) -> int:
    """Report the error of a command and return its exit code: 2 for a mistake of the user, otherwise 1."""
    text = "".join(traceback.format_exception(error))
    line = _explanation(error)
    is_mistake = line is not None
    place = "" if is_mistake else _keep(text, args)
    if os.environ.get(TRACEBACK_VARIABLE) or not (is_mistake or place):
        sys.stderr.write(text)
    if line is None:
        rank = f"rank {os.environ['RANK']}: " if os.environ.get("RANK") else ""
        known = _cause(error, args.name)
        line = rank + (known or f"{_error(error)}. If this looks like a bug, report it with its traceback")
        if place:
            line += f". {'Details' if known else 'Traceback'}: {place}"
    # On a terminal, the bar of another rank may be in this line.
    print(f"{ERASE_LINE if sys.stderr.isatty() else ''}{args.name}: {line}", file=sys.stderr, flush=True)
    return USER_ERROR_EXIT_CODE if is_mistake else 1


def _explanation(error: Exception) -> str | None:
    """Return the message of a mistake of the user; None for any other error."""
    if isinstance(error, MISTAKES) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, DitScaleError) else None


def _keep(text: str, args: argparse.Namespace) -> str:
    """Write a traceback to a file and return its path; empty if there is no place for it."""
    run = _run_folder(args)
    if not run and not sys.stderr.isatty():
        return ""
    rank = os.environ.get("RANK", "")
    name = f"rank{rank}" if rank else args.name.replace(" ", "-")
    now = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    head = f"{args.name}\n{version_report()}\n\n"
    with suppress(OSError):  # for example on the full disk that is the error
        folder = Path(run) / FOLDER if run else Path(tempfile.mkdtemp(prefix="dit-scale-"))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{now}-{name}.txt"
        with path.open("a") as file:
            file.write(head + text)
        return str(path)
    return ""


def _run_folder(args: argparse.Namespace) -> str:
    """Return the run folder that a command works on; empty if there is none."""
    if folder := getattr(args, "run_folder", ""):  # a run that may not have a folder yet
        return str(folder)
    for name in ("run", "source"):
        folder = getattr(args, name, None)
        if folder and (Path(folder) / "config.yaml").is_file():
            return str(folder)
    return ""


def _cause(error: Exception, command: str) -> str | None:
    """Return what happened and what to do about it; None for an error without a known cause."""
    if advice := _advice(error, command):
        return f"{_error(error)}. {advice}"
    from dit_scale.elastic.node.rank import is_second_hand

    if is_second_hand(error):
        return (
            "another rank has exited, and this rank cannot continue without it: see what that rank printed. "
            f"The same command resumes. ({type(error).__name__}: {_message(error)[:MAX_NOISE]})"
        )
    return _error(error) if isinstance(error, OSError) and error.filename is not None else None


def _advice(error: Exception, command: str) -> str:
    """Return what to do about exhausted memory, disks and ports; empty for other errors."""
    text, code = str(error), error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return f"To use less memory, {MEMORY[command]}" if command in MEMORY else "It needs more memory"
    if code == errno.EADDRINUSE or "EADDRINUSE" in text:
        return "Another process uses this port: pass another one, for example `deepspeed --master_port`"
    if code in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space, then run the same command again"
    return ""


def _error(error: Exception) -> str:
    """Return type, message and place of an error."""
    place = _place_in(error)
    return f"{type(error).__name__}: {_message(error)}" + (f" ({place})" if place else "")


def _message(error: Exception) -> str:
    """Return the line of a message that says most: the last one if it quotes a traceback, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    quotes = any(line.startswith('File "') for line in lines)
    chosen = lines[-1 if quotes else 0] if lines else ""
    return _FOREIGN_PLACE.sub("", chosen)[:MAX_MESSAGE].rstrip(".")


def _place_in(error: Exception) -> str:
    """Return file and line of the innermost frame of this project; empty if there is none."""
    loaded = [sys.modules[name] for name in ("dit_scale", "dit_scale_pipeline") if name in sys.modules]
    roots = [Path(module.__file__).parent for module in loaded if module.__file__]
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        for root in roots:
            if Path(frame.filename).is_relative_to(root):
                return f"{Path(frame.filename).relative_to(root.parent)}:{frame.lineno}"
    return ""
