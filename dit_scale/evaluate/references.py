"""What images are compared with: published statistics, a file of ours, or a set of images.

    ADM      mu, sigma, mu_s, sigma_s, arr_0    statistics of all images, and the images for neighbours
    EDM      mu, sigma
    ours     the same statistics, features instead of arr_0, for any number of networks, and their protocol

Another resolution, network or number of features than the reference's is refused.

Shapes: M images, F pooled features, S spatial features.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dit_scale.dist import World
from dit_scale.errors import DataError
from dit_scale.evaluate.cache import F32, FeatureRows
from dit_scale.evaluate.features import FeatureNetwork, NetworkIdentity
from dit_scale.evaluate.images import ImageSet, open_images
from dit_scale.evaluate.images.npz import IMAGES, NpzFile, NpzImages
from dit_scale.evaluate.moments import F64, Gaussian, HasGaussian
from dit_scale.evaluate.statistics import chosen_rows, moments_of
from dit_scale.sealed import sealed, unseal
from dit_scale.storage.outputs import new_file

FORMAT, VERSION = "dit-scale reference", 1
PROTOCOL = "protocol"
"""Name of the array in a file of ours that holds its protocol: sealed JSON as bytes."""

Extract = Callable[[ImageSet, str], FeatureRows]
"""Features of a set of images, whose digest is given, under one network; collective."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """What a reference says under one network."""

    pool: HasGaussian
    count: int | None
    """Images behind the Gaussians; None if the file does not say."""
    spatial: HasGaussian | None = None
    rows_MF: F32 | None = None
    """Features of single images, for neighbours and KID."""


class Reference(Protocol):
    """Statistics to compare with, under one network or several."""

    image_size: int | None
    """Side of its images; None if unknown."""

    def description(self) -> dict[str, Any]:
        """Return what the score card says about it."""
        ...

    def statistics(self, network: FeatureNetwork, extract: Extract, world: World) -> Statistics:
        """Return the statistics for a network, on all ranks; DataError for another network. Collective."""
        ...


class ImageReference:
    """A set of images, whose features are computed."""

    def __init__(self, images: ImageSet, sha256: str) -> None:
        self.images, self._sha256 = images, sha256
        self.image_size: int | None = images.image_size

    def description(self) -> dict[str, Any]:
        return {
            "source": self.images.source,
            "images_sha256": self._sha256,
            "images": self.images.count,
            "image_size": self.image_size,
            "preparation": self.images.preparation,
        }

    def statistics(self, network: FeatureNetwork, extract: Extract, world: World) -> Statistics:
        rows = extract(self.images, self._sha256)
        return Statistics(
            pool=moments_of(rows.pool_NF, world),
            count=self.images.count,
            spatial=None if rows.spatial_NS is None else moments_of(rows.spatial_NS, world),
            rows_MF=rows.pool_NF[chosen_rows(self.images.count)],
        )


class PublishedReference:
    """A file of another program: `mu` and `sigma`, ADM's also with `mu_s`, `sigma_s` and images."""

    def __init__(self, path: Path, npz: NpzFile, sha256: str) -> None:
        self._path, self._sha256 = path, sha256
        self._pool = _gaussian(npz, "mu", "sigma")
        self._spatial = _gaussian(npz, "mu_s", "sigma_s") if "mu_s" in npz.names else None
        self._images = NpzImages(path) if IMAGES in npz.names else None
        self.image_size: int | None = self._images.image_size if self._images else None

    def description(self) -> dict[str, Any]:
        return {
            "source": str(self._path),
            "sha256": self._sha256,
            "images": None,
            "image_size": self.image_size,
            "features": len(self._pool.mean_F),
            "images_for_neighbours": self._images.count if self._images else 0,
        }

    def statistics(self, network: FeatureNetwork, extract: Extract, world: World) -> Statistics:
        got = num_features(network, self.image_size or 32, world.device)
        for name, gaussian, width in (("mu", self._pool, got[0]), ("mu_s", self._spatial, got[1])):
            if gaussian is not None and len(gaussian.mean_F) != width:
                raise DataError(
                    f"{self._path} has {len(gaussian.mean_F)} features in {name}, the network "
                    f"{network.identity.name} has {width}; pass the network that made the reference"
                )
        rows_MF = extract(self._images, self._sha256).pool_NF if self._images else None
        return Statistics(self._pool, None, self._spatial, rows_MF)


class OwnReference:
    """A file that `write_reference` wrote."""

    def __init__(self, path: Path, npz: NpzFile, sha256: str) -> None:
        self._path, self._npz, self._sha256 = path, npz, sha256
        data = npz.array(PROTOCOL)
        self._protocol = unseal(data.tobytes(), f"{path}: {PROTOCOL}", DataError)
        format_, version = self._protocol.get("format"), self._protocol.get("version")
        if (format_, version) != (FORMAT, VERSION):
            raise DataError(
                f"{path}: expected {FORMAT!r} version {VERSION}, got {format_!r} version {version}; write "
                "it again with --make-reference"
            )
        self.image_size: int | None = self._protocol["image_size"]

    def description(self) -> dict[str, Any]:
        kept = ("images_sha256", "images", "image_size", "preparation")
        origin = {"source": str(self._path), "sha256": self._sha256, "made_from": self._protocol["source"]}
        return origin | {key: self._protocol[key] for key in kept}

    def statistics(self, network: FeatureNetwork, extract: Extract, world: World) -> Statistics:
        wanted = asdict(network.identity)
        for number, entry in enumerate(self._protocol["networks"]):
            if entry == wanted:
                return self._read(number)
        made_with = "; ".join(_name(NetworkIdentity(**entry)) for entry in self._protocol["networks"])
        raise DataError(
            f"{self._path} was made with {made_with}, and this is {_name(network.identity)}; pass the same "
            "network, or write another reference with --make-reference"
        )

    def _read(self, number: int) -> Statistics:
        names = _array_names(number)
        has_spatial = names["mu_s"] in self._npz.names
        return Statistics(
            pool=_gaussian(self._npz, names["mu"], names["sigma"]),
            count=self._protocol["images"],
            spatial=_gaussian(self._npz, names["mu_s"], names["sigma_s"]) if has_spatial else None,
            rows_MF=self._npz.array(names["features"]),
        )


