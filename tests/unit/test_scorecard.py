"""Score cards: figures with their protocol, what they warn about, and how they are compared."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dit_scale.errors import DataError
from dit_scale.evaluate.cautions import cautions
from dit_scale.evaluate.features import NetworkIdentity
from dit_scale.evaluate.images.npz import NpzImages
from dit_scale.evaluate.paper import rows_beside
from dit_scale.evaluate.scorecard import (
    Result,
    Subject,
    card,
    differences,
    figures,
    read_card,
    subject_of,
    write_card,
)
from dit_scale.sealed import sealed
from tests.support.scored_images import random_images, write_npz

PAPER = {
    "images": 50_000,
    "image_size": 256,
    "weights": {"description": "here", "sha256": "1" * 64, "ema": "ema", "step": 7_000_000},
    "model": {"name": "DiT-XL/2", "num_classes": 1000},
    "sampling": {
        "method": "ddpm",
        "steps": "250",
        "spacing": "uniform",
        "guidance": 1.5,
        "guidance_channels": "first3",
        "guidance_interval": None,
        "seed": 0,
        "tile": 32,
    },
    "labels": {"drawn": "random", "classes": None},
    "vae": {"name": "stabilityai/sd-vae-ft-ema", "weights_sha256": "2" * 64, "scale": 0.18215},
    "precision": "fp32",
}


def changed(**changes: Any) -> dict[str, Any]:
    """Return the paper's protocol with some leaves changed: section__key=value."""
    protocol: dict[str, Any] = {
        key: dict(value) if isinstance(value, dict) else value for key, value in PAPER.items()
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        if key:
            protocol[section][key] = value
        else:
            protocol[section] = value
    return protocol


def subject(protocol: Mapping[str, Any] | None, images: int = 50_000) -> Subject:
    return Subject("samples.npz", "3" * 64, images, 256, preparation="", protocol=protocol)


def result(metric: str = "FID", value: float = 2.27) -> Result:
    return Result(metric, "inception", value, 50_000, 10_000)


def made_card(protocol: Mapping[str, Any] | None, *results: Result) -> dict[str, Any]:
    return card(
        subject(protocol),
        {"source": "VIRTUAL_imagenet256_labeled.npz", "sha256": "4" * 64},
        [NetworkIdentity("inception", "5" * 64, "bilinear")],
        results=results,
        cautions=[],
        paper=rows_beside(protocol),
        device="cpu AVX2",
    )


# The protocol of samples


def samples(folder: Path) -> NpzImages:
    return NpzImages(write_npz(random_images(3), folder / "samples.npz"))


def test_the_protocol_lies_beside_the_samples(tmp_path: Path) -> None:
    images = samples(tmp_path)
    sha256 = images.digest()
    mark = sealed({"protocol": PAPER, "files": {"samples.npz": {"bytes": 1, "sha256": sha256}}})
    (tmp_path / "samples.json").write_bytes(mark)
    assert subject_of(images, sha256).protocol == PAPER
    assert subject_of(images, "another digest").protocol is None


def test_samples_alone_have_no_protocol(tmp_path: Path) -> None:
    images = samples(tmp_path)
    assert subject_of(images, images.digest()).protocol is None


def test_a_damaged_protocol_is_reported(tmp_path: Path) -> None:
    images = samples(tmp_path)
    mark = sealed({"protocol": PAPER, "files": {}})
    (tmp_path / "samples.json").write_bytes(mark.replace(b"ddpm", b"ddim"))
    with pytest.raises(DataError, match=r"samples\.json is damaged"):
        subject_of(images, images.digest())


# Cautions


def test_the_protocol_of_the_paper_needs_no_caution() -> None:
    assert cautions(subject(PAPER), [result()], []) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels__drawn": "balanced"}, "labels are balanced"),
        ({"sampling__guidance_channels": "all"}, "guidance acts on all latent channels"),
        ({"sampling__steps": "50"}, "sampler ddpm with 50 steps"),
        ({"sampling__method": "ddim"}, "sampler ddim with 250 steps"),
        ({"sampling__guidance_interval": [200, 800]}, "guidance acts in an interval"),
        ({"vae__name": "sd-vae-ft-mse"}, "decoder sd-vae-ft-mse"),
        ({"precision": "bf16"}, "the transformer ran in bf16"),
        ({"vae__precision": "bf16"}, "the decoder ran in bf16"),
    ],
)
def test_each_deviation_is_named(change: dict[str, Any], message: str) -> None:
    (note,) = cautions(subject(changed(**change)), [result()], [])
    assert note.startswith(message)


