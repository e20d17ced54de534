"""The score card: figures with everything that they depend on, in metrics.json.

A figure without its protocol cannot be compared. The protocol of samples comes from samples.json beside them,
if it names the digest of this very file; otherwise it is unknown, and the card says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_scale import __version__
from dit_scale.errors import DataError
from dit_scale.evaluate.paper import PaperRow
from dit_scale.sampling.sample_folder import read_mark
from dit_scale.sealed import sealed, unseal
from dit_scale.storage.outputs import new_file
from dit_scale.trees import flat

if TYPE_CHECKING:
    from dit_scale.evaluate.features import NetworkIdentity
    from dit_scale.evaluate.images import ImageSet

FORMAT, VERSION = "dit-scale metrics", 1
CARD = "metrics.json"
MISSING = "-"
"""What a comparison shows for a key that a card does not have."""
_INFORMATIONAL = ("samples.source", "samples.protocol.weights.description", "reference.source")
"""Keys that only name locations."""


@dataclass(frozen=True)
class Result:
    """One figure."""

    metric: str
    network: str
    value: float
    samples: int
    """Images that were scored."""
    reference_images: int | None = None
    """Images of the reference behind this figure; None if it needs none or the file does not say."""
    standard_error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Subject:
    """What was scored."""

    source: str
    sha256: str
    images: int
    image_size: int
    preparation: str
    protocol: Mapping[str, Any] | None
    """How the samples were made; None if unknown."""


def subject_of(images: "ImageSet", sha256: str) -> Subject:
    """Describe the images; samples.json has their protocol if it names their digest. Raises DataError."""
    return Subject(
        source=images.source,
        sha256=sha256,
        images=images.count,
        image_size=images.image_size,
        preparation=images.preparation,
        protocol=_protocol_beside(Path(images.source), sha256),
    )


def _protocol_beside(samples: Path, sha256: str) -> Mapping[str, Any] | None:
    record = read_mark(samples.parent) if samples.is_file() else None
    if record is None or record["files"].get(samples.name, {}).get("sha256") != sha256:
        return None
    protocol: Mapping[str, Any] = record["protocol"]
    return protocol


def card(
    subject: Subject,
    reference: Mapping[str, Any],
    networks: "Sequence[NetworkIdentity]",
    *,
    results: Sequence[Result],
    cautions: Sequence[str],
    paper: Sequence[PaperRow],
    device: str,
) -> dict[str, Any]:
    """Return the score card as plain data."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "samples": asdict(subject),
        "reference": dict(reference),
        "networks": [asdict(identity) for identity in networks],
        "results": [asdict(result) for result in results],
        "cautions": list(cautions),
        "paper": [{"row": row.label, **row.figures} for row in paper],
        "evaluation": {
            "device": device,
            "versions": {name: version(name) for name in ("torch", "numpy", "pillow")}
            | {"dit_scale": __version__},
        },
    }


def write_card(tree: dict[str, Any], path: Path) -> None:
    """Write the card, sealed, atomically."""
    with new_file(path) as temporary:
        temporary.write_bytes(sealed(tree, indent=1))


def read_card(source: str) -> dict[str, Any]:
    """Read a card, or that of a folder. Raises DataError."""
    path = Path(source) / CARD if Path(source).is_dir() else Path(source)
    if not path.is_file():
        raise DataError(f"{path} does not exist; `dit-scale evaluate` writes it beside the samples")
    tree = unseal(path.read_bytes(), str(path), DataError)
    if (tree.get("format"), tree.get("version")) != (FORMAT, VERSION):
        raise DataError(
            f"{path}: expected {FORMAT!r} version {VERSION}, got {tree.get('format')!r} version "
            f"{tree.get('version')}"
        )
    return tree


def differences(cards: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the keys of the protocols that are not equal in all cards, with the value of each card."""
    are_known = all(tree["samples"]["protocol"] is not None for tree in cards)
    by_card = [flat(_conditions(tree, are_known)) for tree in cards]
    keys = dict.fromkeys(key for values in by_card for key in values)
    rows = {
        key: [str(values.get(key, MISSING)) for values in by_card]
        for key in keys
        if key not in _INFORMATIONAL
    }
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _conditions(tree: Mapping[str, Any], are_known: bool) -> dict[str, Any]:
    """Return all but the figures; of the protocol of samples only whether it is known, unless `are_known`."""
    conditions = {part: tree[part] for part in ("samples", "reference", "networks", "evaluation")}
    if not are_known:
        known = "unknown" if tree["samples"]["protocol"] is None else "known"
        conditions["samples"] = {**tree["samples"], "protocol": known}
    return conditions


def figures(cards: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any] | None]]:
    """Return each figure by metric and network, with the result of each card or None."""
    by_card = [{(r["metric"], r["network"]): r for r in tree["results"]} for tree in cards]
    keys = dict.fromkeys(key for results in by_card for key in results)
    return {key: [results.get(key) for results in by_card] for key in keys}
