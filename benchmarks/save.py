"""Benchmark checkpoints: stall of the training loop, write speed compared to dd, and time to resume.

    python -m benchmarks.save --folder /where/checkpoints/go
    python -m benchmarks.save --smoke

One process trains a real run on random latents, saves it and resumes it. The state is fp32: master
weights, both moments and one moving average. Figures are medians over the rounds; compared operations
alternate.

- `stall`: the copy of the state to memory shared with the writer, which pauses the loop, compared to a
  copy of the same buffers to ordinary memory that was touched before (pinned memory on CUDA).
- `step`: an iteration of the training loop without a save, one that starts a save, and those until the
  loop sees the commit. On a CPU, the writer and the step compete for cores and memory. Each iteration
  ends with a device synchronization, which training does not have.
- `write`: a rank's file as the writer writes it, from checksums to fsync, compared to `dd bs=4M
  conv=fsync` from the same memory to the same folder, each after a `sync`. `verified` includes reading
  every byte back.
- `method`: for ours, `torch.save` and `torch.distributed.checkpoint` (`benchmarks/savers.py`): the stall of
  the loop, the time until the checkpoint is durable (ours is also read back and verified), the CPU time that
  this takes in the process of the loop, and the time to load it into the same tensors, from the disk and from
  the page cache. No step runs meanwhile.
- `resume`: the time from a new process, with all imports done except DeepSpeed's, to the first
  micro-batch. Neither the checkpoint nor the data is in the page cache.
- `fill`: the time to open, read and verify a checkpoint and copy it to its owners' buffers, from the disk
  or from the page cache; at world size 3, the shares of the ranks one after the other.
"""

import argparse
import json
import mmap
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.save_resume import OTHER_WORLD, resuming, seconds, wait
from benchmarks.savers import compare
from dit_scale import dist
from dit_scale.checkpoint import rankfile
from dit_scale.checkpoint.partition import Partition
from dit_scale.checkpoint.saver import Snapshot
from dit_scale.config import CheckpointConfig, DataConfig, EngineConfig, LogConfig, ModelConfig, TrainConfig
from dit_scale.dist import World
from dit_scale.heartbeat import Heart
from dit_scale.storage import Storage, open_storage
from dit_scale.train import determinism
from dit_scale.train.session import Session
from tests.support.latents import write_latents

WARMUP_STEPS = 3
STEPS_BETWEEN_SAVES = 3
FILLS = ((1, False), (1, True), (OTHER_WORLD, True))
"""(world size of the reader, whether the checkpoint is in the page cache)."""
NEVER = 10**6
"""Interval in steps that is never reached: the benchmark triggers saves itself."""
PACKAGES = ("dit-scale", "torch", "deepspeed", "numpy", "google-crc32c")
SMOKE = {"model": "DiT-Ti/2", "image_size": 32, "micro_batch": 2, "rounds": 1, "device": "cpu"}

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything and print one line per row."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.smoke:
        parser.set_defaults(**SMOKE)
        args = parser.parse_args(argv)
    if args.folder and not args.folder.is_dir():
        parser.error(f"--folder {args.folder}: expected an existing folder")
    settings = {
        "model": args.model,
        "image_size": args.image_size,
        "micro_batch": args.micro_batch,
        "rounds": args.rounds,
        "versions": _versions(),
    }
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for row in measure(Path(folder), args):
            print(json.dumps(settings | row) if args.json else _text(row), flush=True)
    if not args.json:
        print(row["device"], *(f"{name} {version}" for name, version in settings["versions"].items()))
    return 0


