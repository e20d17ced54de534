"""The power-function averages that a run stored, and averages of other widths rebuilt from them."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import EmaProfile
from dit_scale.errors import CheckpointError
from dit_scale.inference import posthoc
from dit_scale.inference.posthoc import PowerProfile
from dit_scale.inference.sources import WeightsSource, source_of_run
from dit_scale.storage import Storage
from dit_scale.train import averages
from dit_scale.train.ema import ema_kind


@dataclass(frozen=True)
class StoredAverage:
    """A power-function average that a run stored."""

    checkpoint: Checkpoint
    """Checkpoint that holds the average, with or without other state."""
    name: str
    """Name of its EMA profile in the run's configuration."""
    profile: PowerProfile
    since_step: int = 0
    """First step that it tracks; an upper bound if the checkpoint does not record it."""

    @property
    def foreign_share(self) -> float:
        """Weight of the values it started from, which are no average (`dit_scale.train.averages`)."""
        tracked = EmaProfile(name=self.name, sigma_rel=self.profile.sigma_rel)
        return averages.foreign_share(tracked, self.since_step, self.profile.step)

    @property
    def flaw(self) -> str:
        """Why the average deviates from its profile; empty if it does not."""
        return averages.describe_share(self.since_step, self.foreign_share)


def stored_averages(root: Storage) -> tuple[list[StoredAverage], list[str]]:
    """Return all power-function averages below a state root, by step and width, and the checkpoints' errors.

    Of two averages with the same width and step, the result has the one that is closer to its profile.
    Checkpoints that cannot be opened are left out; their error messages form the second list.
    """
    opened: list[tuple[Checkpoint, tuple[EmaProfile, ...]]] = []
    problems = []
    candidates = [(one, folder) for folder in (CHECKPOINTS, EMA) for one in committed(root, folder)]
    for checkpoint_id, folder in candidates:
        try:
            checkpoint = Checkpoint(root, checkpoint_id, folder)
            opened.append((checkpoint, checkpoint.config.ema))
        except CheckpointError as error:
            problems.append(str(error))
    best: dict[PowerProfile, StoredAverage] = {}
    for average in _with_since_steps(sorted(opened, key=lambda pair: pair[0].manifest.step)):
        rival = best.get(average.profile)
        if rival is None or average.foreign_share <= rival.foreign_share:
            best[average.profile] = average
    by_step_and_width = sorted(best.values(), key=lambda one: (one.profile.step, one.profile.sigma_rel))
    return by_step_and_width, problems


def _with_since_steps(
    opened: Iterable[tuple[Checkpoint, tuple[EmaProfile, ...]]],
) -> Iterator[StoredAverage]:
    """Yield the averages of these checkpoints, in step order, with the step since which each is tracked.

    If a checkpoint does not record that step and the previous checkpoint lacks the profile or has it with
    another width, the profile is tracked since this checkpoint at the latest.
    """
    previous: dict[EmaProfile, int] | None = None
    for checkpoint, profiles in opened:
        step, recorded = checkpoint.manifest.step, checkpoint.manifest.ema_since
        since = {
            profile: recorded.get(profile.name, 0 if previous is None else previous.get(profile, step))
            for profile in profiles
        }
        for profile, since_step in since.items():
            if step and profile.sigma_rel is not None and ema_kind(profile.name) in checkpoint.kinds():
                power = PowerProfile(profile.sigma_rel, step)
                yield StoredAverage(checkpoint, profile.name, power, since_step)
        previous = since


def reconstruct(
    stored: Sequence[StoredAverage],
    target: PowerProfile,
    show: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> WeightsSource:
    """Rebuild the target average from the averages stored up to its step (`dit_scale.inference.posthoc`).

    It works on one parameter at a time, so the result is the only full model in memory. `show` wraps the
    parameter names, for a progress bar. Raises CheckpointError if the stored averages cannot approximate
    the target well enough, or one of them is damaged.
    """
    fit = posthoc.fit([average.profile for average in stored], target)
    used = [(average, weight) for average, weight in zip(stored, fit.weights, strict=True) if weight]
    newest = used[-1][0].checkpoint
    trained = {}
    for parameter in show(newest.manifest.model_shapes):
        shape = newest.manifest.model_shapes[parameter]
        total = torch.zeros(math.prod(shape), dtype=torch.float64)
        for average, weight in used:
            values = average.checkpoint.read(ema_kind(average.name), parameter, 0, len(total))
            total.add_(values, alpha=weight)
        trained[parameter] = total.float().reshape(shape)
    parts = [
        {"checkpoint": str(average.checkpoint), "profile": average.name, "weight": weight}
        for average, weight in used
    ]
    return source_of_run(
        newest,
        trained,
        f"EMA of sigma_rel {target.sigma_rel:g} at step {target.step}, reconstructed from {len(used)} stored "
        f"averages of {newest.storage.url} (predicted error {fit.error:.2%})",
        {"predicted_error": f"{fit.error:.2e}", "rebuilt_from": json.dumps(parts)},
    )
