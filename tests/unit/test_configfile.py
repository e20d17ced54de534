"""YAML files and overrides: values mean what the user meant, and errors name their origin."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_scale.config import EmaProfile, EncodeConfig, TrainConfig, dump, load
from dit_scale.errors import ConfigError
from dit_scale.paths import with_absolute_paths


def of_file(folder: Path, text: str | bytes, *overrides: str) -> TrainConfig:
    path = folder / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(TrainConfig, path, overrides)


def refused(folder: Path, text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        of_file(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "")


# Values


@pytest.mark.parametrize(
    ("text", "steps"),
    [("7", 7), ("010", 10), ("1_000", 1000), ("1e5", 100_000), ("1.0", 1), ("'7'", 7), ("2e+3", 2000)],
)
def test_integers_in_any_notation(tmp_path: Path, text: str, steps: int) -> None:
    assert of_file(tmp_path, f"steps: {text}").steps == steps
    assert load(TrainConfig, None, [f"steps={text}"]).steps == steps


@pytest.mark.parametrize("text", ["1:30", "2024-01-01", "true", "on", "0x10", "1.5", "1e400", "seven"])
def test_values_that_are_no_integers(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, f"steps: {text}").startswith(
        "config.yaml: steps: Input should be a valid integer"
    )
    assert text in refused(tmp_path, f"steps: {text}")


NAMES = [
    "2024",
    "010",
    "1:30",
    "on",
    "off",
    "no",
    "2024-01-01",
    "1e5",
    "1_000",
    "a#b",
    "a b",
    "=",
    "[a]",
    "{a}",
]


@pytest.mark.parametrize("name", [*NAMES, "true", "null", "~", "a: b", "a #1", "'", '"', "d\u00e4ta \u96ea"])
def test_text_stays_text(tmp_path: Path, name: str) -> None:
    """In a file that the program wrote, and in an override, quoted where YAML needs quotes."""
    config = TrainConfig(ema=(EmaProfile(name=name, decay=0.5),))
    assert of_file(tmp_path, dump(config)).ema[0].name == name
    quoted = f"'{name.replace(chr(39), 2 * chr(39))}'"
    as_override = quoted if name[0] in "[{'\"" or name == "null" else name
    assert load(TrainConfig, None, [f"ema.0.name={as_override}"]).ema[0].name == name
    if name in NAMES[:-3]:
        assert of_file(tmp_path, f"ema: [{{name: {name}, decay: 0.5}}]").ema[0].name == name


@pytest.mark.parametrize(("text", "is_on"), [("on", True), ("yes", True), ("True", True), ("off", False)])
def test_switches(tmp_path: Path, text: str, is_on: bool) -> None:
    assert of_file(tmp_path, f"log: {{tensorboard: {text}}}").log.tensorboard is is_on


def test_a_choice_may_be_named_off(tmp_path: Path) -> None:
    assert of_file(tmp_path, "log: {wandb: off}").log.wandb == "off"


@pytest.mark.parametrize("text", ["model:", "model: ~", "ema:", "log: {}", "", "# nothing", "---"])
def test_an_empty_section_is_an_absent_one(tmp_path: Path, text: str) -> None:
    assert of_file(tmp_path, text) == with_absolute_paths(TrainConfig())
    assert of_file(tmp_path, text, "model.name=DiT-S/8", "ema.0.decay=0.5").model.name == "DiT-S/8"


def test_null_removes_a_value(tmp_path: Path) -> None:
    config = of_file(tmp_path, "ema: [{name: a, decay: 0.9}]", "ema.0.decay=null", "ema.0.sigma_rel=0.1")
    assert (config.ema[0].decay, config.ema[0].sigma_rel) == (None, 0.1)


def test_anchors_and_merges(tmp_path: Path) -> None:
    text = "ema: [&a {name: a, decay: 0.9}, {<<: *a, name: b}]"
    assert [(one.name, one.decay) for one in of_file(tmp_path, text).ema] == [("a", 0.9), ("b", 0.9)]


# Lists


@pytest.mark.parametrize("override", ["betas=0.8,0.95", "betas=[0.8, 0.95]", "betas = 0.8, 0.95"])
def test_a_list_with_commas(override: str) -> None:
    assert load(TrainConfig, None, [f"optimizer.{override}"]).optimizer.betas == (0.8, 0.95)


def test_an_item_of_a_list(tmp_path: Path) -> None:
    assert load(TrainConfig, None, ["ema.0.decay=0.999"]).ema[0].decay == 0.999
    assert load(TrainConfig, None, ["optimizer.betas.1=0.5"]).optimizer.betas == (0.9, 0.5)
    config = of_file(tmp_path, "ema: [{name: a, decay: 0.1}, {name: b, decay: 0.2}]", "ema.1.decay=0.3")
    assert [(one.name, one.decay) for one in config.ema] == [("a", 0.1), ("b", 0.3)]


@pytest.mark.parametrize("number", ["1", "-1", "x"])
def test_a_missing_item(number: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"expected an index below 1 after ema, got '{number}'; ema=\[...\]"
    ):
        load(TrainConfig, None, ["ema.0.decay=0.5", f"ema.{number}.decay=0.5"])


# Origin of errors


def test_an_error_names_its_origin(tmp_path: Path) -> None:
    said = refused(tmp_path, "seed: -1\nsteps: 7\nsed: 1", "optimizer.lr=fast", "stepz=1").splitlines()
    assert [line.partition(": ")[::2][0] for line in said] == [
        "config.yaml",
        "command line",
        "config.yaml",
        "command line",
    ]
    assert said[0].startswith("config.yaml: seed: Input should be greater than or equal to 0, got -1")
    assert said[3] == "command line: unknown key 'stepz'; did you mean 'steps'?"


def test_a_section_that_file_and_command_line_set(tmp_path: Path) -> None:
    text = "optimizer: {final_lr_fraction: 0.5, decay: cosine}"
    said = refused(tmp_path, text, "optimizer.decay=none")
    assert said.startswith("config.yaml and command line: optimizer: final_lr_fraction=0.5 has no effect")


def test_an_unknown_key_of_an_item(tmp_path: Path) -> None:
    said = refused(tmp_path, "ema: [{name: a, decay: 0.5}, {name: b, decy: 0.9}]").splitlines()
    assert "config.yaml: unknown key 'ema.1.decy'; did you mean 'ema.1.decay'?" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps: 7\nseed: 1\nsteps: 8", "duplicate key 'steps' on line 1 and on line 3; remove one"),
        ("optimizer:\n  lr: 1\n  lr: 2", "duplicate key 'lr' on line 2 and on line 3; remove one"),
        ("optimizer: {lr: 1, lr: 1}", "duplicate key 'lr' on line 1 and on line 1; remove one"),
        ("steps: 1\n---\nsteps: 2", "expected a single document"),
        ("data:\n\turl: x", "found character '\\t' that cannot start any token"),
        (b"run: caf\xe9", "unacceptable character"),
        ("? [a]\n: b", "unhashable key"),
        ("run: !!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_invalid_yaml(tmp_path: Path, text: str | bytes, said: str) -> None:
    message = refused(tmp_path, text)
    assert message.startswith("config.yaml is not valid YAML: ")
    assert said in message


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder; expected a YAML file or a recipe name$"):
        load(TrainConfig, tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=rf"; did you mean {tmp_path}/config.yaml\?$"):
        load(TrainConfig, tmp_path)


# Round trips

TEXT = st.text(min_size=1) | st.sampled_from(
    [*NAMES, "null", "~", "-", "?", "&a", "*a", "!!int", "<<", "a\n"]
)
NUMBER = st.floats(0, 1, exclude_min=True, exclude_max=True)
PROFILES = st.lists(
    st.builds(lambda name, decay: {"name": name, "decay": decay}, TEXT, NUMBER),
    min_size=1,
    unique_by=lambda profile: str(profile["name"]),
)
TRAIN = st.fixed_dictionaries(
    {"ema": PROFILES},
    optional={
        "steps": st.integers(1, 10**18),
        "model": st.fixed_dictionaries({"name": TEXT, "attention": TEXT}),
        "optimizer": st.fixed_dictionaries({"lr": NUMBER, "betas": st.tuples(NUMBER, NUMBER)}),
        "log": st.fixed_dictionaries({"tensorboard": st.booleans(), "wandb_project": TEXT}),
        "engine": st.fixed_dictionaries({"zero_stage": st.sampled_from([1, 2, 3])}),
    },
)
ENCODE = st.fixed_dictionaries({"wandb_project": TEXT, "ray_address": TEXT, "max_quarantined": NUMBER})


@given(TRAIN)
def test_a_dumped_run_is_the_same_run(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object]
) -> None:
    config = with_absolute_paths(TrainConfig.model_validate(tree))
    path = tmp_path_factory.getbasetemp() / "train.yaml"
    path.write_text(dump(config))
    assert load(TrainConfig, path) == config


@given(ENCODE)
def test_a_dumped_job_is_the_same_job(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, object]
) -> None:
    config = with_absolute_paths(EncodeConfig.model_validate(tree))
    path = tmp_path_factory.getbasetemp() / "encode.yaml"
    path.write_text(dump(config))
    assert load(EncodeConfig, path) == config
