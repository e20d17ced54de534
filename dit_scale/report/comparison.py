"""What differs between runs: their configurations, their metrics at common steps and at the end. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dit_scale.config import TrainConfig
from dit_scale.lines import read_objects
from dit_scale.report.status import Status, status_of
from dit_scale.train.run_folder import METRICS, config_of_folder
from dit_scale.trees import differing

Row = Mapping[str, Any]
"""A line of a record."""


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side; every list has one value per run, None where a run has none."""

    runs: list[str]
    configuration: dict[str, list[Any]]
    """Keys that differ."""
    clock: str
    """`step`; `samples` for runs with different global batches, which see different numbers per step."""
    common: dict[str, dict[int, list[float]]]
    """Metric => clock => values, where all runs recorded the metric."""
    end: dict[str, list[Any]]
    """Measure => its last value, or the value for the whole run."""


def compare(runs: Sequence[str], now_s: float) -> Comparison:
    """Compare the runs in these folders at `now_s`, in seconds since 1970.

    Raises ConfigError for a folder without a run.
    """
    configs = [config_of_folder(run) for run in runs]
    records = [read_objects(Path(run) / METRICS, "step", "samples") for run in runs]
    clock = "step" if len({config.global_batch for config in configs}) == 1 else "samples"
    return Comparison(
        runs=list(runs),
        configuration=configuration_differences(configs),
        clock=clock,
        common={name: found for name in _metrics(records) if (found := common_points(records, name, clock))},
        end=_end([status_of(run, now_s) for run in runs], records),
    )


def configuration_differences(configs: Sequence[TrainConfig]) -> dict[str, list[Any]]:
    """Return the dotted keys that differ, with the JSON value of each configuration; None if missing.

    The run folder differs between any two runs and is left out.
    """
    return differing([config.model_dump(mode="json", exclude={"run"}) for config in configs])


def common_points(records: Sequence[Sequence[Row]], name: str, clock: str) -> dict[int, list[float]]:
    """Return the values of a metric by `clock` (a key of the rows), where every record has a number."""
    by_record = [
        {row[clock]: row[name] for row in record if isinstance(row.get(name), int | float)}
        for record in records
    ]
    common = sorted(set(by_record[0]).intersection(*by_record[1:]))
    return {at: [values[at] for values in by_record] for at in common}


def _metrics(records: Sequence[Sequence[Row]]) -> list[str]:
    """Return the metrics to compare: loss, speed and the results of evaluations."""
    evaluated = dict.fromkeys(
        name for record in records for row in record for name in row if name.startswith("eval_")
    )
    return ["loss", *evaluated, "images_per_s"]


def _end(statuses: Sequence[Status], records: Sequence[Sequence[Row]]) -> dict[str, list[Any]]:
    speeds = [[row["images_per_s"] for row in record if row.get("images_per_s")] for record in records]
    return {
        "state": [status.state for status in statuses],
        "step": [status.step for status in statuses],
        **{
            name: [_last(record, name) for record in records]
            for name in ("samples", *_metrics(records))
            if name != "images_per_s"
        },
        "images_per_s": [median(found) if found else None for found in speeds],
        "wall_s": [status.wall_s for status in statuses],
        "goodput": [status.goodput for status in statuses],
    }


def _last(record: Sequence[Row], name: str) -> Any:
    return next((row[name] for row in reversed(record) if row.get(name) is not None), None)
