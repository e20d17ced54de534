"""Features of a set of images, computed by all processes once and read from the cache afterwards.

Chunk k of the missing ones belongs to rank k mod W. A chunk consists of tiles; the last tile of a set is
padded, so each forward pass has the same shape and the rows have the same bits at any number of processes.

Shapes: N images, H W pixels, F pooled features.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from dit_scale.data.pixels import Pixels
from dit_scale.dist import World
from dit_scale.errors import DataError, DitScaleError
from dit_scale.evaluate.cache import F32, FeatureCache, FeatureRows
from dit_scale.evaluate.features import FeatureNetwork
from dit_scale.evaluate.images import TILE, ImageSet
from dit_scale.image_progress import ImageProgress


def say(note: str) -> None:
    """Print a note for the user, apart from the results."""
    Console(stderr=True, markup=False, highlight=False, emoji=False).print(note, soft_wrap=True)


def extract(
    images: ImageSet, sha256: str, network: FeatureNetwork, cache_root: Path, world: World
) -> FeatureRows:
    """Return the features of all images, on all ranks. Collective.

    `sha256` is the digest of the images. Raises DataError for damaged images, on all ranks.
    """
    cache = FeatureCache(cache_root, sha256, images.count, network.identity)
    if not world.broadcast(lambda: cache.is_complete(say)):
        missing = world.broadcast(cache.missing)
        problem = _compute(images, missing[world.rank :: world.size], network, cache, world)
        for error in world.gather(problem or ""):
            if error:
                raise DataError(error)
        world.broadcast(cache.assemble)
    return cache.open()


def _compute(
    images: ImageSet, own: list[range], network: FeatureNetwork, cache: FeatureCache, world: World
) -> str:
    """Compute and commit this rank's chunks. Returns what is wrong with the images, or nothing."""
    tiles = [
        range(at, min(at + TILE, chunk.stop)) for chunk in own for at in range(chunk.start, chunk.stop, TILE)
    ]
    title = f"features of {images.source} ({network.identity.name})"
    # Rank 0 shows its own share times the number of ranks.
    total, done = sum(map(len, own)) * world.size, 0
    try:
        with ImageProgress(total, title=title, shown=world.is_first) as progress:
            read = _ahead(images, tiles)
            for chunk in own:
                parts: dict[str, list[F32]] = {}
                for _ in range(chunk.start, chunk.stop, TILE):
                    pixels_NHW3 = next(read)
                    for kind, rows in _features(network, pixels_NHW3, world.device).items():
                        parts.setdefault(kind, []).append(rows)
                    done += len(pixels_NHW3) * world.size
                    progress.show(done)
                cache.write_chunk(chunk, {kind: np.concatenate(rows) for kind, rows in parts.items()})
    except DitScaleError as error:
        return str(error)
    return ""


def _features(network: FeatureNetwork, pixels_NHW3: Pixels, device: torch.device) -> dict[str, F32]:
    """Return the rows of the images of one tile by kind; a short tile is padded with its last image."""
    padding = TILE - len(pixels_NHW3)
    tile_NHW3 = np.concatenate([pixels_NHW3, np.repeat(pixels_NHW3[-1:], padding, axis=0)])
    with torch.inference_mode():
        features = network(torch.from_numpy(tile_NHW3).to(device))
    kinds = {
        "pool": features.pool_NF,
        "spatial": features.spatial_NS,
        "probabilities": features.probabilities_NC,
    }
    rows = {
        kind: tensor[: len(pixels_NHW3)].float().cpu().numpy()
        for kind, tensor in kinds.items()
        if tensor is not None
    }
    if not all(np.isfinite(array).all() for array in rows.values()):
        raise DataError(f"{network.identity.name} returned features that are not finite; check its weights")
    return rows


def _ahead(images: ImageSet, tiles: list[range]) -> Iterator[Pixels]:
    """Read tile after tile, one ahead of the network."""
    with ThreadPoolExecutor(1) as reader:
        waiting = [reader.submit(images.read, tile) for tile in tiles[:1]]
        for number in range(len(tiles)):
            waiting += [reader.submit(images.read, tile) for tile in tiles[number + 1 : number + 2]]
            yield waiting.pop(0).result()
