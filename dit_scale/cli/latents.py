"""`dit-scale latents ACTION`: describe, verify or show a latent data set."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import add_command, add_group, int_between, output_path
from dit_scale.cli.tables import UNLIMITED_WIDTH, print_table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dit_scale.data.shards import DatasetInfo

MAX_QUARANTINED_SHOWN = 5
"""Quarantined inputs that `info` names without --quarantined."""


def add(commands: Any) -> None:
    """Declare the commands."""
    actions = add_group(
        commands,
        "latents",
        "describe, verify or show a latent data set",
        example="dit-scale latents verify s3://bucket/imagenet256",
    )
    _add_info(actions)
    _add_verify(actions)
    _add_show(actions)


def _add_info(actions: Any) -> None:
    info = add_command(
        actions,
        "info",
        _info,
        "print what dataset.json says, without reading the shards",
        example="dit-scale latents info s3://bucket/imagenet256",
    )
    info.add_argument("url", help="folder or s3:// prefix")
    info.add_argument(
        "--quarantined", action="store_true", help="list every quarantined input and the reason"
    )
    info.add_argument("--json", action="store_true", help="print JSON, with every quarantined input")


def _add_verify(actions: Any) -> None:
    verify = add_command(
        actions,
        "verify",
        _verify,
        "read every byte and report all damage",
        description="""\
Read a data set from the first byte to the last. Check digests, tar members, counts, channel
statistics, and the checksum, shape and label of every sample.

With --grid, also decode random samples and write them next to their source images: each row of the
picture has the crop, the decoded image view and the decoded mirror view. PSNR compares the first two.

  dit-scale latents verify s3://bucket/imagenet256
  dit-scale latents verify s3://bucket/imagenet256 --grid compared.png --source /data/imagenet/train

Exit codes: 0 intact, 1 damaged (every problem is reported), 2 no finished data set, or the source
images of --grid are missing or have changed.""",
    )
    verify.add_argument("url", help="folder or s3:// prefix")
    verify.add_argument(
        "--threads",
        type=int_between(1, 256),
        default=4,
        help="shards to read in parallel; each is held in memory (default 4)",
    )
    output = verify.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument(
        "--grid", type=output_path, metavar="FILE.png", help="compare random samples with their images"
    )
    verify.add_argument(
        "--images", type=int_between(1, 100), default=16, help="samples in the grid (default 16)"
    )
    verify.add_argument("--seed", type=int_between(0), default=0, help="seed of their selection (default 0)")
    verify.add_argument("--vae", default=None, help="folder or hub name (default: the one in dataset.json)")
    verify.add_argument(
        "--source", default=None, help="where the images are now (default: the path in dataset.json)"
    )
    verify.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the VAE (default auto)"
    )


def _add_show(actions: Any) -> None:
    show = add_command(
        actions,
        "show",
        _show,
        "decode samples into a picture",
        description="""\
