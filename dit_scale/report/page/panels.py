"""The charts of the page: which keys of metrics.jsonl each one shows, and how."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Panel:
    """A chart."""

    name: str
    title: str
    explanation: str
    keys: dict[str, str]
    """Key => label. A key that ends in * stands for all with this beginning; * is added to the label."""
    unit: str = ""
    """"" for plain numbers, "%" for shares from 0 to 1, else the unit behind the number."""
    logarithmic: bool | None = None
    """Whether the axis is logarithmic at first; None: it cannot be."""
    is_wide: bool = False


PANELS = (
    Panel(
        "loss",
        "Training loss",
        "Mean over the steps since the log point before, with its parts and the largest loss of one sample.",
        {"loss": "loss", "mse": "MSE", "vb": "VB", "loss_max": "largest"},
        logarithmic=True,
        is_wide=True,
    ),
    Panel(
        "quarters",
        "Loss by timestep",
        "Mean loss of the samples in each quarter of the timesteps; the first has the least noise.",
        {f"loss_q{n}": label for n, label in enumerate(("first quarter", "second", "third", "last"))},
        logarithmic=True,
    ),
    Panel(
        "held_out",
        "Held-out loss",
        "Loss on samples that training never reads, for the weights and each average.",
        {"eval_loss_*": ""},
        logarithmic=True,
    ),
    Panel(
        "quality",
        "Sample quality",
        "Frechet distance of samples to the reference; smaller is better.",
        {"eval_frechet": "Frechet distance"},
        logarithmic=False,
    ),
    Panel(
        "grad_norm",
        "Gradient norm",
        "Global L2 norm before clipping.",
        {"grad_norm": "norm"},
        logarithmic=True,
    ),
    Panel(
        "update_ratio",
        "Update ratio",
        "L2 norm of the last update of the master weights over the norm of the weights.",
        {"update_ratio": "ratio"},
        logarithmic=True,
    ),
    Panel(
        "held_out_parts",
        "Held-out MSE and VB",
        "The two parts of the held-out loss.",
        {"eval_mse_*": "MSE ", "eval_vb_*": "VB "},
        logarithmic=True,
    ),
    Panel("lr", "Learning rate", "As used by the last step.", {"lr": "lr"}, logarithmic=False),
    Panel(
        "skipped",
        "Skipped steps",
        "Steps since the log point before that the guard skipped.",
        {"skipped": "steps"},
    ),
    Panel(
        "speed", "Speed", "Images per second over all processes.", {"images_per_s": "images/s"}, "images/s"
    ),
    Panel(
        "mfu",
        "MFU",
        "Model FLOP/s over the matrix-product FLOP/s of all devices.",
        {"mfu": "MFU"},
        "%",
    ),
    Panel(
        "step_time",
        "Step time",
        "Seconds per step on the slowest rank: median and 99th percentile.",
        {"step_s_p50": "p50", "step_s_p99": "p99"},
        "s",
        logarithmic=False,
    ),
    Panel(
        "data_wait",
        "Data wait",
        "Share of the time that the slowest rank waited for batches.",
        {"data_wait": "share"},
        "%",
    ),
    Panel(
        "stragglers",
        "Slowest rank",
        "Time of the slowest rank's own work over the median of the ranks.",
        {"slowest_ratio": "ratio"},
    ),
    Panel(
        "slowest_rank",
        "Number of the slowest rank",
        "A level line is a rank that is always the slowest.",
        {"slowest_rank": "rank"},
    ),
    Panel(
        "memory",
        "Memory",
        "Of the rank with the most: device memory, or resident memory on a CPU.",
        {"memory_gib": "now", "memory_peak_gib": "peak"},
        "GiB",
    ),
)


@lru_cache(maxsize=4096)
def is_shown(key: str) -> bool:
    """Whether a chart shows this key."""
    return any(
        _label(key, pattern, label) is not None for panel in PANELS for pattern, label in panel.keys.items()
    )


def series_of(panel: Panel, keys: Iterable[str]) -> dict[str, str]:
    """Return the keys among `keys` that a chart shows, with their labels, in the order of the chart."""
    known = sorted(set(keys))
    return {
        key: found
        for pattern, label in panel.keys.items()
        for key in known
        if (found := _label(key, pattern, label)) is not None
    }


def _label(key: str, pattern: str, label: str) -> str | None:
    """Return the label of a key; None if the pattern does not match it."""
    if pattern.endswith("*"):
        return label + key.removeprefix(pattern[:-1]) if key.startswith(pattern[:-1]) else None
    return label if key == pattern else None
