"""Read a latent data set again from the first byte to the last and say what is wrong with it.

    python data_pipeline/verify.py URL
    python data_pipeline/verify.py URL --grid compared.png --images 16 --vae FOLDER

`dit_scale/data/verify.py` says what is looked at. With --grid, random samples of a sound data set are
decoded and shown beside the images that they were made of: the crop, the image view, the mirror view.
"""

import argparse
import os.path
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from dit_scale.data.shards import LatentDataset
from dit_scale.data.verify import sound, verify
from dit_scale.errors import DitScaleError
from dit_scale.storage import open_storage
from dit_scale.storage.outputs import check_output


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0 sound, 1 damaged, 2 no finished data set, or --grid has nothing to compare with."""
    options = _parse(arguments)
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
    try:
        if options.grid:
            check_output(options.grid, ".png")
        info, problems = verify(open_storage(options.url), options.threads, console, console.print)
        for problem in problems:
            print(f"wrong: {problem}", file=sys.stderr)
        if problems:
            return 1
        print(sound(info))
        if options.grid:
            _compare(options, console)
    except DitScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Verify a latent data set completely; with --grid, compare samples with their images.",
        epilog="exit codes: 0 sound, 1 damaged, 2 no finished data set, or nothing to compare it with",
    )
    parser.add_argument("url", help="its folder or s3:// prefix")
    parser.add_argument(
        "--threads", type=_number, default=4, help="shards read and held in memory at once (default 4)"
    )
    parser.add_argument(
        "--grid",
        type=os.path.expanduser,
        metavar="FILE.png",
        help="show random samples beside their images here",
    )
    parser.add_argument("--images", type=_number, default=16, help="how many (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="which (default 0)")
    parser.add_argument("--vae", help="folder or hub name of the VAE (default: as dataset.json names it)")
    parser.add_argument("--source", help="where the images are now (default: as dataset.json says)")
    return parser.parse_args(arguments)


def _number(text: str) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= 100):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to 100, got {text!r}")
    return int(text)


def _compare(options: argparse.Namespace, console: Console) -> None:
    from dit_scale.dist import choose_device
    from dit_scale.inference.image_files import write_grid
    from dit_scale.inference.preview import load_decoder, random_ids
    from dit_scale_pipeline.compare import compare, find_source
    from dit_scale_pipeline.inputs.names import shown

    dataset = LatentDataset.open(options.url)
    uri, listing = find_source(dataset, options.source, console)
    decoder = load_decoder(dataset, options.vae, choose_device("auto"))
    pictures, psnrs_db = [], []
    ids = random_ids(len(dataset), options.images, options.seed)
    for compared in compare(dataset, uri, listing, decoder, ids):
        pictures.append(compared.picture)
        psnrs_db.append(compared.psnr_db)
        name = shown(dataset.info.class_names[compared.label])
        print(
            f"sample {compared.sample_id:>9}  class {compared.label:>5}  {name}  {shown(compared.path)}"
            f"  PSNR {compared.psnr_db:.1f} dB"
        )
    write_grid(np.stack(pictures), Path(options.grid))
    views = " | ".join(("crop", *dataset.info.views))
    print(f"{len(ids)} samples, median PSNR {np.median(psnrs_db):.1f} dB; {views} -> {options.grid}")
