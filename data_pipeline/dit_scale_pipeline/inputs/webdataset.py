"""WebDataset tars: adjacent members with the same key form a sample with an image and a label.

The label is a decimal number in `.cls`, or "label" in `.json`, which may also contain "class_name". timm's
ImageNet-1k (jpg, cls, json), ImageNet-12k and ImageNet-22k (jpg, json) have this form.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from dit_scale.data.pixels import InputError
from dit_scale.errors import DataError
from dit_scale_pipeline.inputs.archives import (
    ArchiveImages,
    ArchiveInput,
    ArchiveRange,
    checked_label,
    visible,
)
from dit_scale_pipeline.inputs.base import Entry
from dit_scale_pipeline.inputs.names import few, printable
from dit_scale_pipeline.inputs.tars import Tar, TarMember, read_member

IMAGE_SUFFIXES = ("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
LABEL_SUFFIXES = ("cls", "json")
NO_LABELS = (
    'A sample needs .cls with a decimal number, or .json with {"label": number}, next to its image; a '
    "caption "
    "(.txt), as written by img2dataset, is not a label. Write the tars again with labels, or unpack them "
    "into one folder per class"
)
"""Advice for samples that have an image but no label."""

_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
"""Key and suffix by the rule of the webdataset package, except that hidden files in folders are ignored."""
_DOTS = (
    "The key of a sample ends at the first dot of its members' names, as in the webdataset package: a.0.jpg "
    "is member 0.jpg of sample a. Write the tars again with keys without dots (a_0.jpg, a_0.cls)"
)
_META = re.compile(r"__[^/]*__($|/)")
"""Names that the webdataset package ignores."""


@dataclass
class WebDatasetSample:
    """Adjacent members with the same key."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    """Members by lower-case suffix."""
    label_files: dict[str, bytes] = field(default_factory=dict)
    """Contents of .cls and .json by suffix."""


class WebDataset(ArchiveInput):
    """WebDataset tars."""

    kind = "webdataset"
    suffix = ".tar"

    def list_archive(self, archive: ArchiveRange) -> ArchiveImages:
        images, tar = ArchiveImages(), Tar(self.storage, archive.key, archive.start, archive.end)
        for sample in self._samples(tar, archive.key, images.ignored):
            where = f"{self.url}: sample {printable(sample.key)} in {archive.key}"
            label, name = _label(sample, where)
            if name is not None and images.class_names.setdefault(label, name) != name:
                raise DataError(
                    f"{where}: label {label} is class {name!r}, but {images.class_names[label]!r} in an "
                    "earlier sample"
                )
            if image := _image(sample, where):
                images.add(f"{archive.key}/{image.name}", label, image.start, image.span)
            else:
                images.add(f"{archive.key}/{sample.key}", label, 0, 0)
        return images

    def read(self, entry: Entry) -> bytes:
        if not entry.size:
            raise InputError(f"the sample has no image ({', '.join(IMAGE_SUFFIXES)})")
        return read_member(self.storage, entry)

    def _samples(self, tar: Tar, archive: str, ignored: list[str]) -> Iterator[WebDatasetSample]:
        """Yield the samples in order; append members without a sample to `ignored`."""
        sample = WebDatasetSample("")
        for member in visible(tar, archive, ignored):
            key, suffix = split_name(member.name)
            if not key:
                ignored.append(f"{archive}/{member.name}")
                continue
            if key != sample.key:
                if sample.key:
                    yield sample
                sample = WebDatasetSample(key)
            if suffix in sample.members:
                raise DataError(
                    f"{self.url}: sample {printable(key)} in {archive} has two .{suffix} members; expected "
                    "one"
                )
            sample.members[suffix] = member
            if suffix in LABEL_SUFFIXES:
                # Read it now, while it is in the window.
                sample.label_files[suffix] = tar.data(member)
        if sample.key:
            yield sample


def split_name(name: str) -> tuple[str, str]:
    """Return key and lower-case suffix of a member; both are empty if it belongs to no sample."""
    found = _NAME.fullmatch(name)
    if not found or _META.match(name):
        return "", ""
    return found[1], found[2].lower()


def _image(sample: WebDatasetSample, where: str) -> TarMember | None:
    """Return the image of a sample: `key.jpg`, or else the only member like `key.image.jpg`."""
    plain = [sample.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample.members]
    images = plain or [
        member for suffix, member in sample.members.items() if suffix.rpartition(".")[2] in IMAGE_SUFFIXES
    ]
    if len(images) > 1:
        names = few(image.name for image in images)
        raise DataError(
            f"{where}: expected one image, got {names}; keep only one in the tar"
            + ("" if plain else f". {_DOTS}")
        )
    return images[0] if images else None


def _label(sample: WebDatasetSample, where: str) -> tuple[int, str | None]:
    """Return the label of a sample and, if present, the name of its class."""
    files = sample.label_files
    facts = _facts(files["json"], where) if "json" in files else {}
    in_facts, name = facts.get("label"), facts.get("class_name")
    labels = set()
    if "cls" in files:
        text = files["cls"].strip()
        if not re.fullmatch(rb"-?[0-9]{1,9}", text):
            raise DataError(f"{where}: .cls is {text[:20]!r}; expected a decimal number")
        labels.add(int(text))
    if isinstance(in_facts, int) and not isinstance(in_facts, bool):
        labels.add(in_facts)
    elif in_facts is not None and not labels:
        raise DataError(
            f'{where}: "label" in .json is {json.dumps(in_facts)[:40]}; expected an integer, without quotes'
        )
    if not labels:
        members = few(member.name for member in sample.members.values())
        dotted = any(suffix.endswith(tuple(f".{one}" for one in LABEL_SUFFIXES)) for suffix in sample.members)
        raise DataError(f"{where}: expected a label, got only {members}. {_DOTS if dotted else NO_LABELS}")
    if len(labels) > 1:
        raise DataError(f"{where}: expected one label, got {sorted(labels)}; .cls and .json must agree")
    return checked_label(labels.pop(), where), name if isinstance(name, str) else None


def _facts(data: bytes, where: str) -> dict[str, object]:
    try:
        facts = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where}: .json is not valid JSON ({error}); write the sample again") from None
    return facts if isinstance(facts, dict) else {}
