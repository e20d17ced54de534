"""Compare samples of a data set with their source images.

Shapes: H W image sides.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from dit_scale.data.pixels import Pixels
from dit_scale.data.shards import LatentDataset
from dit_scale.errors import DataError
from dit_scale.inference.preview import decode, side_by_side
from dit_scale.vae import Vae
from dit_scale_pipeline.decoder import read_batch
from dit_scale_pipeline.inputs import COLUMNS, Listing, open_input
from dit_scale_pipeline.inputs.saved import current_listing, describe_changes, load_listing
from dit_scale_pipeline.progress import listing_bar


@dataclass(frozen=True)
class Compared:
    """A sample and its source image."""

    sample_id: int
    label: int
    path: str
    psnr_db: float
    """PSNR of the decoded image view against the crop."""
    picture: Pixels
    """The crop, then the decoded views, side by side."""


def find_source(dataset: LatentDataset, source: str | None, console: Console) -> tuple[str, Listing]:
    """Return the place of a data set's source images and their listing.

    `source` is where the images are now, if not at the place in dataset.json. Raises DataError when they are
    missing or have changed.
    """
    info = dataset.info
    uri = source or info.source.uri
    saved = load_listing(dataset.storage)
    try:
        with listing_bar(console) as progress:
            images = open_input(uri, columns=saved.columns if saved else COLUMNS)
            listing = current_listing(images, saved, progress)
    except DataError as error:
        raise DataError(
            f"cannot list the images of {dataset.storage.url} at {uri}; if they have moved, pass --source"
            f"\n{error}"
        ) from None
    if (listing.sha256, listing.class_names) != (info.source.listing_sha256, info.class_names):
        changes = describe_changes(saved, listing) if saved else ""
        raise DataError(
            f"the source has changed, nothing was compared: {uri} lists {len(listing)} images of "
            f"{len(listing.class_names)} classes, sha256 {listing.sha256[:12]}; the data set was made from "
            f"{info.source.count} images of {info.num_classes} classes, "
            f"sha256 {info.source.listing_sha256[:12]}" + (f". Changes: {changes}" if changes else "")
        )
    return uri, listing


def compare(
    dataset: LatentDataset, uri: str, listing: Listing, decoder: Vae, ids: Sequence[int]
) -> Iterator[Compared]:
    """Yield each sample next to the crop of its image; DataError when an image is now unreadable."""
    for sample_id in ids:
        place = dataset.locate(sample_id)
        key = int(dataset.records(place.shard)[place.row]["key"])
        (entry,) = listing.entries(range(key, key + 1))
        crops, batch = read_batch(uri, listing.kind, [entry], dataset.info.image_size, listing.columns)
        if batch.rejected:
            raise DataError(
                f"{uri}: {entry.path}, the source of sample {sample_id}, can no longer be decoded: "
                f"{batch.rejected[0][1]}"
            )
        views, label = decode(dataset, decoder, sample_id)
        picture = side_by_side([crops[0], *views])
        yield Compared(sample_id, label, entry.path, psnr(crops[0], views[0]), picture)


def psnr(one_HW3: Pixels, other_HW3: Pixels) -> float:
    """Return the peak signal-to-noise ratio of two uint8 images in dB: 10 log10(255^2 / MSE)."""
    mean_square = float(np.mean((one_HW3.astype(np.float64) - other_HW3) ** 2))
    return 10 * math.log10(255**2 / mean_square) if mean_square else math.inf