def open_reference(
    source: str,
    digest: Callable[[ImageSet], str],
    *,
    device: torch.device,
    crop: int | None = None,
    vae: str | None = None,
) -> Reference:
    """Open a reference file, or images to compute one from. Raises DataError for anything else."""
    path = Path(source)
    if path.is_file() and path.suffix in (".pkl", ".pickle"):
        raise DataError(
            f"{source} is a pickle, which can run code when it is loaded. If you trust it, convert it: "
            "python -c \"import pickle, numpy; r = pickle.load(open('F.pkl', 'rb')); r = r.get('fid', r); "
            "numpy.savez('F.npz', mu=r['mu'], sigma=r['sigma'])\""
        )
    if path.is_file() and path.suffix == ".npz":
        npz = NpzFile(path)
        if PROTOCOL in npz.names:
            return OwnReference(path, npz, npz.sha256())
        if "mu" in npz.names:
            return PublishedReference(path, npz, npz.sha256())
        if IMAGES not in npz.names:
            raise DataError(
                f"{source} has {', '.join(npz.names) or 'nothing'}; expected mu and sigma (a reference), or "
                f"{IMAGES} (images)"
            )
    images = open_images(source, device=device, crop=crop, vae=vae)
    return ImageReference(images, digest(images))


@dataclass(frozen=True, eq=False)
class MadeReference:
    """The statistics of a set of images under several networks, to be written."""

    images: ImageSet
    images_sha256: str
    made: list[tuple[NetworkIdentity, Statistics]] = field(default_factory=list)


def write_reference(reference: MadeReference, path: Path) -> None:
    """Write a reference: the same bytes for the same source and networks."""
    protocol = {
        "format": FORMAT,
        "version": VERSION,
        "source": reference.images.source,
        "images_sha256": reference.images_sha256,
        "images": reference.images.count,
        "image_size": reference.images.image_size,
        "preparation": reference.images.preparation,
        "networks": [asdict(identity) for identity, _ in reference.made],
    }
    arrays: dict[str, np.ndarray] = {PROTOCOL: np.frombuffer(sealed(protocol), np.uint8)}
    for number, (_, statistics) in enumerate(reference.made):
        names = _array_names(number)
        arrays[names["mu"]] = statistics.pool.mean_F
        arrays[names["sigma"]] = statistics.pool.covariance_FF
        if statistics.spatial is not None:
            arrays[names["mu_s"]] = statistics.spatial.mean_F
            arrays[names["sigma_s"]] = statistics.spatial.covariance_FF
        assert statistics.rows_MF is not None
        arrays[names["features"]] = statistics.rows_MF
    with new_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the keywords for options


def num_features(network: FeatureNetwork, image_size: int, device: torch.device) -> tuple[int, int | None]:
    """Return how many pooled and spatial features a network has, by showing it one black image."""
    blank_1HW3 = torch.zeros((1, image_size, image_size, 3), dtype=torch.uint8, device=device)
    with torch.inference_mode():
        features = network(blank_1HW3)
    spatial_NS = features.spatial_NS
    return features.pool_NF.shape[1], None if spatial_NS is None else spatial_NS.shape[1]


def _array_names(number: int) -> dict[str, str]:
    """Return the names of a network's arrays; those of the first are the names of ADM's files."""
    suffix = f"_{number + 1}" if number else ""
    return {name: f"{name}{suffix}" for name in ("mu", "sigma", "mu_s", "sigma_s", "features")}


def _gaussian(npz: NpzFile, mean: str, covariance: str) -> Gaussian:
    for name in (mean, covariance):
        if name not in npz.names:
            raise DataError(f"{npz.path} has no {name}; it has {', '.join(npz.names)}")
    mean_F: F64 = npz.array(mean)
    covariance_FF: F64 = npz.array(covariance)
    shapes_fit = mean_F.ndim == 1 and covariance_FF.shape == 2 * mean_F.shape
    if not shapes_fit or {mean_F.dtype.kind, covariance_FF.dtype.kind} != {"f"}:
        raise DataError(
            f"{npz.path}: expected {mean} (F,) and {covariance} (F, F) of floats, got {mean_F.dtype} "
            f"{mean_F.shape} and {covariance_FF.dtype} {covariance_FF.shape}"
        )
    return Gaussian(mean_F.astype(np.float64), covariance_FF.astype(np.float64))


def _name(identity: NetworkIdentity) -> str:
    return json.dumps(asdict(identity) | {"weights_sha256": identity.weights_sha256[:12]})
