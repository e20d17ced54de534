"""`dit-scale evaluate`: score images against a reference, with their whole protocol."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_scale.choices import METRICS
from dit_scale.cli.arguments import add_command, int_between, output_path
from dit_scale.cli.sampling_arguments import add_sampling_arguments, sample_request, sampling_worker
from dit_scale.cli.score_cards import print_card, print_comparison

if TYPE_CHECKING:
    from dit_scale.dist import World
    from dit_scale.evaluate.features import FeatureNetwork
    from dit_scale.evaluate.suite import Extractor

DEFAULT_CACHE = "~/.cache/dit_scale/features"
POLL_S = 1.0
"""How often a process looks whether the others have completed the samples."""


def add(commands: Any) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "evaluate",
        _run,
        "score images, or a model's samples, against a reference",
        description="""Score images against a reference; metrics.json gets every figure with its protocol.
The source is a samples.npz, a sample folder, a folder or a tar of images, or latents:URL.
A run, a checkpoint or a weights file is sampled first.

  dit-scale evaluate runs/xl2/samples --reference VIRTUAL_imagenet256_labeled.npz --network inception:FILE.pth
  dit-scale evaluate --make-reference real.npz /data/imagenet/train --crop 256 --network inception:FILE.pth
  dit-scale evaluate --compare runs/a/samples runs/b/samples
  dit-scale evaluate --mirror runs/a""",
    )
    parser.add_argument("source", nargs="?", help="images, a run, a checkpoint or a weights file")
    _add_what(parser.add_argument_group("what to compute"))
    _add_other(parser.add_argument_group("instead of an evaluation"))
    samples = parser.add_argument_group("samples of a run, a checkpoint or a weights file")
    samples.add_argument(
        "--samples", type=output_path, default=None, help="their folder (default: RUN/samples or samples)"
    )
    add_sampling_arguments(parser, num_images=50_000)


def _add_what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--reference", help="npz with mu and sigma (ADM, EDM, --make-reference), or images of any kind above"
    )
    group.add_argument(
        "--network",
        action="append",
        default=[],
        metavar="KIND:PATH",
        help="feature network; repeat the option for several",
    )
    group.add_argument(
        "--metrics",
        type=_metrics,
        default=METRICS,
        help=f"comma-separated groups of figures (default {','.join(METRICS)})",
    )
    group.add_argument(
        "--errors",
        action="store_true",
        help="also the standard error of each Frechet distance, in ten times its time",
    )
    group.add_argument(
        "--crop",
        type=int_between(1),
        default=None,
        metavar="PIXELS",
        help="crop image files to squares of this side, as `dit-scale encode` does",
    )
    group.add_argument(
        "--cache",
        type=output_path,
        default=DEFAULT_CACHE,
        help=f"folder for features, shared by all processes (default {DEFAULT_CACHE})",
    )
    group.add_argument(
        "--out",
        type=output_path,
        default=None,
        help="score card to write (default: metrics.json beside the images)",
    )


def _add_other(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--make-reference",
        type=output_path,
        metavar="FILE.npz",
        help="write the statistics of the source as a reference",
    )
    group.add_argument(
        "--compare",
        nargs="+",
        metavar="CARD",
        help="print what differs between the protocols of score cards, then their figures",
    )
    group.add_argument(
        "--mirror",
        metavar="RUN",
        help="send the figures of a run's score cards to its mirrors: W&B, TensorBoard, Trackio",
    )


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no metric {unknown[0]!r}; expected some of {','.join(METRICS)}")
    return names


def _run(args: argparse.Namespace) -> int:
    from dit_scale.errors import ConfigError
    from dit_scale.storage.outputs import check_output

    if args.compare is not None:
        print_comparison([*([args.source] if args.source else []), *args.compare])
        return 0
    if args.mirror is not None:
        return _mirror(args.mirror)
    if args.source is None:
        raise ConfigError("expected what to score: images, a sample folder, a run or a weights file")
    if not args.network:
        raise ConfigError(f"expected a feature network: --network {_network_forms()}")
    if args.make_reference is None and args.reference is None:
        raise ConfigError(
            "expected --reference: an npz with mu and sigma, or real images (or --make-reference FILE.npz)"
        )
    if _has_weights(args.source):
        args.source = str(_sample(args))
    out = args.make_reference or args.out or _card_path(args.source)
    check_output(out, ".npz" if args.make_reference else ".json")
    return _with_world(args, Path(out))


def _mirror(run: str) -> int:
    from dit_scale.report.mirroring import mirror_cards

    return int(mirror_cards(run, time.time(), print) > 0)


def _has_weights(source: str) -> bool:
    """Whether the source is a run, a checkpoint or a weights file, whose samples are scored."""
    from dit_scale.checkpoint.manifest import MANIFEST
    from dit_scale.weights.files import SUFFIXES

    marks = ("config.yaml", MANIFEST, "model_index.json")
    return source.endswith(SUFFIXES) or any((Path(source) / name).is_file() for name in marks)


def _sample(args: argparse.Namespace) -> Path:
    """Do this process's share of the samples, wait for the others, and return their folder."""
    from dit_scale.inference.bulk import sample_images
    from dit_scale.sampling.sample_folder import read_mark

    default = Path(args.source) / "samples" if Path(args.source).is_dir() else Path("samples")
    folder = Path(args.samples) if args.samples else default
    if sample_images(sample_request(args), folder, sampling_worker(args)) is None:
        while read_mark(folder) is None:
            time.sleep(POLL_S)
    return folder


