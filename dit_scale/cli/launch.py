"""`dit-scale launch`: the supervisor of this node."""

import argparse
import sys
from typing import Any

from dit_scale.cli.arguments import CONFIG_HELP, add_command, int_between, non_negative_float, positive_float
from dit_scale.errors import DitScaleError


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "launch",
        _run,
        "train on this node and others, and start again whatever fails",
        description="""Supervise the ranks of this node: one such command on every node of the run. They find
each other through the run's folder (or checkpoint.url), start the deepspeed launcher, watch the ranks, and
start again with the nodes that are left when one fails.

  dit-scale launch dit_xl2_256 --nodes 2:4 run=/shared/xl2        (on each node)

Exit codes: 0 done, 75 stopped on request and saved (start again to go on), 93 (2 for an option) another start
would end in the same way, 1 anything else.""",
    )
    parser.add_argument("config", help=f"{CONFIG_HELP}; the same on all nodes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="the same on all nodes")
    parser.add_argument("--nodes", default="1", help="how many, or least:most (default 1)")
    parser.add_argument("--slots", type=int_between(1), help="ranks of this node (default: its GPUs, or 1)")
    parser.add_argument("--node", help="name of this node, unlike all others (default: its host name)")
    parser.add_argument("--address", help="where the others reach it (default: its host name)")
    parser.add_argument(
        "--start",
        type=int_between(0, 2**53),
        default=0,
        metavar="NUMBER",
        help="of this start of the job, the same on all nodes; one with a larger number takes over",
    )
    parser.add_argument(
        "--lease-s", type=positive_float, default=15.0, help="silence that means a node is lost"
    )
    parser.add_argument(
        "--gather-s", type=positive_float, default=3600.0, help="longest wait for the least number of nodes"
    )
    parser.add_argument(
        "--grow-s",
        type=non_negative_float,
        default=60.0,
        help="a round lasts so long before it lets nodes in",
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
    from dit_scale.elastic.launch import launch, node_range, num_devices
    from dit_scale.elastic.supervisor import Policy

    config = load_for_training(args.config, args.overrides)
    least, most = node_range(args.nodes)
    policy = Policy(least, most, lease_s=args.lease_s, gather_s=args.gather_s, grow_s=args.grow_s)
    host = socket.gethostname()
    arguments = [args.config, *args.overrides]
    slots = args.slots or num_devices()
    return launch(config, arguments, policy, args.node or host, args.address or host, slots, args.start)
