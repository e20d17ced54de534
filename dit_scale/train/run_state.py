"""The state of a run that survives a restart in addition to its tensors."""

from dataclasses import dataclass, field, replace

from dit_scale.checkpoint.attempts import Ranges
from dit_scale.checkpoint.manifest import Manifest
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import TrainConfig
from dit_scale.train.averages import since_steps


@dataclass
class RunState:
    """What survives a restart beside the tensors."""

    step: int = 0
    """Steps taken, the skipped ones among them."""
    pending: tuple[tuple[float, ...], ...] = ()
    """Rows of the steps since the last log point."""
    guard: dict[str, float] | None = None
    """None before the first step."""
    skipped: tuple[int, ...] = ()
    """Steps, counted from 1, whose update was left out."""
    excluded: Ranges = ()
    """Ranges of positions that the run leaves out."""
    quarantined: dict[int, str] = field(default_factory=dict)
    """Sample id => why it cannot be read."""
    ema_since: dict[str, int] = field(default_factory=dict)
    """Profile => step since which its average is tracked, as far as it is known."""

    @classmethod
    def of(cls, manifest: Manifest, excluded: Ranges) -> "RunState":
        """As a checkpoint has it; `excluded` are the ranges left out since."""
        return cls(
            manifest.step,
            manifest.pending_metrics,
            manifest.guard,
            manifest.skipped_steps,
            merge_ranges((*manifest.excluded_positions, *excluded)),
            dict(manifest.quarantined),
        )


def state_of(config: TrainConfig, found: Checkpoint | None, excluded: Ranges) -> RunState:
    """The state of a run that resumes from this checkpoint, or begins."""
    state = RunState.of(found.manifest, excluded) if found else RunState(excluded=excluded)
    return replace(state, ema_since=since_steps(config.ema, found))


def merge_ranges(ranges: Ranges) -> Ranges:
    """The same positions as sorted, disjoint, half-open ranges."""
    out: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1]:
            out[-1] = (out[-1][0], max(high, out[-1][1]))
        else:
            out.append((low, high))
    return tuple(out)
