"""`dit-scale sample`: draw images, few or in bulk."""

import argparse
import sys
from typing import Any

from dit_scale.cli.arguments import add_command, output_path
from dit_scale.cli.sampling_arguments import add_sampling_arguments, sample_request, sampling_worker
from dit_scale.cli.weights_arguments import SOURCE_HELP


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "sample",
        _run,
        "draw images from a run, a checkpoint or a weights file",
        description="""Draw images and write samples.npz, as evaluation programs read it, and grid.png.
Image i depends only on the protocol (weights, sampler, seed, ...), i and its class. The same command
resumes after an interruption, with any number of processes.

  dit-scale sample runs/dit_xl2_256 --images 16 --guidance 4
  dit-scale sample DiT-XL-2-256x256.pt --vae stabilityai/sd-vae-ft-ema --classes 207,360
  deepspeed --num_gpus 8 --no_local_rank --module dit_scale.cli sample runs/dit_xl2_256 --images 50000""",
    )
    parser.add_argument("source", help=SOURCE_HELP)
    add_sampling_arguments(parser, num_images=16)
    parser.add_argument(
        "--out", type=output_path, default=None, help="output folder (default: RUN/samples or samples)"
    )
    parser.add_argument(
        "--format",
        type=_formats,
        default=("npz",),
        help="comma-separated: npz (always written), png (a folder), tar (WebDataset)",
    )


def _run(args: argparse.Namespace) -> int:
    from dataclasses import replace
    from pathlib import Path

    from dit_scale.inference.bulk import sample_images
    from dit_scale.sampling.assembly import FILE_OF
    from dit_scale.sampling.sample_folder import GRID, MARK, NPZ, PROTOCOL, read_mark
    from dit_scale.storage.outputs import check_output

    is_folder = Path(args.source).is_dir()
    chosen = args.out or str(Path(args.source) / "samples" if is_folder else "samples")
    for name in (PROTOCOL, MARK, NPZ, GRID):
        check_output(f"{chosen}/{name}")
    out = Path(chosen)
    request = replace(sample_request(args), formats=args.format)
    worker, more = sampling_worker(args), [FILE_OF[name] for name in args.format if name != "npz"]
    before = read_mark(out)
    try:
        finished = sample_images(request, out, worker)
    except KeyboardInterrupt:
        print(f"{out} keeps the images that are committed; the same command resumes", file=sys.stderr)
        raise
    if finished is None:
        print(f"worker {worker.index} of {worker.count}: done; {out} is completed by the last worker")
    else:
        was_complete = "already complete: " if read_mark(out) == before else ""
        files = " and ".join(f"{out}/{name}" for name in (GRID, NPZ, *more))
        print(f"{was_complete}{request.source.description}: {args.images} images in {files}")
        print(f"classes: {request.labels}")
    return 0


def _formats(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= {"npz", "png", "tar"}:
        raise argparse.ArgumentTypeError(f"expected npz, png or tar, separated by commas, got {text!r}")
    return names
