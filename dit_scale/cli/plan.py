"""`dit-scale plan`: how long a run takes on machines that fail, and what it costs."""

import argparse
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import (
    CONFIG_HELP,
    OVERRIDES_HELP,
    add_command,
    int_between,
    non_negative_float,
    positive_float,
)
from dit_scale.cli.tables import UNLIMITED_WIDTH, ledger_table, print_table

if TYPE_CHECKING:
    from rich.table import Table

    from dit_scale.config import TrainConfig
    from dit_scale.forecast.estimate import Estimate, Machines, Work
    from dit_scale.forecast.simulate import SimulationResult

COSTS = {
    "save_stall_s": (0.5, "seconds that training pauses at the start of a save"),
    "commit_lag_s": (10.0, "seconds from the start of a save to its commit"),
    "launch_s": (20.0, "seconds to stop old ranks, start the launcher and import"),
    "init_s": (20.0, "seconds to create process groups, model and engine"),
    "restore_s": (10.0, "seconds to find and read a checkpoint"),
    "first_step_s": (10.0, "extra seconds of the first step"),
}
"""Defaults of the fields of Costs, and what they are."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "plan",
        _run,
        "estimate days, best checkpoint interval, goodput and cost of a run on machines that fail",
        description="""\
Estimate how long a run takes, how often it should save and what it costs, from a measured speed and
a failure rate. docs/goodput.md describes the model.

  dit-scale plan dit_xl2_256 --gpus 64 --images-per-s 400 --price 2.5
  dit-scale plan dit_xl2_256 --gpus 8192 --images-per-s 400 --spares 11 \\
      global_batch=524288 steps=60000 --simulate 14