def measure(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Yield the rows of a process that trains, then those of processes that resume its run."""
    config = _config(folder, args)
    write_latents(config.data.url, 16 * args.micro_batch, args.image_size, config.model.num_classes)
    with _process() as process:
        rows = process.submit(saving, config, folder, args.rounds).result()
    yield from rows
    shared = {key: rows[0][key] for key in ("device", "state_bytes")}
    times = []
    for _ in range(args.rounds):
        with _process() as process:
            times.append(process.submit(resuming, config).result())
    built_s, filled_s, first_batch_s, *fills_s = (median(column) for column in zip(*times, strict=True))
    resume = {"built_s": built_s, "filled_s": filled_s, "first_batch_s": first_batch_s}
    yield {"what": "resume", **resume, **shared}
    for (world, cached), fill_s in zip(FILLS, fills_s, strict=True):
        speed = {"fill_s": fill_s, "bytes_per_s": shared["state_bytes"] / fill_s}
        yield {"what": "fill", "world": world, "cached": cached, **speed, **shared}


def saving(config: TrainConfig, folder: Path, rounds: int) -> list[Row]:
    """Train and save, keep the newest checkpoint, and return the rows from `stall` to `method`."""
    determinism.pin(config.engine)
    world = dist.start(config.engine)
    with ExitStack() as stack:
        stack.callback(dist.stop)
        run = Session(config, world, Heart(world.rank), stack)
        for _ in range(WARMUP_STEPS):
            turn(run, world)
        shared = {"device": _device_name(world.device), "state_bytes": run.saver.snapshot.bytes}
        rows = [
            stall(run.saver.snapshot, run.trainer.engine.owned, rounds),
            step(run, world, rounds),
            write(run.saver.snapshot, open_storage(folder / "write"), folder / "dd", rounds),
        ]
        with _process() as others:
            rows += compare(run, lambda: turn(run, world), others, folder, rounds)
    return [row | shared for row in rows]


def stall(snapshot: Snapshot, owned: Iterable[Partition], rounds: int) -> Row:
    """Compare the copy that pauses the loop to a plain copy."""
    buffers = [buffer.detach().flatten() for partition in owned for buffer in partition.buffers.values()]
    plain = [torch.empty(b.shape, dtype=b.dtype, pin_memory=b.is_cuda).zero_() for b in buffers]

    def copy() -> None:
        for host, buffer in zip(plain, buffers, strict=True):
            host.copy_(buffer, non_blocking=True)
        wait(buffers[0].device)

    times = [(seconds(snapshot.take), seconds(copy)) for _ in range(1 + rounds)]
    take_s, copy_s = (median(column) for column in zip(*times[1:], strict=True))
    return {
        "what": "stall",
        "take_s": take_s,
        "take_bytes_per_s": snapshot.bytes / take_s,
        "copy_s": copy_s,
        "copy_bytes_per_s": snapshot.bytes / copy_s,
    }


def step(run: Session, world: World, rounds: int) -> Row:
    """Turns of the loop without a save, with one that begins, and with one in flight."""
    times: dict[str, list[float]] = {
        name: [] for name in ("quiet", "beginning", "save", "writing", "committed")
    }
    for _ in range(rounds):
        times["quiet"] += [seconds(lambda: turn(run, world)) for _ in range(STEPS_BETWEEN_SAVES)]
        turn_s, save_s = seconds(lambda: turn(run, world)), seconds(run.saves.save)
        times["beginning"].append(turn_s + save_s)
        times["save"].append(save_s)
        writing = []
        while run.saver.in_flight:
            writing.append(seconds(lambda: turn(run, world)))
        times["writing"] += writing
        times["committed"].append(save_s + sum(writing))
    return {
        "what": "step",
        **{f"{name}_s": median(values) for name, values in times.items()},
        "steps_writing": len(times["writing"]) / rounds,
    }


def turn(run: Session, world: World) -> None:
    """One turn of the training loop, as `dit_scale.train.loop` has it between two saves and log points."""
    sums = run.trainer.accumulate(run.attempt.loader)
    vote = world.start_vote(*run.saves.flags())
    row = run.trainer.update(sums, run.state.step)
    run.state.step += 1
    run.attempt.meters.add(row)
    run.saves.follow(*vote.result())
    wait(world.device)


def write(snapshot: Snapshot, storage: Storage, dd_file: Path, rounds: int) -> Row:
    """Compare writing a rank's file from the snapshot to dd."""
    memory = np.frombuffer(mmap.mmap(snapshot.file, snapshot.bytes), np.uint8)
    dd = ["dd", f"if=/dev/fd/{snapshot.file}", f"of={dd_file}", "bs=4M", "conv=fsync", "status=none"]
    key = f"checkpoint/{rankfile.file_name(0)}"
    times = []
    for _ in range(rounds):
        os.sync()
        dd_s = seconds(lambda: subprocess.run(dd, pass_fds=[snapshot.file], check=True))
        dd_file.unlink()
        os.sync()
        begin = time.perf_counter()
        record = rankfile.write(storage, key, memory, snapshot.slices)
        write_s = time.perf_counter() - begin
        rankfile.verify(storage, "checkpoint", record)
        times.append((dd_s, write_s, time.perf_counter() - begin))
        storage.delete(key)
    dd_s, write_s, verified_s = (median(column) for column in zip(*times, strict=True))
    return {
        "what": "write",
        "write_s": write_s,
        "write_bytes_per_s": snapshot.bytes / write_s,
        "dd_s": dd_s,
        "dd_bytes_per_s": snapshot.bytes / dd_s,
        "ratio": dd_s / write_s,
        "verified_s": verified_s,
    }


@contextmanager
def _process() -> Iterator[ProcessPoolExecutor]:
    """Provide a new process, because DeepSpeed cannot start twice in one process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_print_to_stderr) as pool:
        yield pool


def _print_to_stderr() -> None:
    """Redirect standard output, which is reserved for rows, because libraries print to it."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def _config(folder: Path, args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        run=str(folder / "run"),
        steps=NEVER,
        global_batch=args.micro_batch,
        model=ModelConfig(name=args.model, image_size=args.image_size),
        data=DataConfig(url=str(folder / "latents")),
        engine=EngineConfig(micro_batch=args.micro_batch, device=args.device),
        checkpoint=CheckpointConfig(every_steps=NEVER, keep=1),
        log=LogConfig(every_steps=NEVER),
    )


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "cuda": torch.version.cuda or "none",
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def _text(row: Row) -> str:
    """Format a row for people."""
    ms = {key: f"{value * 1e3:,.0f} ms" for key, value in row.items() if key.endswith("_s")}
    gb = {key: f"{value / 1e9:.2f} GB" for key, value in row.items() if "bytes" in key}
    match row["what"]:
        case "stall":
            return (
                f"stall   {ms['take_s']} for {gb['state_bytes']}, {gb['take_bytes_per_s']}/s; "
                f"a plain copy {ms['copy_s']}, {gb['copy_bytes_per_s']}/s"
            )
        case "step":
            return (
                f"step    {ms['quiet_s']}; {ms['beginning_s']} with the start of a save ({ms['save_s']}), "
                f"{ms['writing_s']} in the {row['steps_writing']:.1f} steps until its commit after "
                f"{ms['committed_s']}"
            )
        case "write":
            return (
                f"write   {gb['write_bytes_per_s']}/s, {row['ratio']:.2f} of dd ({gb['dd_bytes_per_s']}/s); "
                f"{ms['write_s']}, verified after {ms['verified_s']}"
            )
        case "resume":
            return (
                f"resume  {ms['built_s']} for model, engine and writer, {ms['filled_s']} for the state, "
                f"{ms['first_batch_s']} for the first batch"
            )
        case "method":
            return (
                f"method  {row['method']}: stall {ms['stall_s']}, durable after {ms['durable_s']} "
                f"({gb['durable_bytes_per_s']}/s), {ms['cpu_s']} of CPU time in the loop; "
                f"loaded in {ms['load_s']} from the disk, {ms['load_cached_s']} from the page cache"
            )
    source = "the page cache" if row["cached"] else "the disk"
    return f"fill    world {row['world']}, from {source}: {ms['fill_s']}, {gb['bytes_per_s']}/s"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", default="DiT-B/2", help="(default DiT-B/2, with 2.09 GB of state)")
    parser.add_argument("--image-size", type=int, default=256, help="pixels (default 256)")
    parser.add_argument("--micro-batch", type=int, default=1, help="images per step (default 1)")
    parser.add_argument(
        "--folder",
        type=Path,
        help="folder on the disk to measure, with room for two states (default: the temporary folder)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds per median (default 5)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument(
        "--smoke", action="store_true", help="run a tiny model on a CPU to check that the benchmark works"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
