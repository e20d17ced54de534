"""Names of files and folders: which of them no input takes, and how they are shown to people."""

import re
from collections.abc import Iterable

_SYSTEM = frozenset(
    (
        "#recycle",
        "$recycle.bin",
        "@eadir",
        "__macosx",
        "desktop.ini",
        "lost+found",
        "system volume information",
        "thumbs.db",
    )
)
"""What file managers, file systems and network disks leave among the files of their users, in lower case."""
_OTHER_KIND = re.compile(
    r".*[.](arrow|avi|csv|db|h5|hdf5|html|ini|json|jsonl|log|mat|md|mdb|mkv|mov|mp4|npy|npz|pdf|pickle|pkl|pt"
    r"|pth|py|safetensors|sh|tfrecord|txt|webm|xml|xmp|yaml|yml)",
    re.DOTALL | re.IGNORECASE,
)
"""Names of files that lie among images and are none. What another file is, its bytes tell."""
SHOWN = 5
"""Names that a message shows before it says how many more there are."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name, or its tar, is no class and no sample in any kind of input."""
    return name.startswith(".") or name.lower().removesuffix(".tar") in _SYSTEM


def hidden_part(path: str) -> str:
    """A path up to its first hidden name, with a slash if that is a folder; empty when nothing is hidden."""
    parts = path.split("/")
    for depth, part in enumerate(parts, 1):
        if is_hidden(part):
            return "/".join(parts[:depth]) + ("/" if depth < len(parts) else "")
    return ""


def is_other_kind(name: str) -> bool:
    """Whether a file is no image by its name, such as the boxes and captions that lie beside images."""
    return _OTHER_KIND.fullmatch(name) is not None


def shown(name: str) -> str:
    """A name as one line of text: control characters and bytes that are not UTF-8 are escaped."""
    return "".join(map(_shown, name))


def few(names: Iterable[str]) -> str:
    """The first names of many, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(map(shown, listed[:SHOWN])) + more


def is_text(name: str) -> bool:
    """Whether a name can be written as UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def as_text(name: str) -> str:
    """A name as UTF-8 can write it: itself, where it can."""
    return name if is_text(name) else shown(name)


def _shown(letter: str) -> str:
    if letter.isprintable():
        return letter
    # Python reads a byte that is not UTF-8 as a surrogate.
    return f"\\x{ord(letter) - 0xDC00:02x}" if "\udc80" <= letter <= "\udcff" else ascii(letter)[1:-1]
