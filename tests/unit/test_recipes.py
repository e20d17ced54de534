"""Recipes by name and by path, and the error for a missing one."""

from pathlib import Path

import pytest

from dit_scale import recipes
from dit_scale.config import EncodeConfig, Section, TrainConfig, load
from dit_scale.errors import ConfigError
from dit_scale.scaling.config import StudyConfig

CONFIGS = Path(__file__).parents[2] / "configs"
ROOTS: dict[str, type[Section]] = {"encode": EncodeConfig, "scaling": StudyConfig}
"""Configuration by the first word of a recipe's name; any other recipe is a training run."""


@pytest.mark.parametrize("name", recipes.names())
def test_a_name_is_the_file_in_configs(name: str) -> None:
    assert recipes.find(name).samefile(CONFIGS / f"{name}.yaml")
    root = ROOTS.get(name.partition("_")[0], TrainConfig)
    assert load(root, name) == load(root, CONFIGS / f"{name}.yaml")


def test_every_recipe_has_a_name() -> None:
    assert recipes.names() == sorted(path.stem for path in CONFIGS.iterdir())


def test_a_file_wins_over_a_recipe_and_a_folder_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert load(TrainConfig, "demo").steps == load(TrainConfig, CONFIGS / "demo.yaml").steps
    Path("demo").rmdir()
    Path("demo").write_text("steps: 7")
    assert load(TrainConfig, "demo").steps == 7


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("dit_xl2_265", r"did you mean 'dit_xl2_256'\? recipes: demo, design_space, "),
        ("configs/dit_xl2_51.yaml", r"no configuration file at configs/dit_xl2_51.yaml.*'dit_xl2_512'\?"),
        ("../configs/demo", r"did you mean 'demo'\?"),
        ("zzz", r"no configuration file at zzz, and no recipe with that name; recipes: demo, design_space, "),
    ],
)
def test_a_missing_recipe_lists_the_others(
    wanted: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=said):
        recipes.find(wanted)
