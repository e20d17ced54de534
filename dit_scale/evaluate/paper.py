"""The paper's figures, to print beside our own.

Peebles, Xie, "Scalable Diffusion Models with Transformers", 2023.

All of 50,000 samples of ImageNet by 250 steps of DDPM, guidance on the first three latent channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PaperRow:
    """A row of a table of the paper."""

    label: str
    figures: Mapping[str, float]


def _row(label: str, *figures: float) -> PaperRow:
    names = ("FID", "sFID", "IS", "precision", "recall")
    return PaperRow(label, dict(zip(names, figures, strict=True)))


FINAL = {
    (256, 1.0): _row("7M steps, no guidance", 9.62, 6.85, 121.50, 0.67, 0.67),
    (256, 1.25): _row("7M steps, guidance 1.25", 3.22, 5.28, 201.77, 0.76, 0.62),
    (256, 1.5): _row("7M steps, guidance 1.5", 2.27, 4.60, 278.24, 0.83, 0.57),
    (512, 1.0): _row("3M steps, no guidance", 12.03, 7.12, 105.25, 0.75, 0.64),
    (512, 1.25): _row("3M steps, guidance 1.25", 4.64, 5.77, 174.77, 0.81, 0.57),
    (512, 1.5): _row("3M steps, guidance 1.5", 3.04, 5.02, 240.82, 0.84, 0.54),
}
"""Final results of DiT-XL/2 (Tables 2 and 3), by image size and guidance."""

AT_400K = {
    "DiT-S/8": 153.60,
    "DiT-S/4": 100.41,
    "DiT-S/2": 68.40,
    "DiT-B/8": 122.74,
    "DiT-B/4": 68.38,
    "DiT-B/2": 43.47,
    "DiT-L/8": 118.87,
    "DiT-L/4": 45.64,
    "DiT-L/2": 23.33,
    "DiT-XL/8": 106.41,
    "DiT-XL/4": 43.01,
    "DiT-XL/2": 19.47,
}
"""FID-50K at 256 px after 400,000 steps without guidance (Table 4)."""


def rows_beside(protocol: Mapping[str, Any] | None) -> list[PaperRow]:
    """Return the rows of the paper for the model, image size and guidance of these samples, if any."""
    if protocol is None:
        return []
    name, size = protocol["model"].get("name"), protocol["image_size"]
    guidance = float(protocol["sampling"]["guidance"])
    if protocol["model"].get("num_classes") != 1000:
        return []
    rows = []
    if name == "DiT-XL/2" and (size, guidance) in FINAL:
        rows.append(FINAL[size, guidance])
    if guidance == 1 and size == 256 and name in AT_400K:
        rows.append(PaperRow("400K steps, no guidance", {"FID": AT_400K[name]}))
    return rows
