"""ImageNet as it is distributed: a tar of one tar per class; also a folder of such class tars.

Paths, labels and hence the latents are those of the class folders that unpacking would give.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

from dit_scale.errors import DataError
from dit_scale_pipeline.inputs.archives import ArchiveImages, ArchiveInput, ArchiveRange, visible
from dit_scale_pipeline.inputs.base import Archive, Entry, Listing, Progress, silent
from dit_scale_pipeline.inputs.layout import check_tars
from dit_scale_pipeline.inputs.names import is_other_kind, shown
from dit_scale_pipeline.inputs.tars import DISK_WINDOW_BYTES, Tar, read_member

_STRANGE_SUFFIXES = (".tar", ".cls")
"""Of members that show that a tar does not hold the images of one class."""


class ClassTars(ArchiveInput):
    """Tars at a place, each one a class by its name; one without a member is a class without an image."""

    kind = "class_tars"
    suffix = ".tar"
    labels_in_paths = True

    def list(self, progress: Progress = silent) -> Listing:
        listing = super().list(progress)
        check_tars(self.url, listing.class_names, listing.paths)
        return listing

    def parts(self, archives: Sequence[Archive]) -> tuple[Sequence[ArchiveRange], Sequence[str]]:
        parts, others = super().parts(archives)
        return self._labeled([(one.name, part) for one, part in zip(archives, parts, strict=True)]), others

    def list_archive(self, part: ArchiveRange) -> ArchiveImages:
        found = ArchiveImages(class_names={part.label: part.name})
        tar = Tar(self.storage, part.key, part.start, part.end)
        for member in visible(tar, part.name, found.ignored):
            if member.name.lower().endswith(_STRANGE_SUFFIXES):
                raise DataError(
                    f"{self.url}: the tar of class {part.name} has a member {shown(member.name)}; expected "
                    "the images of one class. Name a tar of class tars, or WebDataset tars, by themselves"
                )
            if is_other_kind(member.name):
                found.ignored.append(f"{part.name}/{member.name}")
            else:
                found.add(f"{part.name}/{member.name}", part.label, member.start, member.span)
        return found

    def read(self, entry: Entry) -> bytes:
        return read_member(self.storage, entry)

    def _labeled(self, tars: Sequence[tuple[str, ArchiveRange]]) -> Sequence[ArchiveRange]:
        """(file's name, tar) => tars with their classes, in order of the labels."""
        classes = {name.rpartition("/")[2].removesuffix(self.suffix): part for name, part in tars}
        if len(classes) < len(tars):
            raise DataError(f"{self.url}: two tars of one class; expected one for each class")
        names = sorted(classes, key=os.fsencode)
        return [replace(classes[name], label=label, name=name) for label, name in enumerate(names)]


class NestedTar(ClassTars):
    """ILSVRC2012_img_train.tar: class tars in a tar, all read in place."""

    kind = "imagenet_tar"

    def parts(self, archives: Sequence[Archive]) -> tuple[Sequence[ArchiveRange], Sequence[str]]:
        tars: list[tuple[str, ArchiveRange]] = []
        others: list[str] = []
        for number, one in enumerate(archives):
            # Between two headers lies a whole class: more than any window.
            tar = Tar(self.storage, one.name, 0, one.bytes, DISK_WINDOW_BYTES)
            for member in visible(tar, one.name, others):
                part = ArchiveRange(number, one.name, member.data_start, member.data_start + member.size)
                if member.name.endswith(self.suffix):
                    tars.append((member.name, part))
                else:
                    others.append(f"{one.name}/{member.name}")
        return self._labeled(tars), others