`python -m benchmarks.train_step --json` measures the speed; pass its output with --speed-from. Default
durations are assumptions: measure them on your machines.""",
    )
    parser.add_argument("config", help=f"{CONFIG_HELP}, for steps, global batch and checkpoint interval")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON")
    speed = parser.add_mutually_exclusive_group(required=True)
    speed.add_argument("--images-per-s", type=positive_float, help="measured images/s of one GPU")
    speed.add_argument(
        "--speed-from", metavar="FILE", help="output of train_step.py --json; the fastest row counts"
    )
    _add_machines(parser)
    lease = "seconds after which a node that has not renewed its lease counts as lost (default 15)"
    parser.add_argument("--lease-s", type=positive_float, default=15.0, help=lease)
    for name, (default, text) in COSTS.items():
        option = "--" + name.replace("_", "-")
        help_text = f"{text} (default {default:g})"
        parser.add_argument(option, type=non_negative_float, default=default, help=help_text)
    parser.add_argument("--price", type=non_negative_float, default=0.0, help="price of a GPU-hour")
    parser.add_argument(
        "--simulate", type=positive_float, metavar="DAYS", help="also simulate this many days of training"
    )
    parser.add_argument(
        "--seed", type=int_between(0), default=0, help="seed of the simulated failures (default 0)"
    )


def _add_machines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpus", type=int_between(1), required=True, help="GPUs that train, without standby nodes"
    )
    parser.add_argument("--gpus-per-node", type=int_between(1), default=8, help="GPUs of a node (default 8)")
    parser.add_argument("--spares", type=int_between(0), default=0, help="standby nodes (default 0)")
    parser.add_argument(
        "--failures", type=non_negative_float, default=6.5, help="failures per 1,000 node-days (default 6.5)"
    )
    crash = "share of the failures that kill a rank (default 0.4)"
    parser.add_argument("--crash", type=_share, default=0.4, help=crash)
    hang = "share that hang a rank (default 0.1); all others take the node"
    parser.add_argument("--hang", type=_share, default=0.1, help=hang)
    repair = "hours until a lost node is back (default 24)"
    parser.add_argument("--repair-h", type=non_negative_float, default=24.0, help=repair)


def _run(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict, replace

    from dit_scale.config import TrainConfig, load
    from dit_scale.forecast import estimate

    config = load(TrainConfig, args.config, args.overrides)
    machines = _machines(args)
    step_s = _step_s(args, config)
    costs = estimate.Costs(step_s, **{name: getattr(args, name) for name in COSTS})
    best = estimate.best_every_steps(machines, costs)
    work = estimate.Work(config.steps, best, costs, args.lease_s)
    as_is = estimate.estimate(machines, replace(work, every_steps=config.checkpoint.every_steps))
    rows = estimate.sensitivities(machines, work)
    result = _simulate(args, machines, work) if args.simulate else None
    if args.json:
        tree = {
            "machines": asdict(machines),
            "work": asdict(work),
            "mtbf_s": machines.mtbf_s,
            "with_interval_of_the_config": _tree(as_is, machines, args.price),
            "estimates": {name: _tree(row, machines, args.price) for name, row in rows.items()},
            "simulated": _simulated(result) if result else None,
        }
        print(json.dumps(tree, indent=2))
        return 0
    print(_summary(machines, work))
    print_table(_estimates_table(rows, machines, args.price), UNLIMITED_WIDTH)
    every, goodput = config.checkpoint.every_steps, as_is.goodput
    print(f"with checkpoint.every_steps={every} of the configuration: goodput {goodput:.2%}")
    if result is not None:
        print(_simulation_summary(result))
        print_table(ledger_table(result.ledger.by_name(), result.wall_s), UNLIMITED_WIDTH)
    return 0


def _machines(args: argparse.Namespace) -> "Machines":
    from dit_scale.errors import ConfigError
    from dit_scale.forecast.estimate import Machines

    nodes, rest = divmod(args.gpus, args.gpus_per_node)
    if rest:
        raise ConfigError(f"--gpus {args.gpus}: expected a multiple of --gpus-per-node {args.gpus_per_node}")
    if args.crash + args.hang > 1:
        raise ConfigError(f"--crash {args.crash} and --hang {args.hang}: expected a sum of at most 1")
    return Machines(
        nodes=nodes,
        gpus_per_node=args.gpus_per_node,
        spares=args.spares,
        failures_per_1000_node_days=args.failures,
        crash_share=args.crash,
        hang_share=args.hang,
        loss_share=1 - args.crash - args.hang,
        repair_s=args.repair_h * 3600,
    )


def _step_s(args: argparse.Namespace, config: "TrainConfig") -> float:
    """Return the duration of a step on all GPUs from the speed of one."""
    from dit_scale.errors import ConfigError

    if args.gpus > config.global_batch:
        raise ConfigError(
            f"--gpus {args.gpus}: expected at most global_batch={config.global_batch}, one sample per GPU; "
            "use fewer GPUs, or increase global_batch"
        )
    per_s = args.images_per_s or _measured(args.speed_from, config.model.name, config.model.image_size)
    # If the batch is not divisible, the slowest rank has one sample more than the others.
    return float(-(-config.global_batch // args.gpus) / per_s)


def _measured(path: str, model: str, image_size: int) -> float:
    """Return the images/s of the fastest row for this model."""
    from pathlib import Path

    from dit_scale.errors import ConfigError
    from dit_scale.lines import read_objects

    try:
        rows = read_objects(Path(path), "model", "image_size", "images_per_s")
    except OSError as error:
        raise ConfigError(f"{path}: expected the output of `train_step.py --json`: {error}") from None
    speeds = [row["images_per_s"] for row in rows if (row["model"], row["image_size"]) == (model, image_size)]
    speeds = [float(speed) for speed in speeds if isinstance(speed, int | float) and speed > 0]
    if not speeds:
        raise ConfigError(
            f"{path}: expected the output of `train_step.py --json` with images_per_s of {model} at "
            f"{image_size} pixels, found none; measure it"
        )
    return max(speeds)


def _simulate(args: argparse.Namespace, machines: "Machines", work: "Work") -> "SimulationResult":
    from dit_scale.elastic.policy import Policy
    from dit_scale.forecast import simulate
    from dit_scale.forecast.timeline import FailureKind

    shares = {
        FailureKind.CRASH: machines.crash_share,
        FailureKind.HANG: machines.hang_share,
        FailureKind.LOSS: machines.loss_share,
    }
    setup = simulate.SimulationSetup(
        nodes=machines.nodes,
        spares=machines.spares,
        steps=max(1, min(work.steps, round(args.simulate * simulate.DAY_S / work.costs.step_s))),
        every_steps=work.every_steps,
        costs=work.costs,
        policy=Policy(min_nodes=max(1, machines.nodes * 9 // 10), lease_s=work.lease_s),
        repair_s=machines.repair_s,
    )
    rate = machines.failures_per_1000_node_days
    failures = simulate.poisson(machines.nodes + machines.spares, rate, shares, args.seed)
    return simulate.simulate(setup, failures)


def _summary(machines: "Machines", work: "Work") -> str:
    costs, hours = work.costs, machines.mtbf_s / 3600
    gpus = machines.nodes * machines.gpus_per_node
    durations = ", ".join(f"{name} {getattr(costs, name):g}" for name in COSTS)
    return f"""\
{gpus} GPUs on {machines.nodes} nodes, {machines.spares} standby nodes; a failure every {hours:.2f} h
{work.steps} steps of {costs.step_s:.4g} s; best checkpoint interval: {work.every_steps} steps, \
{work.every_steps * costs.step_s:.0f} s
assumptions: {durations}, lease_s {work.lease_s:g}, repair_h {machines.repair_s / 3600:g}"""


def _estimates_table(rows: "dict[str, Estimate]", machines: "Machines", price: float) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in ("goodput", "days", "failures", "GPU-hours", *(["cost"] if price else [])):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        tree = _tree(row, machines, price)
        cost = [f"{tree['cost']:,.0f}"] if price else []
        table.add_row(
            name,
            f"{row.goodput:.2%}",
            f"{tree['days']:,.2f}",
            f"{row.failures:,.1f}",
            f"{tree['gpu_hours']:,.0f}",
            *cost,
        )
    return table


def _tree(row: "Estimate", machines: "Machines", price: float) -> dict[str, float]:
    gpu_hours = row.node_s * machines.gpus_per_node / 3600
    return {
        "goodput": row.goodput,
        "days": row.wall_s / 86400,
        "failures": row.failures,
        "missing_nodes": row.missing_nodes,
        "gpu_hours": gpu_hours,
        "cost": gpu_hours * price,
    }


def _simulated(result: "SimulationResult") -> dict[str, Any]:
    return {
        "exit_code": result.code,
        "goodput": result.goodput,
        "days": result.wall_s / 86400,
        "committed_step": result.committed_step,
        "failures": dict(result.failures),
        "rounds_by_end": dict(result.endings),
        "ledger_s": result.ledger.by_name(),
    }


def _simulation_summary(result: "SimulationResult") -> str:
    endings = ", ".join(f"{count} {reason}" for reason, count in result.endings.most_common())
    code = "still running at its limit" if result.code is None else f"exit code {int(result.code)}"
    return (
        f"simulated: goodput {result.goodput:.2%} in {result.wall_s / 86400:.2f} days ({code}); "
        f"rounds ended: {endings}"
    )


def _share(text: str) -> float:
    share = non_negative_float(text)
    if share > 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")
    return share
