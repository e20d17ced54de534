"""Heuristics against layouts that would produce wrong labels: some are refused, others only noted.

A class may contain folders (n01/images/x.jpg); all images below it belong to it. A folder of splits or a
tar of class folders looks similar. Their names and the depth of their images tell them apart.
"""

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from dit_scale.errors import DataError
from dit_scale_pipeline.inputs.base import Listing
from dit_scale_pipeline.inputs.names import few, is_utf8, printable

_SPLIT = re.compile(
    r"(train(ing)?|val(id(ation)?)?|test(ing)?|dev|eval)([-_ ]?(set|split|images|data))?[-_ ]?\d*"
)
_SHARD = re.compile(r"(.*?)(\d{4,})(-of-\d+)?[.]tar", re.DOTALL)
_SYNSET = re.compile(r"n\d{8}[.]tar")
"""A class tar of ImageNet, whose number is a WordNet id."""


def folders_below(paths: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return for each class the folders that divide its images; none if an image lies next to them.

    A folder that contains all images of its class divides nothing: n01/images/x.jpg has none.
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
    """DataError when the class folders are the splits of a data set."""
    below = folders_below(paths)
    if splits := _splits(class_names, below):
        raise DataError(
            f"{url}: expected one folder per class, got what looks like the splits of a data set: "
            f"{few(class_names)}{_contents(class_names, below)}. Pass one split: "
            f"source={url.rstrip('/')}/{splits[0]}. If they are classes, give them other names, for example "
            "with symbolic links"
        )


def check_tars(url: str, class_names: Sequence[str], paths: Iterable[str]) -> None:
    """DataError when the class tars are splits or contain class folders."""
    below = folders_below(paths)
    if (below and all(below.values())) or _splits(class_names, below):
        raise DataError(
            f"{url}: expected one tar per class, named after it, got {few(f'{n}.tar' for n in class_names)}"
            f"{_contents(class_names, below)}. Unpack them and pass the folder of the class folders, or "
            "create one tar per class (tar -cf n01.tar -C n01 .)"
        )


def _contents(class_names: Sequence[str], below: dict[str, tuple[str, ...]]) -> str:
    inside = [(name, inner) for name in class_names if (inner := below.get(name))]
    contents = [f"{printable(name)} contains {len(inner)} folders ({few(inner)})" for name, inner in inside]
    return f": {'; '.join(contents[:3])}" if contents else ""


def _splits(class_names: Sequence[str], below: dict[str, tuple[str, ...]]) -> Sequence[str]:
    """Return the classes that are splits, those that contain folders if any; usually empty."""
    splits = [name for name in class_names if _SPLIT.fullmatch(name.lower())]
    divided = [name for name in splits if below.get(name)]
    # A class may be called train, but train and val are never the only classes.
    if (len(splits) > 1 or len(class_names) == 1) and (divided or 1 < len(splits) == len(class_names)):
        return divided or splits
    return ()


def are_shards(archives: Sequence[str]) -> bool:
    """Whether tars are numbered like the shards of a WebDataset: 00000.tar, 00001.tar, ..."""
    found = [_SHARD.fullmatch(name) for name in archives]
    matches = [match for match in found if match and not _SYNSET.fullmatch(match[0])]
    if len(matches) < len(archives) or len({(match[1], len(match[2]), match[3]) for match in matches}) > 1:
        return False
    numbers = sorted(int(match[2]) for match in matches)
    follow = numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return follow and (len(numbers) > 1 or numbers[0] < 2)


def check_names(url: str, class_names: Sequence[str]) -> None:
    """DataError for class names that dataset.json cannot store."""
    if wrong := [name for name in class_names if not is_utf8(name)]:
        raise DataError(
            f"{url}: expected class names in UTF-8, got {few(wrong)}. Rename them; "
            "`convmv -f latin1 -t utf-8 -r --notest FOLDER` renames a whole tree"
        )


def layout_notes(listing: Listing) -> list[str]:
    """Return notes on an accepted listing that may still be a mistake."""
    names, notes = listing.class_names, []
    numbers = [name for name in names if name.isascii() and name.isdigit()]
    if listing.labels_in_paths and len(numbers) == len(names):
        moved = [label for label, name in enumerate(names) if label != int(name)]
        if moved:
            label = moved[0]
            notes.append(
                f"the class names are numbers, but labels number them in text order: label {label} is class "
                f"{names[label]}, not {label}. If the numbers are the labels, rename the classes to start at "
                "0 with the same number of digits (00, 01, ...)"
            )
    if listing.labels_in_paths and (inner := folders_below(listing.paths)) and all(inner.values()):
        name, folders = next(iter(inner.items()))
        notes.append(
            f"no image lies directly in a class, each class contains folders ({few([name])}: "
            f"{few(folders)}). If these are the classes, pass their parent folder: source=.../{few([name])}"
        )
    if not listing.labels_in_paths and listing.empty_classes == ("0",):
        notes.append(
            f"labels run from 1 to {len(names) - 1} and class 0 has no image, but labels start at 0. "
            "Renumber them, or keep an empty class 0 with allow_empty_classes=true"
        )
    return notes