def test_all_channels_without_guidance_are_no_deviation() -> None:
    protocol = changed(sampling__guidance_channels="all", sampling__guidance=1.0)
    assert cautions(subject(protocol), [result()], []) == []


def test_few_samples_unknown_protocol_and_bias() -> None:
    notes = cautions(subject(None, images=2000), [result()], ["FID (inception): biased"])
    assert notes[0] == "FID (inception): biased"
    assert notes[1].startswith("2,000 samples: the Frechet distance of 50,000")
    assert notes[2].startswith("the protocol of samples.npz is unknown")


def test_sorted_samples_show_in_the_inception_score() -> None:
    results = [result("IS", 298.0), result("IS, as stored", 62.0)]
    (note,) = cautions(subject(PAPER), results, [])
    assert "sorted by class" in note
    assert cautions(subject(PAPER), [result("IS", 298.0), result("IS, as stored", 297.0)], []) == []


# The paper


def test_the_papers_figures_stand_beside_its_model() -> None:
    (row,) = rows_beside(PAPER)
    assert (row.label, row.figures["FID"], row.figures["recall"]) == ("7M steps, guidance 1.5", 2.27, 0.57)
    rows = rows_beside(changed(sampling__guidance=1.0))
    assert [each.figures["FID"] for each in rows] == [9.62, 19.47]
    (small,) = rows_beside(changed(sampling__guidance=1.0, model__name="DiT-B/4"))
    assert small.figures == {"FID": 68.38}


@pytest.mark.parametrize(
    "change",
    [
        {"model__name": "DiT-B/4"},
        {"sampling__guidance": 4.0},
        {"image_size": 64},
        {"model__num_classes": 10},
    ],
)
def test_other_models_have_no_row(change: dict[str, Any]) -> None:
    assert rows_beside(changed(**change)) == []


# Cards


def test_a_card_is_sealed(tmp_path: Path) -> None:
    tree = made_card(PAPER, result())
    path = tmp_path / "metrics.json"
    write_card(tree, path)
    assert read_card(str(path)) == read_card(str(tmp_path)) == tree
    path.write_bytes(path.read_bytes().replace(b"2.27", b"2.17"))
    with pytest.raises(DataError, match=r"metrics\.json is damaged"):
        read_card(str(path))


def test_files_that_are_no_cards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; `dit-scale evaluate` writes it"):
        read_card(str(tmp_path))
    (tmp_path / "metrics.json").write_bytes(sealed({"format": "other", "version": 1}))
    with pytest.raises(DataError, match="expected 'dit-scale metrics' version 1, got 'other' version 1"):
        read_card(str(tmp_path))


def test_a_comparison_shows_what_differs() -> None:
    one = made_card(PAPER, result())
    other = made_card(changed(sampling__guidance_channels="all"), result(value=2.2), result("IS", 280.0))
    assert differences([one, one]) == {}
    assert differences([one, other]) == {
        "samples.protocol.sampling.guidance_channels": ["first3", "all"],
    }
    found = {key: [r and r["value"] for r in row] for key, row in figures([one, other]).items()}
    assert found == {("FID", "inception"): [2.27, 2.2], ("IS", "inception"): [None, 280.0]}


def test_a_comparison_with_an_unknown_protocol_says_so_once() -> None:
    one, other = made_card(PAPER, result()), made_card(None, result())
    assert differences([one, other]) == {"samples.protocol": ["known", "unknown"]}


def test_where_files_lay_is_no_difference() -> None:
    moved = changed(weights__description="there")
    assert differences([made_card(PAPER, result()), made_card(moved, result())]) == {}
