"""`dit-scale plan`: how long a run will take on machines that fail, and what it will cost."""

import argparse
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import CONFIG_HELP, add_command, int_between, non_negative_float, positive_float

if TYPE_CHECKING:
    from dit_scale.forecast.estimate import Estimate, Machines, Work
    from dit_scale.forecast.simulate import SimulationResult

COSTS = {
    "save_stall_s": (0.5, "the loop stands still at the begin of a save"),
    "commit_lag_s": (10.0, "from there until the checkpoint counts"),
    "launch_s": (20.0, "old ranks ended, launcher, imports"),
    "init_s": (20.0, "process groups, model and engine"),
    "restore_s": (10.0, "state read from a checkpoint"),
    "first_step_s": (10.0, "what the first step takes longer"),
}
"""Seconds, by field of Costs: assumptions unless they were measured."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "plan",
        _run,
        "days, checkpoint interval, goodput and cost of a run on machines that fail",
        description="""Tell how long a run will take, how often it should save and what it will cost, from a
measured speed and a failure rate (docs/goodput.md has the model).

  dit-scale plan dit_xl2_256 --gpus 64 --images-per-s 400 --price 2.5
  dit-scale plan dit_xl2_256 --gpus 8192 --images-per-s 400 --spares 11 \\
      global_batch=524288 steps=60000 --simulate 14

