"""`dit-scale evaluate` on one, two and three processes: the same figures; and a run that is sampled first."""

import re
from pathlib import Path
from typing import Any

import pytest

from dit_scale import cli
from dit_scale.evaluate.scorecard import read_card
from dit_scale.sampling.sample_folder import read_mark
from tests.support.ranks.processes import run
from tests.support.scored_images import random_images, write_folder, write_npz
from tests.support.tiny_run import write_run
from tests.support.tiny_vae import save_tiny_vae

pytestmark = pytest.mark.dist

NETWORK = f"classifier:{Path(__file__).parents[2] / 'demo' / 'classifier.safetensors'}"


def evaluate(*arguments: str) -> int:
    """Run the command in a rank."""
    return cli.main(["evaluate", *arguments, "--network", NETWORK, "--device", "cpu"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """700 generated images (three chunks, the last one short) in an npz file, 150 real ones in a folder."""
    folder = tmp_path_factory.mktemp("images")
    generated = write_npz(random_images(700, size=32, seed=1), folder / "generated.npz")
    return generated, write_folder(random_images(150, size=32, seed=2), folder / "real")


def card_of(world: int, sources: tuple[Path, Path], folder: Path) -> dict[str, Any]:
    generated, real = sources
    out = folder / f"{world}.json"
    arguments = ("--reference", str(real), "--cache", str(folder / f"cache{world}"), "--out", str(out))
    assert run(world, evaluate, str(generated), "--errors", *arguments) == [0] * world
    return read_card(str(out))


def test_figures_do_not_depend_on_the_number_of_processes(sources: tuple[Path, Path], tmp_path: Path) -> None:
    cards = [card_of(world, sources, tmp_path) for world in (1, 2, 3)]
    alone = cards[0]["results"]
    assert len(alone) == 9
    for card in cards[1:]:
        assert [r["metric"] for r in card["results"]] == [r["metric"] for r in alone]
        for got, expected in zip(card["results"], alone, strict=True):
            assert got["value"] == pytest.approx(expected["value"], rel=1e-9, abs=0), got["metric"]
            if expected["standard_error"] is not None:
                assert got["standard_error"] == pytest.approx(expected["standard_error"], rel=1e-9)
    rows = [
        {path.relative_to(tmp_path / f"cache{world}"): path.read_bytes() for path in found}
        for world in (1, 2, 3)
        for found in [sorted((tmp_path / f"cache{world}").rglob("*.*"))]
    ]
    assert len(rows[0]) == 6
    assert rows[0] == rows[1] == rows[2]


def test_a_broken_image_stops_all_processes_with_its_name(tmp_path: Path) -> None:
    real = write_folder(random_images(300, size=32), tmp_path / "real")
    (real / "1" / "00290.png").write_bytes(b"no image")
    with pytest.raises(AssertionError, match=r"DataError: .*1/00290\.png not an image in a known format"):
        run(2, _raising, str(real), str(tmp_path / "cache"))


def _raising(real: str, cache: str) -> None:
    from dit_scale.cli import _parse

    args = _parse(["evaluate", real, "--reference", real, "--cache", cache, "--network", NETWORK])
    args.command(args)


def test_a_run_is_sampled_first(tmp_path: Path) -> None:
    run_folder, cache = tmp_path / "run", str(tmp_path / "cache")
    write_run(run_folder, save_tiny_vae(tmp_path / "vae"))
    real = str(write_folder(random_images(30, size=32), tmp_path / "real"))
    sampling = ("--images", "20", "--tile", "4", "--steps", "3", "--labels", "random")
    arguments = (str(run_folder), "--reference", real, "--cache", cache, *sampling)
    assert run(2, evaluate, *arguments) == [0, 0]
    card = read_card(str(run_folder / "samples"))
    mark = read_mark(run_folder / "samples")
    assert mark is not None
    assert card["samples"]["protocol"] == mark["protocol"]
    assert card["samples"]["images"] == 20
    assert any(re.search("sampler ddpm with 3 steps", note) for note in card["cautions"])
    # The finished samples and their features are used again.
    before = (run_folder / "samples" / "samples.npz").stat().st_mtime_ns
    assert run(1, evaluate, *arguments) == [0]
    assert (run_folder / "samples" / "samples.npz").stat().st_mtime_ns == before
    again = [result["value"] for result in read_card(str(run_folder / "samples"))["results"]]
    assert again == pytest.approx([result["value"] for result in card["results"]], rel=1e-9)
