"""Which kind of input lies at a source."""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import islice

from dit_scale.errors import DataError
from dit_scale_pipeline.inputs.archives import ArchiveInput
from dit_scale_pipeline.inputs.base import Input
from dit_scale_pipeline.inputs.folders import ClassFolders
from dit_scale_pipeline.inputs.imagenet_tar import ClassTars, NestedTar
from dit_scale_pipeline.inputs.parquet import Parquet
from dit_scale_pipeline.inputs.places import ARCHIVE_SUFFIXES, KINDS, Place, locate
from dit_scale_pipeline.inputs.tars import Tar
from dit_scale_pipeline.inputs.webdataset import LABEL_SUFFIXES, WebDataset, split_name

_LOOKED_AT = 16
"""Members of a tar that show of which kind it is: a sample has a label, the tar of a class has none."""

_ARCHIVE_KINDS: dict[str, type[ArchiveInput]] = {
    kind.kind: kind for kind in (NestedTar, ClassTars, WebDataset, Parquet)
}


def open_input(source: str, kind: str = "") -> Input:
    """The images at a folder, file, pattern of files or s3:// url; nothing is read when `kind` is given.

    `kind` is what an earlier listing has; when it is empty, the top of the source is looked at and the
    beginning of one archive.
    """
    place = locate(source)
    if not kind:
        kind = _recognise(place)
    if kind == ClassFolders.kind:
        return ClassFolders(place.storage)
    return _ARCHIVE_KINDS[kind](place)


def _recognise(place: Place) -> str:
    files, folders = place.top()
    by_suffix = {suffix: [name for name in files if name.endswith(suffix)] for suffix in ARCHIVE_SUFFIXES}
    archives = [name for names in by_suffix.values() for name in names]
    if place.pattern and not archives:
        raise DataError(f"{place.url}: no .tar or .parquet file of that name; expected {KINDS}")
    if not archives:
        return ClassFolders.kind
    if all(by_suffix.values()) or (folders and not place.pattern):
        among = (
            "tars and Parquet files" if all(by_suffix.values()) else f"archives and folders ({_few(folders)})"
        )
        raise DataError(
            f"{place.url}: {among} lie side by side; expected one data set. Name its archives by a pattern "
            f"({place.url.rstrip('/')}/{_pattern(archives[0])}), or a folder by its path"
        )
    kind = Parquet.kind if by_suffix[".parquet"] else _kind_of_tar(place, archives, files)
    if kind in (Parquet.kind, WebDataset.kind):
        _refuse_several_sets(place, archives)
    return kind


def _kind_of_tar(place: Place, names: Sequence[str], sizes: dict[str, int]) -> str:
    """Of some tars, by the first one that has members."""
    for name in names:
        members = [member.name for member in islice(Tar(place.storage, name, 0, sizes[name]), _LOOKED_AT)]
        if any(split_name(member)[1] in LABEL_SUFFIXES for member in members):
            return WebDataset.kind
        if members and members[0].endswith(".tar"):
            if len(names) > 1:
                raise DataError(
                    f"{place.url}: {name} holds tars, and {len(names) - 1} other tars lie beside it; name "
                    f"the one to encode ({place.url.rstrip('/')}/{name})"
                )
            return NestedTar.kind
        if members:
            break
    # One tar alone is no set of classes: what it lacks is said when it is listed.
    return WebDataset.kind if place.pattern == names[0] else ClassTars.kind


def _refuse_several_sets(place: Place, archives: Sequence[str]) -> None:
    sets = defaultdict(list)
    for name in archives:
        sets[_pattern(name)].append(name)
    if len(sets) > 1:
        found = ", ".join(f"{len(names)} {pattern}" for pattern, names in sets.items())
        folder = place.url.rstrip("/").rpartition("/")[0] if place.pattern else place.url.rstrip("/")
        raise DataError(
            f"{place.url}: archives of {len(sets)} sets ({found}); expected one. Name it by a pattern: "
            f"{folder}/{_pattern(archives[0])}"
        )


def _pattern(name: str) -> str:
    """What the names of a set's archives have in common: all but their numbers."""
    return re.sub(r"\d+", "*", name)


def _few(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
