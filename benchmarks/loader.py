"""Benchmark the data loader: samples/s on one core compared to webdataset, order, resume, cold cache.

    python -m benchmarks.loader
    python -m benchmarks.loader --smoke

Data sets are random numbers in the real format, in a temporary folder. They stay in the page cache, so
the benchmark measures the reading program and not the disk.

- `read`: the Loader as in training, including its thread, in training order (every sample at a random
  place) and with checksums verified, compared to `wds.WebDataset(...).decode()`, which reads sequentially
  in one process without workers. Each runs in its own process; both are pinned to the same core and
  alternate. Figures are medians over the rounds after a warm-up round. Real records hold two views, one
  of which is drawn; records with one view contain only data that is used, as in webdataset.
  If mosaicml-streaming is installed, its StreamingDataset takes turns with both: shuffled, in one process
  without workers, from a copy of the data in its own format, uncompressed and without checksums.
- `order`: sample ids/s for a data set of the size of ImageNet, in blocks as the Loader requests them.
- `resume`: time to open the data set and read the first micro-batch, at the start of a run and far into it.
- `cold`: the same from a local S3 server with an empty cache, and the time until all shards are cached.
"""

import argparse
import json
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from dit_scale.config import DataConfig
from dit_scale.data.batch_plan import batch_plan
from dit_scale.data.loader import BLOCK_SAMPLES, Loader
from dit_scale.data.order import Order
from dit_scale.data.shards import LatentDataset
from dit_scale.storage import open_storage
from tests.support.latents import write_latents

IMAGENET_SHARDS = (*[4096] * 312, 3215)
"""1,281,167 samples."""
RECORDS = ((256, 1), (512, 1), (256, 2), (512, 2))
"""(image size, views): records of 16, 64, 32 and 128 KiB."""
FAR = 10**12
"""A position beyond the end of any real run."""
HAS_STREAMING = find_spec("streaming") is not None
PACKAGES = ("numpy", "torch", "webdataset", "google-crc32c", *["mosaicml-streaming"] * HAS_STREAMING)

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure everything and print one line per row."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--smoke", action="store_true", help="read a few small samples to check that the benchmark works"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per median (default 5)")
    parser.add_argument("--megabytes", type=int, default=128, help="MiB per data set (default 128)")
    parser.add_argument("--micro-batch", type=int, default=32, help="samples (default 32)")
    args = parser.parse_args(argv)
    if args.smoke:
        args.rounds, args.megabytes, args.micro_batch = 1, 1, 4
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(Path(folder), args):
            row |= {"micro_batch": args.micro_batch, "rounds": args.rounds, "versions": versions()}
            print(json.dumps(row) if args.json else text(row), flush=True)
    return 0


