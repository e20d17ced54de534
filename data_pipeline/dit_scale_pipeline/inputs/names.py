"""Names of files and folders: which are ignored by every input, and how messages show them."""

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
"""Files and folders that file managers, file systems and network disks create, in lower case."""
_OTHER_KIND = re.compile(
    r".*[.](arrow|avi|csv|db|h5|hdf5|html|ini|json|jsonl|log|mat|md|mdb|mkv|mov|mp4|npy|npz|pdf|pickle|pkl|pt"
    r"|pth|py|safetensors|sh|tfrecord|txt|webm|xml|xmp|yaml|yml)",
    re.DOTALL | re.IGNORECASE,
)
"""Names of files that are not images, although they accompany images. Other files are checked by content."""
MAX_SHOWN = 5
"""Names that a message lists before it counts the rest."""


def is_hidden(name: str) -> bool:
    """Whether every kind of input ignores a file or folder of this name, or a tar of that folder."""
    return name.startswith(".") or name.lower().removesuffix(".tar") in _SYSTEM


def hidden_part(path: str) -> str:
    """Return the path up to its first hidden component, with a slash if that is a folder; empty if none "
    "is."""
    parts = path.split("/")
    for depth, part in enumerate(parts, 1):
        if is_hidden(part):
            return "/".join(parts[:depth]) + ("/" if depth < len(parts) else "")
    return ""


def is_not_image(name: str) -> bool:
    """Whether the name rules out an image, such as that of an annotation or a caption."""
    return _OTHER_KIND.fullmatch(name) is not None


def printable(name: str) -> str:
    """Return a name as one line of text; escape control characters and bytes that are not UTF-8."""
    return "".join(map(_printable, name))


def few(names: Iterable[str]) -> str:
    """List the first names and count the rest."""
    listed = list(names)
    more = f" and {len(listed) - MAX_SHOWN} more" if len(listed) > MAX_SHOWN else ""
    return ", ".join(map(printable, listed[:MAX_SHOWN])) + more


def is_utf8(name: str) -> bool:
    """Whether a name can be encoded as UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def to_utf8(name: str) -> str:
    """Return a name that UTF-8 can encode: the name itself, or else its printable form."""
    return name if is_utf8(name) else printable(name)


def _printable(letter: str) -> str:
    if letter.isprintable():
        return letter
    # Python decodes a byte that is not UTF-8 to a surrogate.
    return f"\\x{ord(letter) - 0xDC00:02x}" if "\udc80" <= letter <= "\udcff" else ascii(letter)[1:-1]
