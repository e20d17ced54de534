"""ImageNet as distributed, a tar of one tar per class; also a folder of such class tars.

Paths, labels and therefore latents are the same as those of the unpacked class folders.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

from dit_scale.errors import DataError
from dit_scale_pipeline.inputs.archives import ArchiveImages, ArchiveInput, ArchiveRange, visible
from dit_scale_pipeline.inputs.base import Archive, Entry, Listing, ListingProgress, no_progress
from dit_scale_pipeline.inputs.layout import check_tars
from dit_scale_pipeline.inputs.names import is_not_image, printable
from dit_scale_pipeline.inputs.tars import DISK_WINDOW_BYTES, Tar, read_member

_FOREIGN_SUFFIXES = (".tar", ".cls")
"""Suffixes of members that a class tar does not have."""


class ClassTars(ArchiveInput):
    """Class tars: the name of a tar is its class, and an empty tar is a class without images."""

    kind = "class_tars"
    suffix = ".tar"
    labels_in_paths = True

    def list(self, progress: ListingProgress = no_progress) -> Listing:
        listing = super().list(progress)
        check_tars(self.url, listing.class_names, listing.paths)
        return listing

    def ranges(self, archives: Sequence[Archive]) -> tuple[Sequence[ArchiveRange], Sequence[str]]:
        ranges, others = super().ranges(archives)
        return self._labeled(
            [(archive.name, tar) for archive, tar in zip(archives, ranges, strict=True)]
        ), others

    def list_archive(self, archive: ArchiveRange) -> ArchiveImages:
        images = ArchiveImages(class_names={archive.label: archive.name})
        tar = Tar(self.storage, archive.key, archive.start, archive.end)
        for member in visible(tar, archive.name, images.ignored):
            if member.name.lower().endswith(_FOREIGN_SUFFIXES):
                raise DataError(
                    f"{self.url}: the tar of class {archive.name} contains {printable(member.name)}; "
                    "expected the images of one class. Pass a tar of class tars, or WebDataset tars, "
                    "separately"
                )
            if is_not_image(member.name):
                images.ignored.append(f"{archive.name}/{member.name}")
            else:
                images.add(f"{archive.name}/{member.name}", archive.label, member.start, member.span)
        return images

    def read(self, entry: Entry) -> bytes:
        return read_member(self.storage, entry)

    def _labeled(self, tars: Sequence[tuple[str, ArchiveRange]]) -> Sequence[ArchiveRange]:
        """Return the tars, given with their file names, with classes and in order of their labels."""
        classes = {name.rpartition("/")[2].removesuffix(self.suffix): tar for name, tar in tars}
        if len(classes) < len(tars):
            raise DataError(f"{self.url}: two tars of the same class; expected one per class")
        names = sorted(classes, key=os.fsencode)
        return [replace(classes[name], label=label, name=name) for label, name in enumerate(names)]


class NestedTar(ClassTars):
    """ILSVRC2012_img_train.tar: class tars inside a tar, all read in place."""

    kind = "imagenet_tar"

    def ranges(self, archives: Sequence[Archive]) -> tuple[Sequence[ArchiveRange], Sequence[str]]:
        tars: list[tuple[str, ArchiveRange]] = []
        others: list[str] = []
        for number, one in enumerate(archives):
            # A whole class separates two headers: more than any window.
            tar = Tar(self.storage, one.name, 0, one.bytes, DISK_WINDOW_BYTES)
            for member in visible(tar, one.name, others):
                inner = ArchiveRange(number, one.name, member.data_start, member.data_start + member.size)
                if member.name.endswith(self.suffix):
                    tars.append((member.name, inner))
                else:
                    others.append(f"{one.name}/{member.name}")
        return self._labeled(tars), others
