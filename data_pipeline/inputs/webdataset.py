"""WebDataset tars: adjacent members with one key are a sample, which has an image and a label.

The label is a decimal number in `.cls`, or "label" in `.json`, where "class_name" may name the class: as
in timm's ImageNet-1k (jpg, cls, json), ImageNet-12k and -22k (jpg, json).
"""

import json
import re
from collections.abc import Iterator

from data_pipeline.inputs.archives import ArchiveInput, Found, Part, checked_label
from data_pipeline.inputs.base import Entry, InputError
from data_pipeline.inputs.tars import Member, Tar, read_member
from dit_scale.errors import DataError

IMAGE_SUFFIXES = ("bmp", "gif", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
LABEL_SUFFIXES = ("cls", "json")

_NAME = re.compile(r"((?:.*/|)[^./]+)[.]([^/]*)", re.DOTALL)
"""Key and suffix: the rule of the webdataset package."""
_META = re.compile(r"__[^/]*__($|/)")
"""Members that package passes over."""

Sample = dict[str, Member]
"""Lower-case suffix => member."""


class WebDataset(ArchiveInput):
    """Tars of samples."""

    kind = "webdataset"
    suffix = ".tar"

    def list_part(self, part: Part) -> Found:
        found, tar = Found(), Tar(self.storage, part.key, part.start, part.end)
        for key, sample in self._samples(tar, part.key, found.ignored):
            where = f"{self.url}: sample {key} in {part.key}"
            label, name = _label(sample, tar, where)
            if name is not None and found.class_names.setdefault(label, name) != name:
                raise DataError(
                    f"{where}: label {label} is {name!r} here and {found.class_names[label]!r} before it"
                )
            images = [sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample]
            if len(images) > 1:
                names = ", ".join(image.name for image in images)
                raise DataError(f"{where}: expected one image, found {names}; leave only one in the tar")
            if images:
                found.add(f"{part.key}/{images[0].name}", label, images[0].start, images[0].span)
            else:
                found.add(f"{part.key}/{key}", label, 0, 0)
        return found

    def read(self, entry: Entry) -> bytes:
        if not entry.size:
            raise InputError(f"the sample has no image ({', '.join(IMAGE_SUFFIXES)})")
        return read_member(self.storage, entry)

    def _samples(self, tar: Tar, archive: str, ignored: list[str]) -> Iterator[tuple[str, Sample]]:
        """Key and members of every sample in order; what is of none goes to `ignored`."""
        current, sample = "", Sample()
        for member in tar:
            key, suffix = split_name(member.name)
            if not key:
                ignored.append(f"{archive}/{member.name}")
                continue
            if key != current:
                if sample:
                    yield current, sample
                current, sample = key, Sample()
            if suffix in sample:
                raise DataError(
                    f"{self.url}: sample {key} in {archive} has two members .{suffix}; expected one of each "
                    "name"
                )
            sample[suffix] = member
        if sample:
            yield current, sample


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case suffix of a member; both empty when it is of no sample."""
    found = _NAME.fullmatch(name)
    if not found or _META.match(name):
        return "", ""
    return found[1], found[2].lower()


def _label(sample: Sample, tar: Tar, where: str) -> tuple[int, str | None]:
    """The label of a sample, and the name of its class where that is told."""
    facts = _facts(tar.data(sample["json"]), where) if "json" in sample else {}
    in_facts, name = facts.get("label"), facts.get("class_name")
    labels = set()
    if "cls" in sample:
        text = tar.data(sample["cls"]).strip()
        if not re.fullmatch(rb"-?[0-9]{1,9}", text):
            raise DataError(f"{where}: .cls is {text[:20]!r}; expected a decimal number")
        labels.add(int(text))
    if isinstance(in_facts, int) and not isinstance(in_facts, bool):
        labels.add(in_facts)
    if len(labels) != 1:
        raise DataError(
            f"{where}: expected one label, found {sorted(labels) or 'none'}; a sample needs .cls with a "
            'decimal number or .json with {"label": number}, and both must agree'
        )
    return checked_label(labels.pop(), where), name if isinstance(name, str) else None


def _facts(data: bytes, where: str) -> dict[str, object]:
    try:
        facts = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where}: .json is damaged ({error}); write the sample again") from None
    return facts if isinstance(facts, dict) else {}