The speed may come from `python benchmarks/train_step.py --json`, by --speed-from. Seconds that are not
given are assumptions, not measurements: measure them on the machines in question.""",
    )
    parser.add_argument("config", help=f"{CONFIG_HELP}: steps, global batch, checkpoints")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", type=int_between(1), required=True, help="that train, spares not counted")
    speed = parser.add_mutually_exclusive_group(required=True)
    speed.add_argument("--images-per-s", type=positive_float, help="of one GPU, as measured")
    speed.add_argument(
        "--speed-from", metavar="FILE", help="rows of train_step.py --json; the fastest counts"
    )
    parser.add_argument("--gpus-per-node", type=int_between(1), default=8, help="(default 8)")
    parser.add_argument("--spares", type=int_between(0), default=0, help="nodes more, that wait (default 0)")
    parser.add_argument(
        "--failures", type=non_negative_float, default=6.5, help="per 1,000 nodes and day (default 6.5)"
    )
    parser.add_argument("--crash", type=_share, default=0.4, help="share of them that kill a rank (0.4)")
    parser.add_argument(
        "--hang", type=_share, default=0.1, help="share that stop a rank (0.1); others: a node"
    )
    parser.add_argument("--repair-h", type=non_negative_float, default=24.0, help="until a node is back (24)")
    parser.add_argument(
        "--lease-s", type=positive_float, default=15.0, help="silence that means a node is lost (15)"
    )
    for name, (default, text) in COSTS.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=non_negative_float, default=default, help=f"{text} ({default:g})")
    parser.add_argument("--price", type=non_negative_float, default=0.0, help="of a GPU-hour")
    parser.add_argument(
        "--simulate",
        type=positive_float,
        metavar="DAYS",
        help="also run the supervisors for so many virtual days",
    )
    parser.add_argument(
        "--seed", type=int_between(0), default=0, help="of the failures simulated (default 0)"
    )
    parser.add_argument("--json", action="store_true", help="an object, for machines")


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
    print(_head(machines, work))
    _table(rows, machines, args.price)
    every, goodput = config.checkpoint.every_steps, as_is.goodput
    print(f"with checkpoint.every_steps={every} of the configuration: goodput {goodput:.2%}")
    if result is not None:
        print(_told(result))
    return 0


def _machines(args: argparse.Namespace) -> "Machines":
    from dit_scale.errors import ConfigError
    from dit_scale.forecast.estimate import Machines

    nodes, rest = divmod(args.gpus, args.gpus_per_node)
    if rest:
        raise ConfigError(f"--gpus {args.gpus}: expected a multiple of --gpus-per-node {args.gpus_per_node}")
    if args.crash + args.hang > 1:
        raise ConfigError(f"--crash {args.crash} and --hang {args.hang}: expected at most 1 together")
    loss = 1 - args.crash - args.hang
    return Machines(
        nodes,
        args.gpus_per_node,
        args.spares,
        args.failures,
        args.crash,
        args.hang,
        loss,
        args.repair_h * 3600,
    )


def _step_s(args: argparse.Namespace, config: Any) -> float:
    """Seconds of a step on all GPUs, at the speed that one of them was measured with."""
    from dit_scale.errors import ConfigError

    if args.gpus > config.global_batch:
        raise ConfigError(
            f"--gpus {args.gpus}: a global batch of {config.global_batch} has no sample for each; "
            "take fewer GPUs, or set global_batch"
        )
    per_s = args.images_per_s or _measured(args.speed_from, config.model.name, config.model.image_size)
    # The slowest rank has a sample more than others where the batch does not divide.
    return float(-(-config.global_batch // args.gpus) / per_s)


def _measured(path: str, model: str, image_size: int) -> float:
    """Images/s of the fastest row for this model."""
    import json
    from pathlib import Path

    from dit_scale.errors import ConfigError

    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
        speeds = [
            float(row["images_per_s"])
            for row in rows
            if (row["model"], row["image_size"]) == (model, image_size) and "images_per_s" in row
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: expected rows of `train_step.py --json`: {error}") from None
    if not speeds:
        raise ConfigError(f"{path}: no row has a speed of {model} at {image_size} pixels; measure it")
    return max(speeds)


def _simulate(args: argparse.Namespace, machines: "Machines", work: "Work") -> "SimulationResult":
    from dit_scale.elastic.policy import Policy
    from dit_scale.forecast import simulate
    from dit_scale.forecast.timeline import FailureKind

    kinds = FailureKind
    shares = {
        kinds.CRASH: machines.crash_share,
        kinds.HANG: machines.hang_share,
        kinds.LOSS: machines.loss_share,
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
    return simulate.simulate(
        setup, simulate.poisson(machines.nodes + machines.spares, rate, shares, args.seed)
    )


def _head(machines: "Machines", work: "Work") -> str:
    costs, hours = work.costs, machines.mtbf_s / 3600
    gpus = machines.nodes * machines.gpus_per_node
    seconds = ", ".join(f"{name} {getattr(costs, name):g}" for name in COSTS)
    return f"""{gpus} GPUs on {machines.nodes} nodes, {machines.spares} spares; a failure every {hours:.2f} h
{work.steps} steps of {costs.step_s:.4g} s; best: a checkpoint every {work.every_steps} steps, \
{work.every_steps * costs.step_s:.0f} s
assumed unless measured: {seconds}, lease_s {work.lease_s:g}, repair_h {machines.repair_s / 3600:g}"""


def _table(rows: "dict[str, Estimate]", machines: "Machines", price: float) -> None:
    from rich import box
    from rich.console import Console
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
    Console().print(table)


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


def _told(result: "SimulationResult") -> str:
    spent = [
        f"  {use:<18}{seconds / result.wall_s:8.3%}  {seconds / 3600:10.2f} h"
        for use, seconds in result.ledger.by_name().items()
    ]
    ends = ", ".join(f"{count} {reason}" for reason, count in result.endings.most_common())
    code = "not over" if result.code is None else f"exit code {int(result.code)}"
    head = f"simulated: goodput {result.goodput:.2%} in {result.wall_s / 86400:.2f} days ({code})"
    head += f"; rounds: {ends}"
    return "\n".join([head, *spent])


def _share(text: str) -> float:
    share = non_negative_float(text)
    if share > 1:
        raise argparse.ArgumentTypeError(f"expected a share from 0 to 1, got {text!r}")
    return share