def _network_forms() -> str:
    from dit_scale.evaluate.networks import EXPECTED

    return EXPECTED


def _with_world(args: argparse.Namespace, out: Path) -> int:
    from dit_scale import dist
    from dit_scale.config import EngineConfig
    from dit_scale.errors import ConfigError
    from dit_scale.evaluate.networks import load_network
    from dit_scale.evaluate.suite import Extractor

    world = dist.start(EngineConfig(device=args.device, cpu_threads=args.threads))
    try:
        extractor = Extractor(Path(args.cache).expanduser(), world)
        networks = [load_network(spec, world.device) for spec in args.network]
        names = [network.identity.name for network in networks]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"--network: {', '.join(names)}; figures are named by their network, so evaluate one "
                "after the other"
            )
        if args.make_reference:
            _make_reference(args, networks, extractor, out)
        else:
            _evaluate(args, networks, extractor, out)
    finally:
        dist.stop()
    return 0


def _make_reference(
    args: argparse.Namespace, networks: "list[FeatureNetwork]", extractor: "Extractor", out: Path
) -> None:
    from dit_scale.evaluate.images import open_images
    from dit_scale.evaluate.references import write_reference
    from dit_scale.evaluate.suite import make_reference

    images = open_images(args.source, device=extractor.world.device, crop=args.crop, vae=args.vae)
    reference = make_reference(images, networks, extractor)
    if extractor.world.is_first:
        write_reference(reference, out)
        print(f"{out}: {images.count:,} images of {images.image_size} px from {args.source}")


def _evaluate(
    args: argparse.Namespace, networks: "list[FeatureNetwork]", extractor: "Extractor", out: Path
) -> None:
    from dit_scale.evaluate.cautions import cautions
    from dit_scale.evaluate.images import open_images
    from dit_scale.evaluate.paper import rows_beside
    from dit_scale.evaluate.references import open_reference
    from dit_scale.evaluate.scorecard import Result, card, subject_of, write_card
    from dit_scale.evaluate.suite import Scored, evaluate
    from dit_scale.vae import device_kind

    world: World = extractor.world
    images = open_images(args.source, device=world.device, crop=args.crop, vae=args.vae)
    reference = open_reference(
        args.reference, extractor.digest, device=world.device, crop=args.crop, vae=args.vae
    )
    scored = Scored(images, extractor.digest(images), reference)
    results: list[Result] = []
    biases: list[str] = []
    for network in networks:
        found, notes = evaluate(scored, network, extractor, metrics=args.metrics, with_errors=args.errors)
        results += found
        biases += notes
    if world.is_first:
        subject = subject_of(images, scored.sha256)
        tree = card(
            subject,
            reference.description(),
            [network.identity for network in networks],
            results=results,
            cautions=cautions(subject, results, biases),
            paper=rows_beside(subject.protocol),
            device=device_kind(world.device),
        )
        write_card(tree, out)
        print_card(tree, out)


def _card_path(source: str) -> str:
    """Return where the score card of a source belongs: beside the images, under their name."""
    path = Path(source)
    if path.is_dir():
        return str(path / "metrics.json")
    if path.is_file():
        name = "metrics.json" if path.name == "samples.npz" else f"{path.stem}.metrics.json"
        return str(path.parent / name)
    return "metrics.json"
