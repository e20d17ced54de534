"""Score the demo's samples: do they show the requested digits, and are they new?

    python demo/score.py runs/demo/samples/samples.npz --at-least 0.95

A classifier (an SVM on 8 x 8 pixels) is trained on real digits that were enlarged like the training
images. It must recognise 97 % of the held-out digits, or the score would be meaningless. The score is
printed and written to score.json in the folder of the samples: the share of samples that the classifier
recognises as the requested class, the same with shuffled labels (chance: 10 %), and the distance of
samples to the nearest training image, compared to the distances between real digits. A model that only
memorised its training set would do well on the first and fail the last.

Shapes: N samples, M real digits, S side of an image in pixels; 8 x 8 grey levels in 0..16.
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
"""Minimum accuracy of the classifier on held-out real digits."""
COPY_PERCENTILE = 1
"""A sample is a copy if its distance to a training image is below this percentile between real digits."""
SHUFFLE_SEED = 0


@dataclass(frozen=True)
class Classifier:
    """An SVM on the 64 grey levels."""

    svm: Any

    def __call__(self, levels_N88: np.ndarray) -> np.ndarray:
        """Classify grey levels => (N,)."""
        return self.svm.predict(levels_N88.reshape(len(levels_N88), -1))

    def share_recognised(self, levels_N88: np.ndarray, labels_N: np.ndarray) -> float:
        """Share of images that are classified as their label."""
        return float(np.mean(self(levels_N88) == labels_N))


def fit_classifier(levels_M88: np.ndarray, labels_M: np.ndarray) -> Classifier:
    """Train the classifier on real digits."""
    from sklearn.svm import SVC

    return Classifier(SVC(C=10.0, gamma="scale").fit(levels_M88.reshape(len(levels_M88), -1), labels_M))


def nearest(levels_N88: np.ndarray, levels_M88: np.ndarray, num_skipped: int = 0) -> np.ndarray:
    """Distance of each image to the nearest of the others, skipping the `num_skipped` nearest => (N,)."""
    a_N64, b_M64 = levels_N88.reshape(-1, SIDE * SIDE), levels_M88.reshape(-1, SIDE * SIDE)
    square_NM = (a_N64**2).sum(1)[:, None] + (b_M64**2).sum(1) - 2 * a_N64 @ b_M64.T
    square_N = np.partition(square_NM, num_skipped, axis=1)[:, num_skipped]
    return np.sqrt(np.maximum(square_N, 0.0))


def read_samples(npz_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read uint8 images (N, S, S, 3) and requested classes (N,). Raises DataError for an invalid file."""
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
    """Score a file of samples, with real digits from `image_folder` or scikit-learn.

    Writes the score to score.json in the folder of the samples and returns it. Raises DataError if the
    samples cannot be read, or the classifier recognises less than 97 % of the held-out real digits.
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
            f"the classifier recognises {accuracy:.1%} of {len(held_out)} held-out real digits, expected "
            f"{MIN_HELD_OUT:.0%} or more; check that the images in {image_folder} are those of demo/digits.py"
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
    """Measure the distance of samples to the nearest real digit, and of each real digit to the nearest other.

    The model was trained on all digits, so each real digit is compared to all others.
    """
    sample_N = nearest(levels_N88, real_M88)
    real_M = nearest(real_M88, real_M88, num_skipped=1)  # the nearest one is the digit itself
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
    """Print the score as tables."""
    table = Table(title=f"{result['samples']} samples", title_justify="left")
    table.add_column("recognised by the classifier")
    table.add_column("share", justify="right")
    table.add_row("held-out real digits (accuracy of the classifier)", f"{result['classifier_held_out']:.1%}")
    for label, share in result["recognised_per_class"].items():
        table.add_row(f"  samples of class {label}", f"{share:.1%}")
    table.add_row("samples, as the requested class", f"{result['recognised']:.1%}", style="bold")
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
        f"copies: {result['copies']} of {result['samples']} samples are closer than "
        f"{result['copy_threshold']:.1f} to a training image, as are {COPY_PERCENTILE} % of real digits to "
        "another one"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Score the demo's samples.")
    parser.add_argument("samples", type=Path, help="samples.npz of `dit-scale sample`")
    parser.add_argument(
        "--images", type=Path, help="folder of demo/digits.py (default: load from scikit-learn)"
    )
    parser.add_argument(
        "--at-least", type=float, default=0.0, help="exit with 1 if the recognised share is lower"
    )
    arguments = parser.parse_args()
    try:
        result = score(arguments.samples, arguments.images)
    except DitScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(result, Console())
    if result["recognised"] < arguments.at_least:
        print(
            f"error: {result['recognised']:.1%} of the samples show the requested class, expected "
            f"{arguments.at_least:.1%} or more",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
