"""A sum over the devices of a node before it takes part in a round, so that a broken link shows here.

python -m dit_scale.elastic.node.collective DEVICE      in every rank
"""

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack

from dit_scale.config import EngineConfig
from dit_scale.elastic.node.address import free_port

NUMBERS = 2**22
"""Elements per device: enough to keep all links busy for a while."""
COLLECTIVE_S = 120.0
"""Longest wait. Imports and the start of NCCL take most of it."""


def collective_problems(device: str, slots: int) -> list[str]:
    """Return what fails when the ranks of this node sum a tensor. A single rank has no link to test."""
    if slots == 1:
        return []
    end_s, port = time.monotonic() + COLLECTIVE_S, free_port()
    problems = []
    with ExitStack() as stack:
        ranks = []
        for rank in range(slots):
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            ranks.append((_start(rank, slots, port, device, output.fileno()), output))
            stack.callback(_end, ranks[-1][0])
        for rank, (process, output) in enumerate(ranks):
            try:
                process.wait(max(0.0, end_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                problems.append(f"local rank {rank} did not finish within {COLLECTIVE_S:g} s")
                continue
            if process.returncode:
                output.seek(0)
                why = output.read().strip().rpartition("\n")[2] or f"exit code {process.returncode}"
                problems.append(f"local rank {rank}: {why}")
    head = f"a sum over the {slots} devices of this node failed; check its GPUs and their links"
    return [f"{head}: {'; '.join(problems)}"] if problems else []


def _start(rank: int, world: int, port: int, device: str, output: int) -> "subprocess.Popen[bytes]":
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
    env = os.environ | {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, "-m", "dit_scale.elastic.node.collective", device]
    return subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def main(device: str) -> int:
    """Run one rank; the exit code is 1 if the sum is wrong."""
    import torch

    from dit_scale import dist

    world = dist.start(EngineConfig.model_validate({"device": device}))
    ones = torch.ones(NUMBERS, device=world.device)
    is_right = bool((world.sum(ones) == world.size).all())
    dist.stop()
    if not is_right:
        print(f"wrong sum: expected {world.size} in every element")
    return int(not is_right)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
