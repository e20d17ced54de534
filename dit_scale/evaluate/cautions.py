"""What to know before comparing figures: bias, and deviations from the paper's protocol."""

from collections.abc import Mapping, Sequence
from typing import Any

from dit_scale.evaluate.scorecard import Result, Subject

PAPER_IMAGES = 50_000
IMAGENET_CLASSES = 1000


def cautions(subject: Subject, results: Sequence[Result], biases: Sequence[str]) -> list[str]:
    """Return warnings about the samples, for the score card. `biases` are those of the Frechet distances."""
    notes = [*biases]
    if subject.images < PAPER_IMAGES:
        notes.append(
            f"{subject.images:,} samples: the Frechet distance of {PAPER_IMAGES:,}, as in papers, is lower "
            "(its bias falls with 1 / n). Compare figures of equal n only"
        )
    if subject.protocol is None:
        notes.append(
            f"the protocol of {subject.source} is unknown: no samples.json beside it names its digest"
        )
        return notes
    return notes + _of_protocol(subject.protocol, results)


def _of_protocol(protocol: Mapping[str, Any], results: Sequence[Result]) -> list[str]:
    notes = []
    sampling = protocol["sampling"]
    if protocol["labels"]["drawn"] == "balanced":
        notes.append(
            "labels are balanced: the paper draws them at random, and balanced ones lower FID by about 0.1 "
            "on ImageNet"
        )
    if sampling["guidance"] != 1 and sampling["guidance_channels"] == "all":
        notes.append(
            "guidance acts on all latent channels: the paper guides the first 3 of 4, where 1.5 is about "
            "1.375 on all of them"
        )
    if (sampling["method"], str(sampling["steps"])) != ("ddpm", "250"):
        notes.append(
            f"sampler {sampling['method']} with {sampling['steps']} steps: the paper uses ddpm with 250"
        )
    if sampling.get("guidance_interval") is not None:
        notes.append("guidance acts in an interval of timesteps only: the paper guides every step")
    is_imagenet = protocol["model"].get("num_classes") == IMAGENET_CLASSES
    if is_imagenet and "ema" not in str(protocol["vae"]["name"]):
        notes.append(
            f"decoder {protocol['vae']['name']}: the paper's 2.27 is with ft-EMA (ft-MSE 2.30, original 2.46)"
        )
    if protocol["precision"] != "fp32":
        notes.append(f"the transformer ran in {protocol['precision']}, published figures are fp32 or TF32")
    if (precision := protocol["vae"].get("precision", "fp32")) != "fp32":
        notes.append(f"the decoder ran in {precision}, published figures are fp32 or TF32")
    orders = {result.metric: result.value for result in results if result.metric.startswith("IS")}
    if len(orders) == 2 and abs(orders["IS"] - orders["IS, as stored"]) > 0.05 * orders["IS"]:
        notes.append(
            "IS depends on the order of the samples, which seem to be sorted by class; only the shuffled "
            "figure is comparable"
        )
    return notes
