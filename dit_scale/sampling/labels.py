"""Which class each image shows: drawn at random, as in the paper, or each class equally often.

Shapes: N images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dit_scale import rng
from dit_scale.errors import ConfigError
from dit_scale.rng import Purpose


@dataclass(frozen=True, kw_only=True)
class LabelChoice:
    """How classes are chosen."""

    drawn: str = "random"
    """"random" draws the class of each image independently and uniformly; "balanced" takes them in turn."""
    classes: tuple[int, ...] | None = None
    """The classes to choose from; None: all classes of the model."""

    def labels(self, num_images: int, num_classes: int, seed: int) -> np.ndarray:
        """Return the class of each image => (N,) int64; image i depends only on its number and the seed.

        Raises ConfigError for a class that a model with `num_classes` classes does not know.
        """
        classes = range(num_classes) if self.classes is None else self.classes
        unknown = [label for label in classes if not 0 <= label < num_classes]
        if unknown:
            raise ConfigError(f"class {unknown[0]}: expected 0 to {num_classes - 1}")
        if self.drawn == "balanced":
            return balanced_labels(classes, num_images)
        index_N = rng.integers(seed, Purpose.SAMPLE_LABEL, torch.arange(num_images), len(classes))
        return np.asarray(classes, dtype=np.int64)[index_N.numpy()]

    def protocol(self) -> dict[str, Any]:
        """Return the choice as a sample folder records it."""
        return {"drawn": self.drawn, "classes": None if self.classes is None else list(self.classes)}

    def __str__(self) -> str:
        classes = "all classes" if self.classes is None else f"classes {','.join(map(str, self.classes))}"
        return f"{'drawn at random from' if self.drawn == 'random' else 'balanced over'} {classes}"


def balanced_labels(classes: Sequence[int], num_images: int) -> np.ndarray:
    """Take the classes in turn: image i gets classes[i mod len(classes)] => (N,) int64."""
    if not classes:
        raise ConfigError("no classes to sample")
    return np.asarray(classes, dtype=np.int64)[np.arange(num_images) % len(classes)]
