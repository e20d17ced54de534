"""`dit-scale launch`: the supervisor of this node."""

import argparse
import sys
from typing import Any

from dit_scale.cli.arguments import (
    CONFIG_HELP,
    OVERRIDES_HELP,
    add_command,
    int_between,
    non_negative_float,
    positive_float,
)
from dit_scale.errors import ConfigError, DitScaleError


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "launch",
        _run,
        "train on this node and others, with automatic restart after failures",
        description="""Supervise the ranks of this node. Run the same command on every node of the run. The
supervisors find each other through the run folder (or checkpoint.url), start the deepspeed launcher, watch
the ranks, and restart with the remaining nodes when one fails.

  dit-scale launch dit_xl2_256 --nodes 2:4 run=/shared/xl2        (on each node)

Exit codes: 0 done, 75 stopped on request and saved (run the same command again to resume), 93 (2 for a bad
option) a restart would fail the same way, 1 any other failure.""",
    )
    parser.add_argument("config", help=f"{CONFIG_HELP}; the same on all nodes")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"{OVERRIDES_HELP}; the same on all nodes"
    )
    parser.add_argument("--nodes", default="1", help="number of nodes, or LEAST:MOST (default: 1)")
    parser.add_argument("--slots", type=int_between(1), help="ranks on this node (default: its GPUs, or 1)")
    parser.add_argument("--node", help="unique name of this node (default: its host name)")
    parser.add_argument("--address", help="address at which other nodes reach it (default: its host name)")
    parser.add_argument(
        "--start",
        type=int_between(0, 2**53),
        default=0,
        metavar="NUMBER",
        help="number of this start of the job, the same on all nodes; larger numbers supersede smaller ones",
    )
    parser.add_argument(
        "--metrics-port",
        type=int_between(0, 2**16 - 1),
        metavar="PORT",
        help="serve metrics of this node for Prometheus on this port; 0: any free port (docs/monitoring.md)",
    )
    parser.add_argument(
        "--metrics-textfile",
        metavar="FOLDER",
        help="write them to a file in this folder of node-exporter's textfile collector",
    )
    parser.add_argument(
        "--lease-s",
        type=positive_float,
        default=15.0,
        help="seconds without a lease renewal after which a node is lost (default: 15)",
    )
    parser.add_argument(
        "--gather-s",
        type=positive_float,
        default=3600.0,
        help="longest wait for LEAST nodes, in seconds (default: 3600)",
    )
    parser.add_argument(
        "--grow-s",
        type=non_negative_float,
        default=60.0,
        help="shortest duration of a round that waiting nodes interrupt, in seconds (default: 60)",
    )


def _run(args: argparse.Namespace) -> int:
    from dit_scale.elastic.node.exits import exit_code

    try:
        return _launch(args)
    except DitScaleError as error:
        print(f"{args.name}: {error}", file=sys.stderr)
        return exit_code(error)


def _launch(args: argparse.Namespace) -> int:
    import socket

    from dit_scale.config import load_for_training
    from dit_scale.elastic.launch import launch
    from dit_scale.elastic.node.gpus import num_devices
    from dit_scale.elastic.policy import Policy

    config = load_for_training(args.config, args.overrides)
    args.run_folder = config.run
    least, most = node_range(args.nodes)
    host = socket.gethostname()
    node, address = args.node or host, args.address or host
    observers = []
    if args.metrics_port is not None or args.metrics_textfile is not None:
        from dit_scale.monitoring.exporter import observer

        observers.append(
            observer(
                config,
                node=node,
                address=address,
                port=args.metrics_port,
                textfiles=args.metrics_textfile,
            )
        )
    return launch(
        config,
        [args.config, *args.overrides],
        Policy(least, most, lease_s=args.lease_s, gather_s=args.gather_s, grow_s=args.grow_s),
        node=node,
        address=address,
        slots=args.slots or num_devices(),
        start=args.start,
        observers=observers,
    )


def node_range(text: str) -> tuple[int, int]:
    """Parse `4` or `2:4`: the smallest and the largest number of nodes."""
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal() and 1 <= int(least) <= int(most or least)):
        raise ConfigError(f"--nodes {text}: expected a number of nodes or LEAST:MOST, for example 2:4")
    return int(least), int(most or least)
