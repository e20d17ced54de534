"""The command line of `dit-scale evaluate`: one evaluation from end to end, and its mistakes."""

from pathlib import Path

import numpy as np
import pytest

from dit_scale import cli
from dit_scale.evaluate.scorecard import read_card
from tests.support.scored_images import random_images, write_folder, write_npz

pytestmark = pytest.mark.usefixtures("same_process")

NETWORK = f"classifier:{Path(__file__).parents[2] / 'demo' / 'classifier.safetensors'}"


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    return write_npz(random_images(30, size=32, seed=1), tmp_path / "generated.npz")


def evaluate(tmp_path: Path, *arguments: object) -> int:
    cache = str(tmp_path / "cache")
    return cli.main(["evaluate", *map(str, arguments), "--cache", cache, "--device", "cpu"])


def test_from_images_to_a_comparison(
    tmp_path: Path, generated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = write_folder(random_images(90, size=32, seed=2), tmp_path / "real")
    reference = tmp_path / "real.npz"
    assert evaluate(tmp_path, real, "--make-reference", reference, "--network", NETWORK) == 0
    assert capsys.readouterr().out == f"{reference}: 90 images of 32 px from {real}\n"
    assert evaluate(tmp_path, generated, "--reference", reference, "--network", NETWORK, "--errors") == 0
    shown = capsys.readouterr().out
    card = read_card(str(tmp_path / "generated.metrics.json"))
    (distance,) = [result for result in card["results"] if result["metric"] == "FD"]
    assert f"{distance['value']:.2f}" in shown
    assert "30 images of 32 px" in shown
    assert "protocol  unknown" in shown
    assert "note: FD (classifier): 30 images for 64 features" in shown
    assert card["reference"]["made_from"] == str(real)
    assert card["networks"][0]["name"] == "classifier"
    out = tmp_path / "other.json"
    chosen = ("--metrics", "frechet,neighbours", "--out", out)
    assert evaluate(tmp_path, generated, "--reference", real, "--network", NETWORK, *chosen) == 0
    other = read_card(str(out))
    assert [r["metric"] for r in other["results"]] == ["FD", "precision", "recall", "density", "coverage"]
    assert other["results"][0]["value"] == pytest.approx(distance["value"], rel=1e-9)
    capsys.readouterr()
    assert cli.main(["evaluate", "--compare", str(tmp_path / "generated.metrics.json"), str(out)]) == 0
    compared = capsys.readouterr().out
    assert compared.index("reference.made_from") < compared.index("precision")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected what to score"),
        (["GENERATED", "--reference", "GENERATED"], "expected a feature network: --network inception:FILE"),
        (["GENERATED", "--network", NETWORK], "expected --reference: an npz with mu and sigma"),
        (["missing.npz", "--reference", "GENERATED", "--network", NETWORK], "missing.npz does not exist"),
        (["GENERATED", "--reference", "no", "--network", NETWORK], "no does not exist"),
        (["GENERATED", "--reference", "GENERATED", "--network", "x:y"], "no feature network 'x:y'"),
        (
            ["GENERATED", "--reference", "GENERATED", "--network", NETWORK, "--network", NETWORK],
            "--network: classifier, classifier; figures are named by their network",
        ),
        (
            ["GENERATED", "--reference", "SMALL", "--network", NETWORK],
            "has 16 px; a score across resolutions",
        ),
        (["--compare", "GENERATED"], "--compare needs two score cards or more"),
        (["GENERATED", "--make-reference", "a.json", "--network", NETWORK], "a name that ends in .npz"),
    ],
)
def test_mistakes_are_explained(
    tmp_path: Path,
    generated: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    small = write_npz(random_images(30, size=16), tmp_path / "small.npz")
    names = {"GENERATED": str(generated), "SMALL": str(small)}
    assert evaluate(tmp_path, *(names.get(text, text) for text in arguments)) == cli.USER_ERROR_EXIT_CODE
    assert message in capsys.readouterr().err


def test_an_unknown_metric(tmp_path: Path, generated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate(tmp_path, generated, "--metrics", "fid")
    assert "no metric 'fid'; expected some of frechet,sfid,is,kid,neighbours" in capsys.readouterr().err


def test_two_halves_of_the_digits_are_nearly_alike(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    pixels = np.round(load_digits().images * (255 / 16)).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    images = np.stack([pixels] * 3, axis=-1)
    sets = {"one": images[::4], "other": images[1::4], "noisy": images[::4] ^ 64}
    paths = {name: write_npz(part, tmp_path / f"{name}.npz") for name, part in sets.items()}
    cards = {}
    for name in ("one", "noisy"):
        options = ("--reference", paths["other"], "--network", NETWORK, "--metrics", "frechet,is,neighbours")
        assert evaluate(tmp_path, paths[name], *options) == 0
        results = read_card(str(tmp_path / f"{name}.metrics.json"))["results"]
        cards[name] = {result["metric"]: result["value"] for result in results}
    alike, noisy = cards["one"], cards["noisy"]
    assert alike["FD"] < noisy["FD"] / 20
    assert min(alike["precision"], alike["recall"], alike["coverage"]) > 0.85
    assert noisy["coverage"] < 0.6 * alike["coverage"]
    assert 9 < alike["IS"] <= 10
