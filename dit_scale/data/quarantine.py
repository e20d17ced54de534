"""Damaged samples and their replacements: a pure function of the data set.

A damaged sample is replaced by the next id (N - 1 is followed by 0) that is neither damaged nor held out. Its
position stays the same, and so does every random draw.
"""

import threading
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dit_scale.errors import DataError

MAX_SHARE = 0.001
"""Largest share of a data set that may be damaged."""
MAX_FEW = 10
"""Number of samples that may be damaged regardless of the share."""


class Quarantine:
    """The damaged samples of a data set: those known at the start, and those found since."""

    def __init__(
        self,
        num_samples: int,
        known: Iterable[int],
        damaged: Literal["stop", "quarantine"],
        held_out: NDArray[np.bool_] | None = None,
    ) -> None:
        """`held_out` is true for the ids that never replace another."""
        self._num_samples, self._stop = num_samples, damaged == "stop"
        self._held_out = held_out
        self._known = frozenset(known)
        self._found: dict[int, str] = {}
        self._lock = threading.Lock()
        # At least one intact sample must remain as a replacement.
        num_trained = num_samples - (0 if held_out is None else int(held_out.sum()))
        self._most = max(0, min(max(MAX_FEW, int(MAX_SHARE * num_samples)), num_trained - 1))
        self._check_share("")

    def found(self) -> dict[int, str]:
        """Return a copy of the samples found since the start: sample id => reason."""
        with self._lock:
            return dict(self._found)

    def add(self, damaged: Mapping[int, str]) -> None:
        """Add samples that are damaged. Raises DataError if the run must stop."""
        reason = next(iter(damaged.values()))
        if self._stop:
            raise DataError(f"{reason}, or set data.damaged=quarantine to replace the sample")
        with self._lock:
            self._found.update(damaged)
        self._check_share(reason)

    def replace(self, ids: NDArray[np.int64], also: Iterable[int] = ()) -> NDArray[np.int64]:
        """Return the sample ids with every damaged one replaced, int64 of the same shape.

        `also` are further samples that are damaged.
        """
        bad = self._known | self.found().keys() | set(also)
        if not bad:
            return ids
        out = ids.copy()
        for at in np.flatnonzero(np.isin(ids, list(bad))):
            while out.flat[at] in bad or (self._held_out is not None and self._held_out[out.flat[at]]):
                out.flat[at] = (out.flat[at] + 1) % self._num_samples
        return out

    def _check_share(self, reason: str) -> None:
        count = len(self._known | self._found.keys())
        if count > self._most:
            raise DataError(
                f"{count} of {self._num_samples} samples are damaged, and at most {self._most} may be; "
                f"verify the data set and encode its damaged shards again. {reason}".rstrip()
            )
