"""How good the demo's samples are: are they the digits asked for, and are they new ones?

    python demo/score.py runs/demo/samples/samples.npz --at-least 0.95

A classifier (an SVM on 8 x 8 pixels) learns from real digits which went through the same enlarging as
the training images, and must know 97 % of the held-out ones, else its word is worth nothing. Printed
and written to score.json beside the samples: the share of samples that it recognises as the class
asked for, the same with the labels shuffled (chance: 10 %), and how far samples are from the nearest
digit that the model was trained on, beside how far real digits are from each other. A model that
only repeats its training set would score well on the first and show in the last.

Shapes: N samples, M real digits, S side of an image in pixels; 8 x 8 ink levels in 0..16.
"""

import argparse
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from digits import SIDE, crops, split, to_levels
from rich.console import Console
from rich.table import Table

from dit_scale.errors import DataError, DitScaleError

MIN_HELD_OUT = 0.97
"""A classifier that knows fewer of the held-out real digits is no judge."""
COPY_PERCENTILE = 1
"""Samples nearer to a training image than this percentile of real digits to each other count as copies."""
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Classifier:
    """An SVM over the 64 ink levels."""

    svm: Any

    def __call__(self, levels_N88: np.ndarray) -> np.ndarray:
        """Ink levels => classes (N,)."""
        return self.svm.predict(levels_N88.reshape(len(levels_N88), -1))

    def share_recognised(self, levels_N88: np.ndarray, labels_N: np.ndarray) -> float:
        """Share of images whose class is the label."""
        return float(np.mean(self(levels_N88) == labels_N))


def fit_classifier(levels_M88: np.ndarray, labels_M: np.ndarray) -> Classifier:
    """Learn the classes of real digits."""
    from sklearn.svm import SVC

    return Classifier(SVC(C=10.0, gamma="scale").fit(levels_M88.reshape(len(levels_M88), -1), labels_M))


def nearest(levels_N88: np.ndarray, levels_M88: np.ndarray, num_skipped: int = 0) -> np.ndarray:
    """Euclidean distance (N,) of each image to the nearest of the others, after the `num_skipped` nearest."""
    a_N64, b_M64 = levels_N88.reshape(-1, SIDE * SIDE), levels_M88.reshape(-1, SIDE * SIDE)
    square_NM = (a_N64**2).sum(1)[:, None] + (b_M64**2).sum(1) - 2 * a_N64 @ b_M64.T
    square_N = np.partition(square_NM, num_skipped, axis=1)[:, num_skipped]
    return np.sqrt(np.maximum(square_N, 0.0))


