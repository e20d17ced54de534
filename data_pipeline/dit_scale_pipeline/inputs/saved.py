"""The listing that a job saves in its output. It shows which image each key is.

The next attempt compares it with the current source and does not list unchanged archives again.
"""

import os
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from dit_scale.data.listing import LISTING_KEY, pack, unpack
from dit_scale.errors import DataError
from dit_scale.storage import MissingKeyError, Storage
from dit_scale_pipeline.inputs.base import COLUMNS, Archive, Input, Listing, ListingProgress, no_progress
from dit_scale_pipeline.inputs.names import few

_COLUMNS = ("labels", "archive_numbers", "starts", "sizes")
_REMEDY = "delete it, the next attempt creates it again"
_FACTS = ("kind", "class_names", "labels_in_paths", "ignored", "columns")


def save_listing(storage: Storage, listing: Listing) -> None:
    """Write the listing, replacing an earlier one."""
    facts = {name: getattr(listing, name) for name in _FACTS}
    facts |= {"archives": [asdict(archive) for archive in listing.archives], "sha256": listing.sha256}
    arrays: dict[str, npt.NDArray[Any]] = {
        "paths": np.frombuffer(b"\0".join(map(os.fsencode, listing.paths)), np.uint8)
    }
    arrays |= {name: getattr(listing, name) for name in _COLUMNS if getattr(listing, name) is not None}
    storage.write(LISTING_KEY, pack(facts, arrays))


def load_listing(storage: Storage) -> Listing | None:
    """Return the listing that the output was created with, or None; DataError when it is damaged."""
    where = f"{storage.url}/{LISTING_KEY}"
    try:
        facts, arrays = unpack(storage.read(LISTING_KEY), where)
        paths = os.fsdecode(arrays.pop("paths").tobytes()).split("\0")
        sha256 = facts.pop("sha256")
        listing = Listing(
            kind=facts["kind"],
            class_names=tuple(facts["class_names"]),
            paths=paths,
            labels_in_paths=facts["labels_in_paths"],
            archives=tuple(Archive(**archive) for archive in facts["archives"]),
            ignored=tuple(facts["ignored"]),
            columns=tuple(facts.get("columns", COLUMNS)),
            **{name: arrays[name] for name in _COLUMNS if name in arrays},
        )
        if listing.sha256 != sha256:
            raise DataError(f"{where} is damaged (wrong checksum)")
    except MissingKeyError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is damaged ({error}); {_REMEDY}") from None
    except DataError as error:
        raise DataError(f"{error}; {_REMEDY}") from None
    return listing


def current_listing(source: Input, saved: Listing | None, progress: ListingProgress = no_progress) -> Listing:
    """List the source, or return `saved` if its archives are unchanged."""
    archives = source.archives()
    now = (source.kind, archives, source.columns)
    if saved is not None and archives and (saved.kind, saved.archives, saved.columns) == now:
        return saved
    return source.list(progress)


def describe_changes(old: Listing, new: Listing) -> str:
    """Describe how two listings differ; empty when they name the same images, classes and columns."""
    if all(getattr(old, name) == getattr(new, name) for name in ("sha256", "class_names", "columns")):
        return ""
    if old.columns != new.columns:
        return f"columns {' and '.join(new.columns)} instead of {' and '.join(old.columns)}"
    before, now = set(old.paths), set(new.paths)
    parts = []
    for paths, state in ((now - before, "new"), (before - now, "missing")):
        if paths:
            parts.append(f"{len(paths)} {state} ({few(sorted(paths))})")
    for names, state in (
        (set(new.class_names) - set(old.class_names), "new"),
        (set(old.class_names) - set(new.class_names), "missing"),
    ):
        if names and not parts:
            return f"classes without an image are {state} ({few(sorted(names))}), which changes the labels"
    return " and ".join(parts) or "the same names with different labels"
