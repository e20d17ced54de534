"""The state of a run that survives a restart in addition to its tensors."""

from dataclasses import dataclass, field, replace

from dit_scale.checkpoint.attempts import Ranges
from dit_scale.checkpoint.manifest import Evaluated, Manifest
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig
from dit_scale.train.averages import since_steps


@dataclass
class RunState:
    """What survives a restart in addition to the tensors."""

    step: int = 0
    """Steps taken, including skipped ones."""
    pending: tuple[tuple[float, ...], ...] = ()
    """Meter rows of the steps since the last log point."""
    guard: dict[str, float] | None = None
    """None before the first step."""
    skipped: tuple[int, ...] = ()
    """Steps, counted from 1, whose update was skipped."""
    excluded: Ranges = ()
    """Ranges of positions that the run does not train on."""
    quarantined: dict[int, str] = field(default_factory=dict)
    """Sample id => why the sample is replaced."""
    ema_since: dict[str, int] = field(default_factory=dict)
    """EMA profile => step since which its average is tracked, where known."""
    evaluated: Evaluated | None = None
    """The last evaluation; None before the first one."""

    @classmethod
    def of(cls, manifest: Manifest, excluded: Ranges) -> "RunState":
        """The state in a manifest; `excluded` are further ranges, excluded since."""
        return cls(
            manifest.step,
            manifest.pending_metrics,
            manifest.guard,
            manifest.skipped_steps,
            merge_ranges((*manifest.excluded_positions, *excluded)),
            dict(manifest.quarantined),
            evaluated=manifest.evaluated,
        )


def state_of(config: TrainConfig, checkpoint: Checkpoint | None, excluded: Ranges) -> RunState:
    """The state of a run that resumes from this checkpoint (None: a new run)."""
    state = RunState.of(checkpoint.manifest, excluded) if checkpoint else RunState(excluded=excluded)
    return replace(state, ema_since=since_steps(config.ema, checkpoint))


def merge_ranges(ranges: Ranges) -> Ranges:
    """Return the same positions as sorted, disjoint, half-open ranges."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