def read_samples(npz_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, S, S, 3) and the classes asked for (N,); DataError says what is wrong with the file."""
    try:
        with np.load(npz_path) as arrays:
            images_NSS3, labels_N = arrays["arr_0"], arrays["arr_1"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{npz_path}: expected the samples.npz of `dit-scale sample`, with arr_0 and arr_1: {error}"
        ) from None
    shape = images_NSS3.shape
    is_square = len(shape) == 4 and shape[1] == shape[2] and shape[1] % SIDE == 0 and shape[3] == 3
    if images_NSS3.dtype != np.uint8 or not is_square or not shape[0] or labels_N.shape != shape[:1]:
        raise DataError(
            f"{npz_path}: expected arr_0 uint8 (N, S, S, 3), S a multiple of {SIDE}, and arr_1 (N,); "
            f"got {images_NSS3.dtype} {shape} and {labels_N.shape}"
        )
    return images_NSS3, labels_N


def score(npz_path: str | Path, image_folder: str | Path | None = None) -> dict[str, Any]:
    """Judge a file of samples; the real digits come from `image_folder`, or from scikit-learn.

    Writes score.json beside the samples and returns what it holds. DataError when the samples cannot be
    read, or the classifier knows fewer than 97 % of the held-out real digits.
    """
    npz_path = Path(npz_path)
    images_NSS3, labels_N = read_samples(npz_path)
    real_MSS3, real_labels_M = crops(images_NSS3.shape[1], image_folder)
    levels_N88, real_M88 = to_levels(images_NSS3), to_levels(real_MSS3)
    fit, held_out = split(real_labels_M)
    classifier = fit_classifier(real_M88[fit], real_labels_M[fit])
    accuracy = classifier.share_recognised(real_M88[held_out], real_labels_M[held_out])
    if accuracy < MIN_HELD_OUT:
        raise DataError(
            f"the classifier knows {accuracy:.1%} of {len(held_out)} held-out real digits, expected "
            f"{MIN_HELD_OUT:.0%} or more: are the images in {image_folder} those of demo/digits.py?"
        )
    is_right_N = classifier(levels_N88) == labels_N
    shuffled_N = np.random.default_rng(SHUFFLE_SEED).permutation(labels_N)
    result = {
        "samples": len(labels_N),
        "classifier_held_out": accuracy,
        "recognised": float(is_right_N.mean()),
        "recognised_per_class": {
            str(label): float(is_right_N[labels_N == label].mean()) for label in np.unique(labels_N)
        },
        "recognised_shuffled_labels": classifier.share_recognised(levels_N88, shuffled_N),
        **distances(levels_N88, real_M88),
    }
    (npz_path.parent / "score.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def distances(levels_N88: np.ndarray, real_M88: np.ndarray) -> dict[str, Any]:
    """How far samples are from the nearest real digit, and real digits from the nearest other one.

    The model trained on all of the digits, so the real side holds out each in turn against all others.
    """
    sample_N = nearest(levels_N88, real_M88)
    real_M = nearest(real_M88, real_M88, num_skipped=1)  # the nearest one is itself
    threshold = float(np.percentile(real_M, COPY_PERCENTILE))
    return {
        "distance_samples": _spread(sample_N),
        "distance_real": _spread(real_M),
        "copy_threshold": threshold,
        "copies": int((sample_N < threshold).sum()),
    }


def _spread(distance_N: np.ndarray) -> dict[str, float]:
    return {
        "median": float(np.median(distance_N)),
        "percentile_5": float(np.percentile(distance_N, 5)),
        "min": float(distance_N.min()),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print the result as tables."""
    table = Table(title=f"{result['samples']} samples", title_justify="left")
    table.add_column("recognised by the classifier")
    table.add_column("share", justify="right")
    table.add_row("held-out real digits (the classifier's worth)", f"{result['classifier_held_out']:.1%}")
    for label, share in result["recognised_per_class"].items():
        table.add_row(f"  samples of class {label}", f"{share:.1%}")
    table.add_row("samples, as the class asked for", f"{result['recognised']:.1%}", style="bold")
    table.add_row("samples, labels shuffled (control)", f"{result['recognised_shuffled_labels']:.1%}")
    console.print(table)
    table = Table("distance to the nearest training image", "median", "5 %", "min")
    for name, key in (
        ("samples", "distance_samples"),
        ("real digits, each against all others", "distance_real"),
    ):
        spread = result[key]
        table.add_row(name, *(f"{spread[part]:.1f}" for part in ("median", "percentile_5", "min")))
    console.print(table)
    console.print(
        f"copies: {result['copies']} of {result['samples']} samples are nearer than "
        f"{result['copy_threshold']:.1f} to a training image; {COPY_PERCENTILE} % of real digits are so near "
        "to another one"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Score the demo's samples.")
    parser.add_argument("samples", type=Path, help="samples.npz of `dit-scale sample`")
    parser.add_argument("--images", type=Path, help="folder of demo/digits.py; default: from scikit-learn")
    parser.add_argument("--at-least", type=float, default=0.0, help="share recognised below which to exit 1")
    arguments = parser.parse_args()
    try:
        result = score(arguments.samples, arguments.images)
    except DitScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(result, Console())
    if result["recognised"] < arguments.at_least:
        print(
            f"error: {result['recognised']:.1%} of the samples are recognised as asked for, expected "
            f"{arguments.at_least:.1%} or more",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
