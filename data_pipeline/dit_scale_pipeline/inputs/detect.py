"""Detect the kind of input at a source."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice

from dit_scale.errors import DataError
from dit_scale_pipeline.inputs.archives import ArchiveInput
from dit_scale_pipeline.inputs.base import COLUMNS, Input
from dit_scale_pipeline.inputs.contents import unpack_advice
from dit_scale_pipeline.inputs.folders import ClassFolders
from dit_scale_pipeline.inputs.imagenet_tar import ClassTars, NestedTar
from dit_scale_pipeline.inputs.layout import are_shards
from dit_scale_pipeline.inputs.names import few, hidden_part
from dit_scale_pipeline.inputs.parquet import Parquet
from dit_scale_pipeline.inputs.places import (
    ARCHIVE_SUFFIXES,
    SUPPORTED_SOURCES,
    InputPlace,
    locate,
    pattern_of,
)
from dit_scale_pipeline.inputs.tars import Tar
from dit_scale_pipeline.inputs.webdataset import LABEL_SUFFIXES, NO_LABELS, WebDataset, split_name

_MEMBERS_SAMPLED = 16
"""Members of a tar that are examined: WebDataset samples have labels, class tars have none."""

_TAR_KINDS: dict[str, type[ArchiveInput]] = {kind.kind: kind for kind in (NestedTar, ClassTars, WebDataset)}


def open_input(source: str, kind: str = "", columns: tuple[str, str] = COLUMNS) -> Input:
    """Open the images at a folder, file, pattern of files or s3:// URL.

    `kind` is the kind in an earlier listing. If it is empty, the kind is detected from the top level of the
    source and the start of one archive; otherwise nothing is read. `columns` are the image and label columns
    of Parquet files.
    """
    place = locate(source)
    if not kind:
        kind = _detect_kind(place)
    if kind == ClassFolders.kind:
        return ClassFolders(place.storage)
    return Parquet(place, columns) if kind == Parquet.kind else _TAR_KINDS[kind](place)


def _detect_kind(place: InputPlace) -> str:
    top = place.top_level()
    parquet, tars = ([name for name in top.files if name.endswith(suffix)] for suffix in ARCHIVE_SUFFIXES)
    archives = parquet + tars
    if place.pattern and not archives:
        packed = unpack_advice(top.files)
        found = f". Got {packed}" if packed else ""
        raise DataError(f"{place.url}: no such .tar or .parquet file; expected {SUPPORTED_SOURCES}{found}")
    if not archives:
        return ClassFolders.kind
    if _stems(parquet) <= _stems(tars):
        parquet = []  # img2dataset writes one next to each tar
    if (parquet and tars) or (top.folders and not place.pattern):
        folders = few(sorted(top.folders))
        among = "tars and Parquet files" if parquet and tars else f"archives and folders ({folders})"
        raise DataError(
            f"{place.url}: {among} in the same place; expected one data set. Pass a pattern of archives "
            f"({place.url.rstrip('/')}/{pattern_of(archives[0])}) or the path of a folder"
        )
    kind = Parquet.kind if parquet else _kind_of_tar(place, tars, top.files)
    if kind in (Parquet.kind, WebDataset.kind):
        _refuse_several_sets(place, parquet or tars)
    return kind


def _kind_of_tar(place: InputPlace, names: Sequence[str], sizes: dict[str, int]) -> str:
    """Detect the kind of tars from the first one that has members."""
    for name in names:
        every = (member.name for member in Tar(place.storage, name, 0, sizes[name]))
        members = list(islice((member for member in every if not hidden_part(member)), _MEMBERS_SAMPLED))
        if any(split_name(member)[1].rpartition(".")[2] in LABEL_SUFFIXES for member in members):
            return WebDataset.kind
        if members and members[0].endswith(".tar"):
            if len(names) > 1:
                raise DataError(
                    f"{place.url}: {name} contains tars and lies next to other archives; pass the one to "
                    f"encode ({place.url.rstrip('/')}/{name})"
                )
            return NestedTar.kind
        if members:
            _refuse_unlabelled(place, names, name, members)
            break
    return ClassTars.kind


def _refuse_unlabelled(place: InputPlace, names: Sequence[str], name: str, members: Sequence[str]) -> None:
    """DataError when a tar without labels is not a class tar."""
    keys = [key for key, _ in map(split_name, members) if key]
    content = f"{name} contains {few(members)}"
    if are_shards(names) or len(set(keys)) < len(keys):
        raise DataError(
            f"{place.url}: these tars look like WebDataset shards without labels: {content}. {NO_LABELS}. If "
            "each tar is a class, name it after the class and keep only images in it"
        )
    if place.pattern == name:
        raise DataError(
            f"{place.url}: expected ImageNet's tar of class tars, or samples with labels; {content}. "
            "Unpack it and pass the folder of the class folders. If it is the tar of one class, pass the "
            "folder of all class tars"
        )


def _stems(names: Sequence[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def _refuse_several_sets(place: InputPlace, archives: Sequence[str]) -> None:
    sets = defaultdict(list)
    for name in archives:
        sets[pattern_of(name)].append(name)
    if len(sets) > 1:
        found = ", ".join(f"{len(names)} {pattern}" for pattern, names in sets.items())
        folder = place.url.rstrip("/").rpartition("/")[0] if place.pattern else place.url.rstrip("/")
        raise DataError(
            f"{place.url}: archives of {len(sets)} data sets ({found}); expected one. Pass a pattern: "
            f"{folder}/{pattern_of(archives[0])}"
        )
