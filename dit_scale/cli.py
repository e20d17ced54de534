"""The command line: `dit-scale COMMAND --help` tells the rest. Imports of weight happen inside commands."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from dit_scale.errors import DitScaleError

USER_ERROR_EXIT_CODE = 2


def main(argv: list[str] | None = None) -> int:
    """Run a command; mistakes that people can mend print one message and leave with code 2."""
    args = _parse(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except DitScaleError as error:
        print(f"{args.name}: {error}", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        print(f"{args.name}: interrupted", file=sys.stderr)
        return 130


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """Arguments by name; key=value overrides may also stand behind options, where argparse sees none."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and ("overrides" not in args or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dit-scale", description="Train Diffusion Transformers, exactly resumable."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (_add_train, _add_sample, _add_models, _add_checkpoint):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str, **more: Any
) -> Any:
    parser = commands.add_parser(
        name,
        help=help,
        description=more.pop("description", help),
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.set_defaults(command=run, name=parser.prog)
    return parser


def _whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    """Reads a whole number of this range."""

    def read(text: str) -> int:
        if not (text.isdecimal() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return int(text)

    return read


def _class_list(text: str) -> list[int]:
    return [_whole(0)(part.strip()) for part in text.split(",")]


def _add_train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        _train,
        "train a model, or resume its training",
        description="""Train a model, or go on from the newest checkpoint of its run.

  one process          dit-scale train configs/demo.yaml
  eight processes      deepspeed --num_gpus 8 --no_local_rank --module dit_scale.cli train CONFIG

SIGTERM, SIGUSR1 or Ctrl-C: saves at the next step and leaves with code 75.""",
    )
    parser.add_argument("config", help="YAML file; configs/ has one for each recipe")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for example optimizer.lr=2e-4 steps=1000"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved configuration, parameters, FLOPs and memory per device, and stop",
    )
    parser.add_argument(
        "--world", type=_whole(1), default=1, help="processes to plan for in --dry-run (default 1)"
    )


def _train(args: argparse.Namespace) -> int:
    from dit_scale.config import TrainConfig, load

    config = load(TrainConfig, args.config, args.overrides)
    if args.dry_run:
        from dit_scale.train import dry_run

        dry_run.report(config, args.world)
        return 0
    from dit_scale.train.loop import train

    return train(config)


def _add_sample(commands: Any) -> None:
    parser = _command(
        commands,
        "sample",
        _sample,
        "draw images from a run, a checkpoint or a weights file",
        description="""Draw images; writes grid.png and samples.npz.
Image i depends on the weights, --seed, i and its class alone.

  dit-scale sample runs/dit_xl2_256 --images 16 --guidance 4
  dit-scale sample DiT-XL-2-256x256.pt --vae stabilityai/sd-vae-ft-ema --classes 207,360""",
    )
    parser.add_argument("source", help="run folder, checkpoint folder, .safetensors or .pt file")
    # not --num: the deepspeed launcher takes that for an abbreviation of its own --num_gpus
    parser.add_argument("--images", type=_whole(1), default=16, help="images (default 16)")
    parser.add_argument(
        "--classes", type=_class_list, help="comma list of class numbers, in turn (default: all)"
    )
    parser.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="key of all noise (default 0)")
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm", help="default ddpm")
    parser.add_argument("--steps", default="250", help='denoising steps, or "ddim50" (default 250)')
    parser.add_argument(
        "--guidance", type=float, default=1.5, help="classifier-free guidance scale; 1 is off"
    )
    parser.add_argument(
        "--guidance-channels",
        choices=("first3", "all"),
        default="first3",
        help="the paper guides the first 3 of 4",
    )
    parser.add_argument("--ema", default=None, help="EMA profile (default: the first of the run)")
    parser.add_argument("--vae", default=None, help="folder or hub name (default: the run's data.vae)")
    parser.add_argument("--model", default=None, help="of a bare weights file, for example DiT-XL/2")
    parser.add_argument(
        "--image-size", type=_whole(1), default=256, help="of a bare weights file (default 256)"
    )
    parser.add_argument(
        "--num-classes", type=_whole(1), default=1000, help="of a bare weights file (default 1000)"
    )
    parser.add_argument("--batch", type=_whole(1), default=32, help="images at once (default 32)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the transformer")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--threads", type=_whole(1), default=1, help="CPU threads of each process (default 1)"
    )
    parser.add_argument("--out", default=None, help="folder (default: RUN/samples, else ./samples)")


