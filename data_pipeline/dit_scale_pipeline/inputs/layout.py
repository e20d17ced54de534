"""Guesses about classes that would become wrong labels: what is refused, and what is only said.

A class may hold folders (n01/images/x.jpg); all images below it are its own. A folder of splits, or a tar of
class folders, looks the same; its names, and where its images lie, tell.
"""

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from dit_scale.errors import DataError
from dit_scale_pipeline.inputs.base import Listing
from dit_scale_pipeline.inputs.names import few, is_text, shown

_SPLIT = re.compile(
    r"(train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval)([-_ ]?(set|split|images|data))?[-_ ]?\d*"
)
_SHARD = re.compile(r"(.*?)(\d{4,})(-of-\d+)?[.]tar", re.DOTALL)
_SYNSET = re.compile(r"n\d{8}[.]tar")
"""A class tar of ImageNet: its number is that of a word."""


def folders_below(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Class => the folders that divide its images; none when an image lies beside them.

    A folder that holds all images of its class divides nothing: n01/images/x.jpg has none.
    """
    where = defaultdict(set)
    for path in paths:
        name, _, rest = path.partition("/")
        where[name].add(rest.rpartition("/")[0])
    return {name: _dividing(inner) for name, inner in where.items()}


def _dividing(folders: set[str]) -> tuple[str, ...]:
    parts = [folder.split("/") if folder else [] for folder in folders]
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False))
    common = sum(1 for _ in same)
    if any(len(part) == common for part in parts):
        return ()
    return tuple(sorted({part[common] for part in parts}, key=os.fsencode))


def check_folders(url: str, class_names: Sequence[str], paths: Iterable[str]) -> None:
    """DataError when class folders are the splits of a data set."""
    below = folders_below(paths)
    if splits := _splits(class_names, below):
        raise DataError(
            f"{url}: expected a folder per class, found what looks like the splits of a data set, "
            f"{few(class_names)}{_held(class_names, below)}. Name one: "
            f"source={url.rstrip('/')}/{splits[0]}. If they are classes, give them other names; "
            "symbolic links will do"
        )


def check_tars(url: str, class_names: Sequence[str], paths: Iterable[str]) -> None:
    """DataError when class tars are splits, or tars of class folders."""
    below = folders_below(paths)
    if (below and all(below.values())) or _splits(class_names, below):
        raise DataError(
            f"{url}: expected one tar per class, named after it, found {few(f'{n}.tar' for n in class_names)}"
            f"{_held(class_names, below)}. Unpack them, and name the folder whose folders are the classes; "
            "or pack each class by itself (tar -cf n01.tar -C n01 .)"
        )


def _held(class_names: Sequence[str], below: dict[str, tuple[str, ...]]) -> str:
    inside = [(name, inner) for name in class_names if (inner := below.get(name))]
    held = [f"{shown(name)} holds {len(inner)} folders ({few(inner)})" for name, inner in inside]
    return f": {'; '.join(held[:3])}" if held else ""


def _splits(class_names: Sequence[str], below: dict[str, tuple[str, ...]]) -> Sequence[str]:
    """The classes that are splits; first those that hold folders, which may be the classes. Mostly none."""
    splits = [name for name in class_names if _SPLIT.fullmatch(name.lower())]
    divided = [name for name in splits if below.get(name)]
    # A class may be called train; nobody has the classes train and val alone.
    if (len(splits) > 1 or len(class_names) == 1) and (divided or 1 < len(splits) == len(class_names)):
        return divided or splits
    return ()


def are_shards(archives: Sequence[str]) -> bool:
    """Whether tars are numbered as the shards of a WebDataset are: 00000.tar, 00001.tar, ..."""
    found = [_SHARD.fullmatch(name) for name in archives]
    matches = [match for match in found if match and not _SYNSET.fullmatch(match[0])]
    if len(matches) < len(archives) or len({(match[1], len(match[2]), match[3]) for match in matches}) > 1:
        return False
    numbers = sorted(int(match[2]) for match in matches)
    follow = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return follow and (len(numbers) > 1 or numbers[0] < 2)


def check_names(url: str, class_names: Sequence[str]) -> None:
    """DataError for names of classes that dataset.json cannot hold."""
    if wrong := [name for name in class_names if not is_text(name)]:
        raise DataError(
            f"{url}: expected names of classes in UTF-8, found {few(wrong)}. Rename them; "
            "`convmv -f latin1 -t utf-8 -r --notest FOLDER` renames a whole tree"
        )


def remarks(listing: Listing) -> list[str]:
    """What a person should know of a listing that is accepted, a sentence each."""
    names, said = listing.class_names, []
    numbers = [name for name in names if name.isascii() and name.isdigit()]
    if listing.labels_in_paths and len(numbers) == len(names):
        moved = [label for label, name in enumerate(names) if label != int(name)]
        if moved:
            label = moved[0]
            said.append(
                f"the names of the classes are numbers, and labels count the names sorted as text: label "
                f"{label} is class {names[label]}, not {label}. If the numbers are the labels, name the "
                "classes from 0 on with as many digits each (00, 01, ...)"
            )
    if listing.labels_in_paths and (inner := folders_below(listing.paths)) and all(inner.values()):
        name, folders = next(iter(inner.items()))
        said.append(
            f"no image lies directly in a class, each class holds folders ({few([name])}: {few(folders)}). "
            f"If these are the classes, name the folder above them: source=.../{few([name])}"
        )
    if not listing.labels_in_paths and listing.empty_classes == ("0",):
        said.append(
            f"labels count from 1 to {len(names) - 1}: class 0 has no image. Labels count from 0 here; write "
            "them so, or keep them, and an empty class 0, with allow_empty_classes=true"
        )
    return said
