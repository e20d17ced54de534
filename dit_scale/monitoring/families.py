"""Names, types and units of the metrics for Prometheus, made from a look at a run."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_scale.config import TrainConfig
from dit_scale.elastic.board import Reason
from dit_scale.journal import Event
from dit_scale.monitoring.follower import STATES, Look

if TYPE_CHECKING:
    from prometheus_client import Metric

GIB = 2**30
REASONS = (*(reason.value for reason in Reason if reason != Reason.DONE), "rollback", "stopped", "gone")
"""Why a round or an attempt ended before the run was done, see dit_scale.report.interruptions."""


@dataclass(frozen=True)
class Gauge:
    """One key of a log point as a metric."""

    key: str
    name: str
    help: str
    unit: str = ""
    scale: float = 1.0
    labels: Mapping[str, str] | None = None


QUARTER = "Mean loss of the samples in one quarter of the timesteps, 0 the least noisy."
ROW = (
    Gauge("loss", "loss", "Mean loss of a sample; NaN if all steps of the window were skipped."),
    Gauge("mse", "loss_mse", "Mean of the part of the loss that is the squared error."),
    Gauge("vb", "loss_vb", "Mean of the part of the loss that is the variational bound."),
    Gauge("loss_max", "loss_max", "Largest loss of a single sample."),
    *(
        Gauge(f"loss_q{number}", "loss_quarter", QUARTER, labels={"quarter": str(number)})
        for number in range(4)
    ),
    Gauge("grad_norm", "grad_norm", "Global L2 norm of the gradient."),
    Gauge("update_ratio", "update", "Norm of the last update relative to that of the weights.", "ratio"),
    Gauge("lr", "learning_rate", "Learning rate."),
    Gauge("images_per_s", "images_per_second", "Samples that the run trains on per second."),
    Gauge("mfu", "mfu", "Model FLOP/s utilisation, 0 to 1.", "ratio"),
    Gauge("step_s_p50", "step_median", "Median duration of a step, of the slowest rank.", "seconds"),
    Gauge("step_s_p99", "step_p99", "99th percentile of it, of the slowest rank.", "seconds"),
    Gauge("data_wait", "data_wait", "Share of the time that the slowest rank waited for data.", "ratio"),
    Gauge("slowest_rank", "slowest_rank", "Number of the rank whose own work took longest."),
    Gauge("slowest_ratio", "slowest_rank", "Own work of that rank relative to the median.", "ratio"),
    Gauge("memory_gib", "memory", "Memory in use, of the rank with the most.", "bytes", GIB),
    Gauge("memory_peak_gib", "memory_peak", "Peak memory, of the rank with the most.", "bytes", GIB),
)
"""The keys of a log point."""

COUNTED = {
    Event.SKIPPED_STEP: ("skipped_steps", "Steps that the guard skipped, each time one was."),
    Event.QUARANTINED: ("quarantined_samples", "Samples that were found damaged and replaced."),
    Event.SAVE_FAILED: ("failed_saves", "Saves that were not committed."),
    Event.ALARM: ("alarms", "Failures that did not stop the run."),
}
"""Event => name and help of its counter."""


def families(look: Look, config: TrainConfig, node: str) -> Iterator["Metric"]:
    """Yield the metrics of a look; without what is not known yet."""
    made = Families({"run": config.run, "node": node})
    yield made.info(look, config)
    yield made.states(look.state)
    yield made.gauge("step", "Steps taken.", look.step)
    yield made.gauge("target_step", "Step at which the run is done.", config.steps)
    yield made.gauge("nodes", "Nodes that train together with this one.", look.nodes)
    yield made.gauge("checkpoint_step", "Step of the newest checkpoint; 0: none.", look.checkpoint_step)
    yield made.gauge(
        "checkpoint_timestamp", "When it was committed, since 1970; 0: never.", look.committed_s, "seconds"
    )
    yield made.gauge(
        "first_step_timestamp",
        "When the newest attempt took its first step, since 1970; 0: not yet.",
        look.stepping_since_s,
        "seconds",
    )
    yield from made.row(look.row)
    yield from made.evaluation(look.evaluation)
    for event, (name, text) in COUNTED.items():
        yield made.counter(name, text, {"": look.events[event]})
    reasons = Counter(dict.fromkeys(REASONS, 0))
    reasons.update(interruption.reason for interruption in look.interruptions)
    yield made.counter("restarts", "Ends of attempts or rounds before the run was done.", reasons, "reason")
    spent = look.spent
    yield made.gauges(
        "time", "Wall-clock time of the run by heading of its ledger.", spent.by_name(), "heading", "seconds"
    )
    yield made.gauge("goodput", "Share of that time in steps that count.", spent.goodput, "ratio")


class Families:
    """Makes metrics that share their first labels."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)

    def info(self, look: Look, config: TrainConfig) -> "Metric":
        """Return what changes too often for a label of every metric."""
        from prometheus_client.core import InfoMetricFamily

        known = {"attempt": str(look.attempt), "round": str(look.round), "model": config.model.name}
        return InfoMetricFamily(
            "dit_scale_run", "Newest attempt and round, and the model.", {**self._labels, **known}
        )

    def states(self, now: str) -> "Metric":
        """Return which of the states of a node is true."""
        from prometheus_client.core import StateSetMetricFamily

        made = StateSetMetricFamily("dit_scale_state", "What the node does.", labels=list(self._labels))
        made.add_metric(list(self._labels.values()), {state: state == now for state in STATES.values()})
        return made

    def gauge(self, name: str, text: str, value: float, unit: str = "") -> "Metric":
        """Return a single number."""
        return self.gauges(name, text, {"": value}, "", unit)

    def gauges(
        self, name: str, text: str, values: Mapping[str, float], label: str = "", unit: str = ""
    ) -> "Metric":
        """Return numbers by the values of one more label; without a name, it is left out."""
        from prometheus_client.core import GaugeMetricFamily

        return self._fill(GaugeMetricFamily, (name, text, unit), values, label)

    def counter(self, name: str, text: str, values: Mapping[str, float], label: str = "") -> "Metric":
        """Return numbers that only grow, likewise."""
        from prometheus_client.core import CounterMetricFamily

        return self._fill(CounterMetricFamily, (name, text, ""), values, label)

    def row(self, row: Mapping[str, Any]) -> Iterator["Metric"]:
        """Yield the metrics of a log point. A mean loss over nothing is NaN; other gaps are absent."""
        values: dict[tuple[str, str], dict[str, float]] = {}
        labels: dict[tuple[str, str], tuple[str, str]] = {}
        for gauge in ROW:
            value = row.get(gauge.key)
            if value is None and gauge.key == "loss" and row:
                value = float("nan")
            if value is None:
                continue
            label, of_label = next(iter((gauge.labels or {"": ""}).items()))
            values.setdefault((gauge.name, gauge.unit), {})[of_label] = value * gauge.scale
            labels[gauge.name, gauge.unit] = (label, gauge.help)
        for (name, unit), numbers in values.items():
            label, text = labels[name, unit]
            yield self.gauges(name, text, numbers, label, unit)

    def evaluation(self, row: Mapping[str, Any]) -> Iterator["Metric"]:
        """Yield the numbers of an evaluation."""
        values = {key: row[key] for key in sorted(row) if key.startswith("eval_") and row[key] is not None}
        if values:
            yield self.gauge("evaluation_step", "Step of the newest evaluation.", row["step"])
            yield self.gauges("evaluation", "Numbers of the newest evaluation.", values, "key")

    def _fill(
        self, kind: Any, described: tuple[str, str, str], values: Mapping[str, float], label: str
    ) -> "Metric":
        name, text, unit = described
        more = [label] if label else []
        made = kind(f"dit_scale_{name}", text, labels=[*self._labels, *more], unit=unit)
        for of_label, value in values.items():
            made.add_metric([*self._labels.values(), *([of_label] if label else [])], value)
        metric: Metric = made
        return metric
