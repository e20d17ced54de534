"""The split of a data set into held-out and trained samples: these literals must never change.

docs/formats.md quotes them.
"""

from pathlib import Path

import numpy as np
import pytest

from dit_scale.data.held_out import fractions, held_out_mask
from dit_scale.data.order import Order

FORMATS = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()

SPLITS = [
    (40, 0.25, 0, "2 4 6 8 20 24 25 30 31 39"),
    (40, 0.25, 1, "3 15 18 23 27 34 36 38"),
    (1000, 0.01, 42, "55 122 123 138 365 488 500 647 776 936"),
]


@pytest.mark.parametrize(("num_samples", "share", "seed", "expected"), SPLITS)
def test_held_out_samples(num_samples: int, share: float, seed: int, expected: str) -> None:
    mask = held_out_mask(num_samples, share, seed)
    assert mask is not None
    assert " ".join(map(str, np.flatnonzero(mask))) == expected


def test_fractions_to_the_bit() -> None:
    expected = ["0x1.3a8a805ad81a6p-1", "0x1.577df2e5e59d8p-1", "0x1.a8000b901727cp-3"]
    assert [number.hex() for number in fractions(3, 0).tolist()] == expected


@pytest.mark.parametrize(
    ("window_shards", "expected"),
    [
        (0, "3 0 12 1 13 19 18 15 17 16 11 9 5 10 7 14 16 10 14 0"),
        (2, "19 11 9 18 10 0 15 3 1 16 17 12 14 13 7 5 18 19 12 14"),
    ],
)
def test_order_of_the_other_samples(window_shards: int, expected: str) -> None:
    order = Order(20, 0, (5, 3, 4, 6, 2), window_shards, held_out_mask(20, 0.25, 0))
    assert " ".join(map(str, order.ids(np.arange(20, dtype=np.int64)))) == expected


def test_the_documentation_quotes_them() -> None:
    for split in SPLITS:
        assert f"| {' | '.join(map(str, split))} |" in FORMATS
