"""Configurations: what is rejected and with which message; every recipe loads and dry-runs."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from dit_scale.config import EmaProfile, EncodeConfig, Section, TrainConfig, dump, load
from dit_scale.errors import ConfigError
from dit_scale.paths import with_absolute_paths
from dit_scale.scaling.config import StudyConfig
from dit_scale.train import dry_run

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TRAIN_CONFIGS = [path for path in CONFIGS if not path.name.startswith(("encode_", "evaluate_", "scaling_"))]


def complaint(*overrides: str, text: str = "", folder: Path | None = None) -> str:
    path = None
    if folder is not None:
        path = folder / "config.yaml"
        path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(TrainConfig, path, overrides)
    return str(caught.value)


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("steps: 7\noptimizer: {lr: 0.5, eps: 0.25}\n")
    config = load(TrainConfig, path, ["optimizer.lr=2e-4", "model.name=DiT-S/8"])
    assert (config.steps, config.optimizer.lr, config.optimizer.eps) == (7, 2e-4, 0.25)
    assert (config.model.name, config.global_batch) == ("DiT-S/8", TrainConfig().global_batch)
    assert load(TrainConfig, None) == with_absolute_paths(TrainConfig())


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("ema=[{name: a, decay: 0.9}, {name: b, sigma_rel: 0.1}]", "ema", 2),
        ("optimizer.betas=[0.8, 0.95]", "betas", (0.8, 0.95)),
        ("data.url=s3://bucket/a=b", "url", "s3://bucket/a=b"),
    ],
)
def test_an_override_may_be_a_list_or_have_an_equals_sign(override: str, field: str, value: object) -> None:
    config = load(TrainConfig, None, [override])
    found = {"ema": len(config.ema), "betas": config.optimizer.betas, "url": config.data.url}
    assert found[field] == value


@pytest.mark.parametrize(
    ("override", "unknown", "nearest"),
    [
        ("sed=1", "sed", "seed"),
        ("engine.zero_stag=1", "engine.zero_stag", "engine.zero_stage"),
        ("zero_stage=3", "zero_stage", "engine.zero_stage"),
        ("model.lr=1", "model.lr", "optimizer.lr"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", "optimizer.lr"),
    ],
)
def test_an_unknown_key_names_the_nearest(override: str, unknown: str, nearest: str) -> None:
    assert complaint(override) == f"command line: unknown key {unknown!r}; did you mean {nearest!r}?"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("steps=many", "steps: Input should be a valid integer"),
        ("steps=1.5", "steps: Input should be a valid integer"),
        ("steps=0", "steps: Input should be greater than 0, got 0"),
        ("optimizer.lr=fast", "optimizer.lr: Input should be a valid number"),
        ("optimizer.lr=nan", "optimizer.lr: Input should be a finite number"),
        ("optimizer.lr=inf", "optimizer.lr: Input should be a finite number"),
        ("optimizer.betas=[0.9]", "optimizer.betas.1: Field required"),
        ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1: Input should be less than 1, got 1.0"),
        ("optimizer.betas=[0.9", "'optimizer.betas=[0.9': the value is not valid YAML"),
        (
            "optimizer.final_lr_fraction=0.1",
            "optimizer: final_lr_fraction=0.1 has no effect with decay=none; set decay=cosine",
        ),
        ("optimizer.decay=exponential", "optimizer.decay: Input should be 'none', 'cosine' or 'linear'"),
        ("engine.zero_stage=0", "engine.zero_stage: Input should be 1, 2 or 3, got 0"),
        ("engine.zero_stage=4", "engine.zero_stage: Input should be 1, 2 or 3, got 4"),
        ("engine.precision=fp16", "engine.precision: Input should be 'auto', 'bf16' or 'fp32', got 'fp16'"),
        ("seed=-1", "seed: Input should be greater than or equal to 0, got -1"),
        ("seed=4294967296", "seed: Input should be less than 4294967296"),
        ("diffusion.label_dropout=1.1", "diffusion.label_dropout: Input should be less than or equal to 1"),
        ("steps.x=1", "steps: Input should be a valid integer"),
        ("steps", "'steps': expected key=value"),
        ("steps:7", "'steps:7': expected key=value, for example optimizer.lr=2e-4"),
        ("=3", "'=3': expected key=value"),
    ],
)
def test_a_wrong_value_says_what_was_expected_and_got(override: str, said: str) -> None:
    assert complaint(override).startswith(f"command line: {said}")


def test_all_errors_are_listed_together() -> None:
    lines = complaint("sed=1", "steps=0", "engine.zero_stage=0").splitlines()
    assert len(lines) == 3


def test_an_override_cannot_go_through_a_value(tmp_path: Path) -> None:
    said = complaint("data.url=x", text="data: folder\n", folder=tmp_path)
    assert said == "command line: 'data.url=x': data is a value, not a section"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "config.yaml is not valid YAML"),
        ("- 1", "config.yaml: expected keys and values at the top level, got list"),
        ("data: x", "config.yaml: data: Input should be a valid dictionary"),
        ("1: 2", "config.yaml: unknown key '1'; did you mean"),
    ],
)
def test_a_file_without_a_configuration(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(text=text, folder=tmp_path)


def test_a_missing_file_lists_the_recipes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file at .*none.yaml, .*; recipes: demo, "):
        load(TrainConfig, tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("{name: a}", "profile 'a': expected either decay or sigma_rel"),
        ("{name: a, decay: 0.9, sigma_rel: 0.1}", "profile 'a': expected either decay or sigma_rel"),
        ("{decay: 0.9}", "ema.0.name: Field required"),
        ("{name: a, decay: 1.0}", "ema.0.decay: Input should be less than 1"),
        ("{name: a, decay: 0.0}", "ema.0.decay: Input should be greater than 0"),
        ("{name: a, sigma_rel: 0.29}", "ema.0.sigma_rel: Input should be less than 0.289"),
        ("{name: a, decay: 0.9}, {name: a, decay: 0.8}", "with different names, got ['a', 'a']"),
        ("", "expected one or more profiles"),
    ],
)
def test_ema_profiles_are_checked(profile: str, said: str) -> None:
    assert said in complaint(f"ema=[{profile}]")


@pytest.mark.parametrize("value", ["off", "'off'", "offline"])
def test_wandb_can_be_off(value: str) -> None:
    assert load(TrainConfig, None, [f"log.wandb={value}"]).log.wandb == value.strip("'")
    with pytest.raises(ConfigError, match=r"log\.wandb: Input should be 'off', .* got 'on'"):
        load(TrainConfig, None, ["log.wandb=on"])


def test_a_binary_file(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load(TrainConfig, tmp_path / "config.yaml")


def test_sections_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().steps = 3  # type: ignore[misc]


def test_a_dump_loads_to_the_same_configuration(tmp_path: Path) -> None:
    config = load(TrainConfig, None, ["ema=[{name: power, sigma_rel: 0.1}]", "optimizer.lr=3.1e-5"])
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load(TrainConfig, path) == config
    assert load(TrainConfig, path) == config


def fields_without_help(section: type[Section]) -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            found += [f"{name}.{inner}" for inner in fields_without_help(kind)]
        elif not field.description:
            found.append(name)
    return found


@pytest.mark.parametrize("root", [TrainConfig, EncodeConfig, EmaProfile])
def test_every_key_has_a_help_text(root: type[Section]) -> None:
    assert fields_without_help(root) == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_loads(path: Path) -> None:
    others: dict[str, type[Section]] = {"encode": EncodeConfig, "scaling": StudyConfig}
    config = load(others.get(path.name.partition("_")[0], TrainConfig), path)
    assert set(yaml.safe_load(path.read_text())) <= set(type(config).model_fields)


@pytest.mark.parametrize("world", [1, 8])
@pytest.mark.parametrize("path", TRAIN_CONFIGS, ids=lambda path: path.stem)
def test_every_training_recipe_dry_runs(path: Path, world: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = load(TrainConfig, path)
    dry_run.report(config, world)
    printed = capsys.readouterr().out
    assert printed.startswith(dump(config))
    assert f"{config.global_batch} samples on {world} processes" in printed


def test_a_dry_run_prints_the_papers_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    dry_run.report(TrainConfig(), 8)
    printed = capsys.readouterr().out
    assert "DiT-XL/2 at 256 px, 256 tokens, adaln_zero" in printed
    assert "674,834,720 trainable" in printed
    assert "118.621 GMACs per image" in printed
    assert "711.73 GFLOP per image" in printed
    assert "1 micro-steps of 32 each" in printed
