"""How long a run takes on machines that fail: a closed formula, checked by the simulator (simulate.py).

    Young: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17 (1974)
    Daly:  J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps",
           Future Generation Computer Systems 22 (2006)

docs/goodput.md describes the model. Times are in seconds unless a name says otherwise.
"""

from dataclasses import dataclass, replace
from math import ceil, exp, sqrt

from dit_scale.elastic.node.deadlines import SHORTEST_S, TIMES_P99
from dit_scale.elastic.policy import Policy
from dit_scale.forecast.timeline import Costs

DAY_S = 86400.0
AGREE_POLLS = 2.5
"""Polls from the end of a round to the start of the next one: all supervisors see the end, the first one sees
that all have joined, and all see the new members."""


@dataclass(frozen=True)
class Machines:
    """The nodes of a run, and how they fail."""

    nodes: int
    """Nodes that train, without standby nodes."""
    gpus_per_node: int = 8
    spares: int = 0
    """Standby nodes."""
    failures_per_1000_node_days: float = 6.5
    crash_share: float = 0.4
    """Share of the failures in which a rank dies and its node stays."""
    hang_share: float = 0.1
    """Share in which a rank hangs and its node stays."""
    loss_share: float = 0.5
    """Share in which the node is lost until it is repaired."""
    repair_s: float = DAY_S

    @property
    def rate(self) -> float:
        """Failures per node and second."""
        return self.failures_per_1000_node_days / 1000 / DAY_S

    @property
    def mtbf_s(self) -> float:
        """Mean time between failures of the nodes that train."""
        return 1 / (self.rate * self.nodes) if self.rate else float("inf")


@dataclass(frozen=True)
class Work:
    """A training run, its durations and the lease of its nodes."""

    steps: int
    every_steps: int
    """Steps between two checkpoints."""
    costs: Costs
    lease_s: float = 15.0


@dataclass(frozen=True)
class Estimate:
    """Expected cost of a run."""

    goodput: float
    """Share of the wall-clock time that the steps would take with all nodes and without failures."""
    wall_s: float
    failures: float
    """Expected failures of the nodes that train."""
    missing_nodes: float
    """Mean number of missing nodes that no standby node replaces."""
    node_s: float
    """Node-seconds, standby nodes included."""


def daly_s(stall_s: float, mtbf_s: float) -> float:
    """Return Daly's best time between two checkpoints, equation (37); M if a save takes longer than 2 M.

    For short saves this is Young's sqrt(2 delta M), his equation (5).
    """
    ratio = stall_s / (2 * mtbf_s)
    if ratio >= 1:
        return mtbf_s
    return sqrt(2 * stall_s * mtbf_s) * (1 + sqrt(ratio) / 3 + ratio / 9) - stall_s


def daly_goodput(interval_s: float, stall_s: float, mtbf_s: float, restart_s: float) -> float:
    """Return work over wall-clock time by Daly's equation (20): T of work takes
    M exp(R/M) (exp((tau + delta) / M) - 1) T / tau, failures during restarts included."""
    if mtbf_s == float("inf"):
        return interval_s / (interval_s + stall_s)
    # exp() would overflow; the run makes no progress.
    if (restart_s + interval_s + stall_s) / mtbf_s > 700:
        return 0.0
    wall_s = mtbf_s * exp(restart_s / mtbf_s) * (exp((interval_s + stall_s) / mtbf_s) - 1)
    return interval_s / wall_s


def best_every_steps(machines: Machines, costs: Costs) -> int:
    """Return Daly's interval in whole steps, but no less than a save takes to commit: saves never overlap."""
    shortest = max(1, ceil(costs.commit_lag_s / costs.step_s))
    if machines.rate == 0:
        return max(shortest, round(DAY_S / costs.step_s))
    return max(shortest, round(daly_s(costs.save_stall_s, machines.mtbf_s) / costs.step_s))


