"""`dit-scale latents ACTION`: what a latent data set holds."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from dit_scale.cli.arguments import command, group, int_between, place

if TYPE_CHECKING:
    from dit_scale.data.shards import DatasetInfo

FEW = 5
"""Quarantined inputs that are named unless all are asked for."""


def add(commands: Any) -> None:
    """Declare the commands."""
    actions = group(
        commands,
        "latents",
        "describe, verify or show a latent data set",
        example="dit-scale latents verify s3://bucket/imagenet256",
    )
    info = command(
        actions,
        "info",
        _info,
        "what dataset.json says; reads nothing else",
        example="dit-scale latents info s3://bucket/imagenet256",
    )
    info.add_argument("url", help="folder or s3:// prefix")
    info.add_argument("--quarantined", action="store_true", help="name all inputs without a sample, and why")
    info.add_argument("--json", action="store_true", help="an object, for machines; names all of them")
    verify = command(
        actions,
        "verify",
        _verify,
        "read every byte and name what is damaged; code 1 if anything is",
        description="""Read a data set again from the first byte to the last: digests, members of the tars,
checksum, shape and label of every sample, counts, channel statistics.
Ends with code 0 when it is sound, 1 when not (every problem is named), 2 when there is none.""",
        example="dit-scale latents verify s3://bucket/imagenet256",
    )
    verify.add_argument("url", help="folder or s3:// prefix")
    verify.add_argument(
        "--threads",
        type=int_between(1, 256),
        default=4,
        help="shards read, and held in memory, at once (default 4)",
    )
    verify.add_argument("--json", action="store_true", help="an object, for machines")
    _add_show(actions)


def _add_show(actions: Any) -> None:
    show = command(
        actions,
        "show",
        _show,
        "decode samples into a picture",
        description="""Decode samples and write them as one PNG, each as its image view and its mirror view,
side by side; their ids and classes are printed in the same order, row by row.

  dit-scale latents show s3://bucket/imagenet256 --images 16 --seed 1
  dit-scale latents show runs/demo/latents --ids 3,17 --vae demo/vae""",
    )
    show.add_argument("url", help="folder or s3:// prefix")
    chosen = show.add_mutually_exclusive_group()
    chosen.add_argument("--images", type=int_between(1, 100), default=16, help="random samples (default 16)")
    chosen.add_argument("--ids", type=_ids, help="comma list of sample ids instead")
    show.add_argument("--seed", type=int_between(0), default=0, help="which random samples (default 0)")
    show.add_argument("--vae", default=None, help="folder or hub name (default: as dataset.json names it)")
    show.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    show.add_argument("--out", type=place, default="latents.png", help="PNG file (default latents.png)")


def _info(args: argparse.Namespace) -> int:
    import json

    from dit_scale.data.shards import read_info
    from dit_scale.storage import open_storage

    storage = open_storage(args.url)
    info = read_info(storage, _note)
    if args.json:
        print(json.dumps({"url": storage.url, **_tree(info)}, indent=2))
    else:
        print(storage.url)
        print(_text(info, len(info.quarantined) if args.quarantined else FEW))
    return 0


def _verify(args: argparse.Namespace) -> int:
    import json

    from rich.console import Console

    from dit_scale.data.verify import sound, verify
    from dit_scale.storage import open_storage

    storage = open_storage(args.url)
    info, problems = verify(storage, args.threads, Console(stderr=True), _note)
    if args.json:
        print(json.dumps({"url": storage.url, "samples": info.samples, "problems": problems}, indent=2))
        return int(bool(problems))
    for problem in problems:
        print(f"wrong: {problem}", file=sys.stderr)
    if not problems:
        print(sound(info))
    return int(bool(problems))


def _show(args: argparse.Namespace) -> int:
    from pathlib import Path

    import numpy as np

    from dit_scale.data.shards import LatentDataset
    from dit_scale.dist import choose_device
    from dit_scale.inference.image_files import write_grid
    from dit_scale.inference.preview import decode, load_decoder, random_ids, side_by_side
    from dit_scale.storage.outputs import check_output

    check_output(args.out, ".png")
    dataset = LatentDataset.open(args.url)
    decoder = load_decoder(dataset, args.vae, choose_device(args.device))
    tiles = []
    for sample_id in args.ids or random_ids(len(dataset), args.images, args.seed):
        views, label = decode(dataset, decoder, sample_id)
        tiles.append(side_by_side(views))
        print(f"sample {sample_id:>9}  class {label:>5}  {dataset.info.class_names[label]}")
    write_grid(np.stack(tiles), Path(args.out))
    print(f"{len(tiles)} samples, {' | '.join(dataset.info.views)} -> {args.out}")
    return 0


def _note(text: str) -> None:
    """For people, beside the answer."""
    print(f"note: {text}", file=sys.stderr)


def _tree(info: "DatasetInfo") -> dict[str, Any]:
    """dataset.json with the shards counted instead of listed."""
    tree: dict[str, Any] = info.model_dump(mode="json", exclude={"shards"})
    return {**tree, "num_shards": len(info.shards), "bytes": _bytes(info)}


def _text(info: "DatasetInfo", few: int) -> str:
    """All of it for people, with `few` of the quarantined inputs."""
    vae, source = info.vae, info.source
    rows = {
        "samples": f"{info.samples} of {info.num_classes} classes",
        "shards": f"{len(info.shards)}, {_bytes(info) / 1e6:.1f} MB",
        "images": f"{info.image_size} px, crop {info.crop}",
        "latents": f"{list(info.latent_shape)} {info.latent_dtype}, views {' and '.join(info.views)}",
        "VAE": f"{vae.name}, scale {vae.scale:g}, weights sha256 {vae.weights_sha256}",
        "encoding": ", ".join(f"{name} {value}" for name, value in info.encoding.items()),
        "source": f"{source.kind} {source.uri}: {source.count} inputs",
        "": f"listing sha256 {source.listing_sha256}",
        "channel mean": " ".join(f"{value:.6f}" for value in info.channel_mean),
        "channel std": " ".join(f"{value:.6f}" for value in info.channel_std),
        "quarantined": f"{len(info.quarantined)} inputs gave no sample",
    }
    lines = [f"  {name:<14}{value}" for name, value in rows.items()]
    lines += [f"    {item.path}: {item.reason}" for item in info.quarantined[:few]]
    if few < len(info.quarantined):
        lines.append(f"    and {len(info.quarantined) - few} more; --quarantined names all")
    return "\n".join(lines)


def _bytes(info: "DatasetInfo") -> int:
    """Of all tars."""
    return sum(shard.bytes for shard in info.shards)


def _ids(text: str) -> list[int]:
    return [int_between(0)(part.strip()) for part in text.split(",")]
