"""WebDataset tars: adjacent members with one key are a sample, which has an image and a label.

The label is a decimal number in `.cls`, or "label" in `.json`, where "class_name" may name the class: as
in timm's ImageNet-1k (jpg, cls, json), ImageNet-12k and -22k (jpg, json).
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from dit_scale.errors import DataError
from dit_scale_pipeline.inputs.archives import (
    ArchiveImages,
    ArchiveInput,
    ArchiveRange,
    checked_label,
    visible,
)
from dit_scale_pipeline.inputs.base import Entry, InputError
from dit_scale_pipeline.inputs.names import few, shown
from dit_scale_pipeline.inputs.tars import Tar, TarMember, read_member

IMAGE_SUFFIXES = ("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
LABEL_SUFFIXES = ("cls", "json")
NO_LABELS = (
    'A sample needs .cls with a decimal number, or .json with {"label": number}, beside its image; a caption '
    "(.txt), as img2dataset writes it, is no label. Write the tars again with labels, or unpack them into "
    "one folder per class"
)
"""What to do with samples that have an image and no label."""

_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
"""Key and suffix: the rule of the webdataset package, but hidden files are of no sample in folders either."""
_DOTS = (
    "The key of a sample ends at the first dot of its members' names, as in the webdataset package: a.0.jpg "
    "is member 0.jpg of sample a. Write the tars with keys without dots (a_0.jpg, a_0.cls)"
)
_META = re.compile(r"__[^/]*__($|/)")
"""Members that package passes over."""


@dataclass
class WebDatasetSample:
    """Members with one key."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    """By lower-case suffix."""
    told: dict[str, bytes] = field(default_factory=dict)
    """The bytes of those that tell the label."""


class WebDataset(ArchiveInput):
    """Tars of samples."""

    kind = "webdataset"
    suffix = ".tar"

    def list_archive(self, part: ArchiveRange) -> ArchiveImages:
        found, tar = ArchiveImages(), Tar(self.storage, part.key, part.start, part.end)
        for sample in self._samples(tar, part.key, found.ignored):
            where = f"{self.url}: sample {shown(sample.key)} in {part.key}"
            label, name = _label(sample, where)
            if name is not None and found.class_names.setdefault(label, name) != name:
                raise DataError(
                    f"{where}: label {label} is {name!r} here and {found.class_names[label]!r} before it"
                )
            if image := _image(sample, where):
                found.add(f"{part.key}/{image.name}", label, image.start, image.span)
            else:
                found.add(f"{part.key}/{sample.key}", label, 0, 0)
        return found

    def read(self, entry: Entry) -> bytes:
        if not entry.size:
            raise InputError(f"the sample has no image ({', '.join(IMAGE_SUFFIXES)})")
        return read_member(self.storage, entry)

    def _samples(self, tar: Tar, archive: str, ignored: list[str]) -> Iterator[WebDatasetSample]:
        """Every sample in order; what is of none goes to `ignored`."""
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
                    f"{self.url}: sample {shown(key)} in {archive} has two members .{suffix}; expected one "
                    "of each name"
                )
            sample.members[suffix] = member
            if suffix in LABEL_SUFFIXES:
                # Now, while it is in the window.
                sample.told[suffix] = tar.data(member)
        if sample.key:
            yield sample


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case suffix of a member; both empty when it is of no sample."""
    found = _NAME.fullmatch(name)
    if not found or _META.match(name):
        return "", ""
    return found[1], found[2].lower()


def _image(sample: WebDatasetSample, where: str) -> TarMember | None:
    """The image of a sample: `key.jpg`, else the only member like `key.image.jpg`."""
    plain = [sample.members[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample.members]
    images = plain or [
        member for suffix, member in sample.members.items() if suffix.rpartition(".")[2] in IMAGE_SUFFIXES
    ]
    if len(images) > 1:
        names = few(image.name for image in images)
        raise DataError(
            f"{where}: expected one image, found {names}; leave only one in the tar"
            + ("" if plain else f". {_DOTS}")
        )
    return images[0] if images else None


def _label(sample: WebDatasetSample, where: str) -> tuple[int, str | None]:
    """The label of a sample, and the name of its class where that is told."""
    told = sample.told
    facts = _facts(told["json"], where) if "json" in told else {}
    in_facts, name = facts.get("label"), facts.get("class_name")
    labels = set()
    if "cls" in told:
        text = told["cls"].strip()
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
        raise DataError(
            f"{where}: expected one label, found none in {members}. {_DOTS if dotted else NO_LABELS}"
        )
    if len(labels) > 1:
        raise DataError(f"{where}: expected one label, found {sorted(labels)}; .cls and .json must agree")
    return checked_label(labels.pop(), where), name if isinstance(name, str) else None


def _facts(data: bytes, where: str) -> dict[str, object]:
    try:
        facts = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where}: .json is damaged ({error}); write the sample again") from None
    return facts if isinstance(facts, dict) else {}
