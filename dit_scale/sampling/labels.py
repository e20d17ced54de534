"""Which class each image shows."""

from collections.abc import Sequence

from dit_scale.errors import ConfigError


def balanced_labels(classes: Sequence[int], num: int) -> list[int]:
    """Cycle through the classes: image i gets classes[i mod len(classes)]."""
    if not classes:
        raise ConfigError("no classes to sample")
    return [classes[i % len(classes)] for i in range(num)]