def measure(folder: Path, args: argparse.Namespace) -> Iterator[Row]:
    """Yield each row as soon as it is measured."""
    sets = {}
    for image_size, views in RECORDS:
        sets[image_size, views] = folder / f"{image_size}-{views}"
        num = args.megabytes * 2**20 // record_bytes(image_size, views)
        write_latents(
            sets[image_size, views],
            num=num,
            image_size=image_size,
            num_classes=1000,
            shard_samples=-(-num // 8),
            views=views,
        )
    with ExitStack() as stack:
        ours, webdataset, streaming = (stack.enter_context(one_core()) for _ in range(3))
        readers = {
            "samples_per_s": lambda path: ours.submit(loader_rate, path, args.micro_batch),
            "webdataset_samples_per_s": lambda path: webdataset.submit(webdataset_rate, path),
        }
        if HAS_STREAMING:
            readers["streaming_samples_per_s"] = lambda path: streaming.submit(
                streaming_rate, path, args.micro_batch
            )
        for (image_size, views), path in sets.items():
            found: dict[str, list[float]] = {name: [] for name in readers}
            for _ in range(1 + args.rounds):
                for name, read in readers.items():
                    found[name].append(read(path).result())
            yield {
                "what": "read",
                "image_size": image_size,
                "views": views,
                "record_bytes": record_bytes(image_size, views),
                **ratios({name: median(values[1:]) for name, values in found.items()}),
            }
        if not HAS_STREAMING:
            yield {"what": "skipped", "reason": "StreamingDataset: mosaicml-streaming is not installed"}
        for window_shards in (0, 16):
            rates = [ours.submit(ids_per_s, window_shards, i * 10**6).result() for i in range(args.rounds)]
            yield {"what": "order", "window_shards": window_shards, "ids_per_s": median(rates)}
        for position in (0, FAR):
            times = [
                ours.submit(first_batch_s, sets[256, 2], position, args.micro_batch).result()
                for _ in range(args.rounds)
            ]
            yield {"what": "resume", "position": position, "first_batch_s": median(times)}
    yield cold(sets[256, 2], folder, args.micro_batch)


def ratios(rates: dict[str, float]) -> dict[str, float]:
    """Add our rate divided by each other one."""
    ours = rates["samples_per_s"]
    return rates | {
        name.replace("samples_per_s", "ratio"): ours / rate
        for name, rate in rates.items()
        if name != "samples_per_s"
    }


def record_bytes(image_size: int, views: int) -> int:
    """Bytes of a sample's fp16 latents."""
    return views * 8 * (image_size // 8) ** 2 * 2


def loader_rate(path: Path, micro_batch: int, epochs: int = 4) -> float:
    """Samples/s of a Loader, including its start."""
    dataset = LatentDataset.open(path)
    dataset.labels()  # reads the indexes, once per run
    plan = batch_plan(micro_batch, micro_batch, 1)
    num_batches = epochs * len(dataset) // micro_batch
    flip = len(dataset.info.views) == 2
    start = time.perf_counter()
    loader = Loader(dataset, DataConfig(horizontal_flip=flip), plan, rank=0, seed=0, first_step=0)
    taken = sum(len(batch.y_B) for batch in islice(loader, num_batches))
    elapsed = time.perf_counter() - start
    loader.close()
    return taken / elapsed


def webdataset_rate(path: Path) -> float:
    """Samples/s of webdataset, including its start."""
    import webdataset

    tars = sorted(str(tar) for tar in (path / "shards").glob("*.tar"))
    start = time.perf_counter()
    taken = 0
    for sample in webdataset.WebDataset(tars, shardshuffle=False).decode():
        assert sample["latent.npy"].dtype == np.float16
        assert isinstance(sample["cls"], int)
        taken += 1
    return taken / (time.perf_counter() - start)


def streaming_rate(path: Path, micro_batch: int, epochs: int = 4) -> float:
    """Samples/s of StreamingDataset, without its start."""
    dataset = streaming_dataset(path, micro_batch)
    start = time.perf_counter()
    taken = 0
    for _ in range(epochs):
        for sample in dataset:
            assert sample["latent"].dtype == np.float16
            taken += 1
    assert taken >= epochs * dataset.num_samples
    return taken / (time.perf_counter() - start)


@cache
def streaming_dataset(path: Path, micro_batch: int) -> Any:
    """Convert a data set to the format of StreamingDataset; a process can open a folder only once."""
    from streaming import MDSWriter, StreamingDataset

    dataset, folder = LatentDataset.open(path), path.with_name(f"{path.name}-mds")
    shape = ",".join(map(str, dataset.info.latent_shape))
    columns = {"latent": f"ndarray:float16:{shape}", "label": "int"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for sample_id in range(len(dataset)):
            latent, label = dataset.read(sample_id)
            writer.write({"latent": latent, "label": label})
    return StreamingDataset(local=str(folder), shuffle=True, batch_size=micro_batch)


def ids_per_s(window_shards: int, first: int, num_blocks: int = 64) -> float:
    """Sample ids/s over consecutive blocks of positions."""
    order = Order(sum(IMAGENET_SHARDS), 0, IMAGENET_SHARDS, window_shards)
    start = time.perf_counter()
    for block in range(num_blocks):
        order.ids(first + block * BLOCK_SAMPLES + np.arange(BLOCK_SAMPLES))
    return num_blocks * BLOCK_SAMPLES / (time.perf_counter() - start)


def first_batch_s(url: str | Path, position: int, micro_batch: int) -> float:
    """Seconds to open the data set, start a Loader and read the first micro-batch."""
    start = time.perf_counter()
    dataset = LatentDataset.open(url)
    plan = batch_plan(micro_batch, micro_batch, 1)
    loader = Loader(dataset, DataConfig(), plan, rank=0, seed=0, first_step=position // micro_batch)
    next(loader)
    elapsed = time.perf_counter() - start
    loader.close()
    return elapsed


def cold(path: Path, folder: Path, micro_batch: int) -> Row:
    """Time to the first micro-batch from S3 with an empty cache, and until all shards are cached."""
    from tests.support.s3 import BUCKET, s3_server

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line per request
    with s3_server() as environment:
        os.environ |= environment
        source, target = open_storage(path), open_storage(f"s3://{BUCKET}/latents")
        for key, _ in source.list():
            target.write(key, source.read(key))
        with one_core() as process:
            return process.submit(cold_start, target.url, folder / "cache", micro_batch).result()


def cold_start(url: str, cache_dir: Path, micro_batch: int) -> Row:
    """Measure a Loader with an empty cache."""
    start = time.perf_counter()
    dataset = LatentDataset.open(url, cache_dir)
    plan = batch_plan(micro_batch, micro_batch, 1)
    loader = Loader(dataset, DataConfig(), plan, rank=0, seed=0, first_step=0)
    next(loader)
    first_s = time.perf_counter() - start
    files = dataset.files.shards
    num_cached = sum(map(dataset.cache.holds, files))
    while not all(map(dataset.cache.holds, files)):
        time.sleep(0.01)
    all_s = time.perf_counter() - start
    loader.close()
    return {
        "what": "cold",
        "first_batch_s": first_s,
        "shards": len(files),
        "shards_cached_by_then": num_cached,
        "all_cached_s": all_s,
        "data_bytes": sum(file.size_bytes for file in files),
    }


@contextmanager
def one_core() -> Iterator[ProcessPoolExecutor]:
    """Provide a process that is pinned to the last core available to this one."""
    spawn = multiprocessing.get_context("spawn")
    core = max(os.sched_getaffinity(0))
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_pin_to_core, initargs=(core,)) as pool:
        yield pool


def _pin_to_core(core: int) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)


def versions() -> dict[str, str]:
    """Versions of the packages that affect the figures."""
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in PACKAGES}


def text(row: Row) -> str:
    """Format a row for people."""
    match row["what"]:
        case "read":
            others = (
                f"{name} {row[f'{name}_samples_per_s']:,.0f}, ratio {row[f'{name}_ratio']:.1f}"
                for name in ("webdataset", "streaming")
                if f"{name}_ratio" in row
            )
            return (
                f"read    {row['image_size']} px, {row['views']} view(s), {row['record_bytes'] // 1024} KiB: "
                f"{row['samples_per_s']:,.0f} samples/s; {'; '.join(others)}"
            )
        case "skipped":
            return f"skipped {row['reason']}"
        case "order":
            return f"order   windows of {row['window_shards']} shards: {row['ids_per_s']:,.0f} ids/s"
        case "resume":
            return f"resume  position {row['position']:,}: first batch in {row['first_batch_s'] * 1e3:.1f} ms"
    return (
        f"cold    first batch in {row['first_batch_s'] * 1e3:.0f} ms with {row['shards_cached_by_then']} of "
        f"{row['shards']} shards cached, all of them in {row['all_cached_s'] * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    sys.exit(main())