def _sample(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dit_scale.config import EngineConfig, ModelConfig
    from dit_scale.errors import ConfigError
    from dit_scale.sample import Settings, balanced_labels, sample
    from dit_scale.sources import open_source

    bare = None
    if args.model:
        bare = ModelConfig(name=args.model, image_size=args.image_size, num_classes=args.num_classes)
    source = open_source(args.source, args.ema, bare)
    vae = args.vae or source.vae
    if vae is None:
        raise ConfigError("a weights file does not name its VAE: pass --vae FOLDER_OR_HUB_NAME")
    labels = balanced_labels(args.classes or range(source.model.num_classes), args.images)
    settings = Settings(
        args.seed,
        args.steps,
        args.sampler,
        args.guidance,
        args.guidance_channels,
        min(args.batch, args.images),
    )
    here = Path(args.source)
    out = Path(args.out or (here / "samples" if here.is_dir() else "samples"))
    engine = EngineConfig(device=args.device, precision=args.precision, cpu_threads=args.threads)
    if sample(source, vae, labels, settings, out, engine):
        print(f"{source.description}: {args.images} images in {out}/grid.png and {out}/samples.npz")
    return 0


def _add_models(commands: Any) -> None:
    parser = _command(commands, "models", _models, "table of all models: parameters and forward GMACs")
    parser.add_argument("names", nargs="*", help="rows to show, for example DiT-XL/2 (default: all)")
    parser.add_argument("--json", action="store_true", help="a list of objects, for machines")


def _models(args: argparse.Namespace) -> int:
    from dit_scale.models.table import run

    run(args.json, args.names or None)
    return 0


def _add_checkpoint(commands: Any) -> None:
    parser = commands.add_parser("checkpoint", help="list or export the checkpoints of a run")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    listing = _command(actions, "list", _checkpoint_list, "committed checkpoints of a run, newest first")
    listing.add_argument("run", help="the run's folder")
    listing.add_argument("--json", action="store_true", help="a list of objects, for machines")
    export = _command(
        actions,
        "export",
        _checkpoint_export,
        "write EMA weights as one safetensors file with the published names",
    )
    export.add_argument("source", help="run folder (its newest checkpoint) or checkpoint folder")
    export.add_argument("out", help="the .safetensors file to write")
    export.add_argument("--ema", default=None, help="EMA profile (default: the first of the run)")


def _checkpoint_list(args: argparse.Namespace) -> int:
    import json
    from pathlib import Path

    from dit_scale.errors import CheckpointError, ConfigError
    from dit_scale.storage import open_storage
    from dit_scale.train.checkpoint import Checkpoint, committed
    from dit_scale.train.run import checkpoints_of

    if not (Path(args.run) / "config.yaml").is_file():
        raise ConfigError(f"{args.run}: expected a run's folder, with its config.yaml")
    storage = open_storage(checkpoints_of(args.run))
    rows: list[dict[str, Any]] = []
    for name in committed(storage):
        try:
            found = Checkpoint(storage, name)
            rows.append({"name": name, "step": found.manifest.step, "bytes": found.bytes})
        except CheckpointError as error:
            rows.append({"name": name, "problem": str(error)})
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(
            row["name"],
            row.get("problem") or f"step {row['step']:>9}  {row['bytes'] / 1e6:10.1f} MB",
            sep="  ",
        )
    return 0


def _checkpoint_export(args: argparse.Namespace) -> int:
    from pathlib import Path

    from dit_scale.sources import export, open_source

    source = open_source(args.source, args.ema)
    export(source, Path(args.out))
    print(f"{source.description} -> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