Decode samples and write them to one PNG, the image view and the mirror view of each side
by side. The printed table lists their ids and classes in the same order, row by row.

  dit-scale latents show s3://bucket/imagenet256 --images 16 --seed 1
  dit-scale latents show runs/demo/latents --ids 3,17 --vae demo/vae""",
    )
    show.add_argument("url", help="folder or s3:// prefix")
    chosen = show.add_mutually_exclusive_group()
    chosen.add_argument(
        "--images", type=int_between(1, 100), default=16, help="number of random samples (default 16)"
    )
    chosen.add_argument("--ids", type=_ids, help="comma-separated sample ids, instead of random ones")
    show.add_argument("--seed", type=int_between(0), default=0, help="seed of the selection (default 0)")
    show.add_argument("--vae", default=None, help="folder or hub name (default: the one in dataset.json)")
    show.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device of the VAE (default auto)"
    )
    show.add_argument(
        "--out", type=output_path, default="latents.png", help="picture to write (default latents.png)"
    )


def _info(args: argparse.Namespace) -> int:
    import json

    from dit_scale.data.shards import read_info
    from dit_scale.storage import open_storage

    storage = open_storage(args.url)
    info = read_info(storage, _note)
    if args.json:
        print(json.dumps({"url": storage.url, **_tree(info)}, indent=2))
        return 0
    print(storage.url)
    print_table(_description(info), UNLIMITED_WIDTH)
    shown = info.quarantined if args.quarantined else info.quarantined[:MAX_QUARANTINED_SHOWN]
    for item in shown:
        print(f"    {item.path}: {item.reason}")
    if len(shown) < len(info.quarantined):
        print(f"    and {len(info.quarantined) - len(shown)} more; --quarantined lists all")
    return 0


def _verify(args: argparse.Namespace) -> int:
    import json

    from rich.console import Console

    from dit_scale.data.verify import sound, verify
    from dit_scale.storage import open_storage
    from dit_scale.storage.outputs import check_output

    if args.grid:
        check_output(args.grid, ".png")
    storage = open_storage(args.url)
    # Names may contain brackets and colons, which are not markup.
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    info, problems = verify(storage, args.threads, console, _note)
    if args.json:
        print(json.dumps({"url": storage.url, "samples": info.samples, "problems": problems}, indent=2))
        return int(bool(problems))
    for problem in problems:
        print(f"damaged: {problem}", file=sys.stderr)
    if problems:
        return 1
    print(sound(info))
    if args.grid:
        _write_comparison(args, console)
    return 0


def _write_comparison(args: argparse.Namespace, console: "Console") -> None:
    """Decode random samples, compare each with its source image, and write the grid."""
    from pathlib import Path

    import numpy as np

    from dit_scale.data.shards import LatentDataset
    from dit_scale.dist import choose_device
    from dit_scale.inference.preview import random_ids
    from dit_scale.sampling.image_files import write_grid
    from dit_scale.vae import load_decoder
    from dit_scale_pipeline.compare import compare, find_source
    from dit_scale_pipeline.inputs.names import printable

    dataset = LatentDataset.open(args.url)
    uri, listing = find_source(dataset, args.source, console)
    decoder = load_decoder(dataset, args.vae, choose_device(args.device))
    ids = random_ids(len(dataset), args.images, args.seed)
    compared = list(compare(dataset, uri, listing, decoder, ids))
    table = _samples_table("image", "PSNR (dB)")
    for sample in compared:
        name = printable(dataset.info.class_names[sample.label])
        table.add_row(
            str(sample.sample_id), str(sample.label), name, printable(sample.path), f"{sample.psnr_db:.1f}"
        )
    print_table(table, UNLIMITED_WIDTH)
    write_grid(np.stack([sample.picture for sample in compared]), Path(args.grid))
    median_db = np.median([sample.psnr_db for sample in compared])
    views = " | ".join(("crop", *dataset.info.views))
    print(f"{len(ids)} samples, median PSNR {median_db:.1f} dB; {views} -> {args.grid}")


def _show(args: argparse.Namespace) -> int:
    from pathlib import Path

    import numpy as np

    from dit_scale.data.shards import LatentDataset
    from dit_scale.dist import choose_device
    from dit_scale.inference.preview import decode, random_ids, side_by_side
    from dit_scale.sampling.image_files import write_grid
    from dit_scale.storage.outputs import check_output
    from dit_scale.vae import load_decoder

    check_output(args.out, ".png")
    dataset = LatentDataset.open(args.url)
    decoder = load_decoder(dataset, args.vae, choose_device(args.device))
    tiles, table = [], _samples_table()
    for sample_id in args.ids or random_ids(len(dataset), args.images, args.seed):
        views, label = decode(dataset, decoder, sample_id)
        tiles.append(side_by_side(views))
        table.add_row(str(sample_id), str(label), dataset.info.class_names[label])
    print_table(table, UNLIMITED_WIDTH)
    write_grid(np.stack(tiles), Path(args.out))
    print(f"{len(tiles)} samples, {' | '.join(dataset.info.views)} -> {args.out}")
    return 0


def _note(text: str) -> None:
    """Print a note to standard error, apart from the result."""
    print(f"note: {text}", file=sys.stderr)


def _samples_table(*more_columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("sample", justify="right")
    table.add_column("label", justify="right")
    for name in ("class", *more_columns):
        table.add_column(name, no_wrap=True)
    return table


def _tree(info: "DatasetInfo") -> dict[str, Any]:
    """Return dataset.json with the number of shards in place of their list."""
    tree: dict[str, Any] = info.model_dump(mode="json", exclude={"shards"})
    return {**tree, "num_shards": len(info.shards), "bytes": _tar_bytes(info)}


def _description(info: "DatasetInfo") -> "Table":
    """Return all of dataset.json but the shards and the quarantined inputs, one fact per row."""
    from rich.table import Table

    vae, source = info.vae, info.source
    facts = {
        "samples": f"{info.samples} of {info.num_classes} classes",
        "shards": f"{len(info.shards)}, {_tar_bytes(info) / 1e6:.1f} MB",
        "images": f"{info.image_size} px, crop {info.crop}",
        "latents": f"{list(info.latent_shape)} {info.latent_dtype}, views {' and '.join(info.views)}",
        "VAE": f"{vae.name}, scale {vae.scale:g}, weights sha256 {vae.weights_sha256}",
        "encoding": ", ".join(f"{name} {value}" for name, value in info.encoding.items()),
        "source": f"{source.kind} {source.uri}: {source.count} inputs",
        "listing": f"sha256 {source.listing_sha256}",
        "channel mean": " ".join(f"{value:.6f}" for value in info.channel_mean),
        "channel std": " ".join(f"{value:.6f}" for value in info.channel_std),
        "quarantined": f"{len(info.quarantined)} inputs",
    }
    table = Table(box=None, show_header=False, padding=(0, 0, 0, 2))
    for fact in facts.items():
        table.add_row(*fact)
    return table


def _tar_bytes(info: "DatasetInfo") -> int:
    return sum(shard.bytes for shard in info.shards)


def _ids(text: str) -> list[int]:
    return [int_between(0)(part.strip()) for part in text.split(",")]