def estimate(machines: Machines, work: Work) -> Estimate:
    """Estimate goodput and duration of a run.

    This is Daly's model. A restart includes detection and the commit lag, because a failure during a save
    also loses the steps taken since the save started. The number of nodes in repair is Poisson (infinitely
    many servers, no queue). Nodes missing beyond the standby nodes slow the run down, and the return of each
    costs a save and a restart.
    """
    costs = work.costs
    begin_s = costs.launch_s + costs.init_s + costs.restore_s + costs.first_step_s
    begin_s += AGREE_POLLS * poll_s(machines, work)
    lost_s = detect_s(machines, work) + begin_s + costs.commit_lag_s
    interval_s = work.every_steps * costs.step_s
    stall_s = max(costs.save_stall_s, costs.commit_lag_s - interval_s)
    goodput = daly_goodput(interval_s, stall_s, machines.mtbf_s, lost_s)
    losses = machines.rate * machines.loss_share * (machines.nodes + machines.spares)
    missing, short = poisson_excess(losses * machines.repair_s, machines.spares)
    grow_s = costs.commit_lag_s + begin_s
    goodput *= max(0.0, 1 - missing / machines.nodes) * max(0.0, 1 - losses * short * grow_s)
    work_s = work.steps * costs.step_s
    wall_s = work_s / goodput + begin_s - costs.restore_s if goodput else float("inf")
    return Estimate(
        goodput=work_s / wall_s,
        wall_s=wall_s,
        failures=wall_s * machines.rate * machines.nodes if machines.rate else 0.0,
        missing_nodes=missing,
        node_s=wall_s * (machines.nodes + machines.spares),
    )


def detect_s(machines: Machines, work: Work) -> float:
    """Return the mean time from a failure to the end of its round."""
    hang_s = max(SHORTEST_S, TIMES_P99 * work.costs.step_s)
    lost_s = work.lease_s + poll_s(machines, work)
    return poll_s(machines, work) / 2 + machines.hang_share * hang_s + machines.loss_share * lost_s


def poll_s(machines: Machines, work: Work) -> float:
    """Return the time between two polls of a supervisor."""
    return Policy(max_nodes=machines.nodes, lease_s=work.lease_s).look_s


def poisson_excess(mean: float, spares: int) -> tuple[float, float]:
    """For a Poisson number, return the mean excess over `spares` and the probability of at least `spares`."""
    weight, below, held = exp(-mean), 0.0, 0.0
    for number in range(spares):
        below += weight
        held += weight * number
        weight *= mean / (number + 1)
    at_least = max(0.0, 1 - below)
    return max(0.0, mean - held - spares * at_least), at_least


def sensitivities(machines: Machines, work: Work) -> dict[str, Estimate]:
    """Return estimates with one assumption changed at a time; the interval is that of `work` unless named."""
    costs = work.costs
    slow = replace(
        costs, launch_s=2 * costs.launch_s, init_s=2 * costs.init_s, first_step_s=2 * costs.first_step_s
    )
    rows = {
        "as asked": (machines, work),
        "failures x 2": (
            replace(machines, failures_per_1000_node_days=2 * machines.failures_per_1000_node_days),
            work,
        ),
        "restart time x 2": (machines, replace(work, costs=slow)),
        "restore time x 2": (machines, replace(work, costs=replace(costs, restore_s=2 * costs.restore_s))),
        "save stall x 2": (
            machines,
            replace(work, costs=replace(costs, save_stall_s=2 * costs.save_stall_s)),
        ),
        "interval / 2": (machines, replace(work, every_steps=max(1, work.every_steps // 2))),
        "interval x 2": (machines, replace(work, every_steps=2 * work.every_steps)),
        **{
            f"spares {percent} %": (replace(machines, spares=ceil(machines.nodes * percent / 100)), work)
            for percent in (0, 1, 2)
        },
    }
    return {name: estimate(*row) for name, row in rows.items()}
