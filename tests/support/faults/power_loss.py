"""What a POSIX file system may contain after a power loss.

It promises only this: the bytes of a file are durable once fsync of the file returned, and names once fsync
of their folder returned. Any part of all later changes may survive, in any order: a prefix of the bytes, or
zeros in their place; for a folder, any subset of the changes to it, with renames complete or absent. A
surviving name leads to its file, however little of the file survived.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.support.faults.recorder import Call

Tree = dict[str, bytes | None]
"""Path => content of a file; None for a folder."""

_EXHAUSTIVE = 5
"""Up to this many changes that are not durable, try all subsets."""


@dataclass(eq=False)
class File:
    durable: bytes = b""
    later: bytes = b""
    """Bytes written since, after the durable ones."""


@dataclass(eq=False)
class Folder:
    durable: dict[str, "File | Folder"] = field(default_factory=dict)
    later: list[dict[str, "File | Folder | None"]] = field(default_factory=list)
    """Changes since: each sets or removes names."""

    def now(self) -> dict[str, "File | Folder"]:
        """The names as running processes see them."""
        return self.after(self.later)

    def after(self, changes: list[dict[str, "File | Folder | None"]]) -> dict[str, "File | Folder"]:
        names: dict[str, File | Folder | None] = {**self.durable}
        for change in changes:
            names.update(change)
        return {name: node for name, node in names.items() if node is not None}


class Disk:
    """A file system under a sequence of calls."""

    def __init__(self) -> None:
        self.root = Folder()
        self._files: dict[int, File] = {}
        self._folders = [self.root]

    def apply(self, call: Call) -> None:
        """Apply a call."""
        folder, name = self._split(call.path)
        if call.kind == "create":
            self._files[call.file] = File()
            folder.later.append({name: self._files[call.file]})
        elif call.kind == "write":
            self._files[call.file].later += call.data
        elif call.kind == "sync":
            file = self._files[call.file]
            file.durable, file.later = file.durable + file.later, b""
        elif call.kind == "mkdir":
            self._folders.append(Folder())
            folder.later.append({name: self._folders[-1]})
        elif call.kind == "sync folder":
            synced = self._find(call.path)
            assert isinstance(synced, Folder)
            synced.durable, synced.later = synced.now(), []
        elif call.kind in ("unlink", "rmdir"):
            folder.later.append({name: None})
        else:
            target, new_name = self._split(call.target)
            assert target is folder, "a rename from folder to folder is two changes here"
            taken = {name: None} if call.kind == "rename" else {}
            folder.later.append({**taken, new_name: folder.now()[name]})

    def tree(self) -> Tree:
        """Return what running processes see."""
        return _tree(
            {folder: folder.now() for folder in self._folders},
            {file: file.durable + file.later for file in self._files.values()},
            self.root,
        )

    def after_power_loss(self, draws: random.Random, samples: int) -> Iterator[Tree]:
        """Yield what may survive: everything, nothing, and this many random choices.

        Includes all subsets of the changes to folders, if there are few.
        """
        folders = [folder for folder in self._folders if folder.later]
        files = [file for file in self._files.values() if file.later]
        num_changes = sum(len(folder.later) for folder in folders)
        subsets: list[tuple[bool, ...]] = [(True,) * num_changes, (False,) * num_changes]
        if num_changes <= _EXHAUSTIVE:
            subsets += itertools.product((True, False), repeat=num_changes)
        subsets += [tuple(draws.random() < 0.5 for _ in range(num_changes)) for _ in range(samples)]
        for number, subset in enumerate(subsets):
            kept = iter(subset)
            names = {folder: folder.durable for folder in self._folders}
            names |= {folder: folder.after([c for c in folder.later if next(kept)]) for folder in folders}
            bytes_of = {file: file.durable for file in self._files.values()}
            bytes_of |= {file: file.durable + _part(file.later, number, draws) for file in files}
            yield _tree(names, bytes_of, self.root)

    def _find(self, path: str) -> "File | Folder":
        node: File | Folder = self.root
        for name in filter(None, path.split("/")):
            assert isinstance(node, Folder)
            node = node.now()[name]
        return node

    def _split(self, path: str) -> tuple[Folder, str]:
        above, _, name = path.rpartition("/")
        folder = self._find(above)
        assert isinstance(folder, Folder)
        return folder, name


def _part(data: bytes, number: int, draws: random.Random) -> bytes:
    """Yield what may survive of bytes that were not synced: everything and nothing first."""
    length = draws.randrange(len(data) + 1)
    ways = (
        data,
        b"",
        bytes(len(data)),
        data[:length],
        data[:length].ljust(len(data), b"\0"),
        bytes(length) + data[length:],
    )
    return ways[number if number < 2 else draws.randrange(len(ways))]


def _tree(names: dict[Folder, dict[str, File | Folder]], content: dict[File, bytes], root: Folder) -> Tree:
    tree: Tree = {}
    left = [("", root)]
    while left:
        path, folder = left.pop()
        for name, node in names[folder].items():
            below = f"{path}/{name}" if path else name
            if isinstance(node, Folder):
                tree[below] = None
                left.append((below, node))
            else:
                tree[below] = content[node]
    return tree
