"""Paths of a configuration: absolute after reading, valid from any folder, rejected when empty."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_scale import cli
from dit_scale.checkpoint.manifest import CheckpointId
from dit_scale.config import EncodeConfig, TrainConfig, dump, load, load_for_training, relocated
from dit_scale.data.cache import NoRoomError, ShardCache, ShardFile
from dit_scale.elastic.launch import digest
from dit_scale.errors import ConfigError
from dit_scale.paths import PathKind, absolute
from dit_scale.storage import open_storage
from dit_scale.train.run_folder import config_of_folder, root_of_folder
from tests.support.tiny_run import ATTEMPT, STEP, write_run
from tests.support.tiny_vae import save_tiny_vae

PATHS = {
    TrainConfig: ("run", "data.url", "data.vae", "data.cache_dir", "checkpoint.url"),
    EncodeConfig: ("source", "output", "vae"),
}
KEYS = [(root, key) for root, keys in PATHS.items() for key in keys]


def value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def read(root: Any, key: str, text: str) -> Any:
    return value(load(root, None, [f"{key}={text}"]), key)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, which is also the home directory, with a folder `a`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("a").mkdir()
    return tmp_path


@pytest.mark.parametrize(("root", "key"), KEYS)
@pytest.mark.parametrize("text", ["a", "./a", "a/", "b/../a", "~/a", "{here}/a", "file://{here}/a"])
def test_every_path_is_absolute(root: Any, key: str, text: str, here: Path) -> None:
    assert read(root, key, text.replace("{here}", str(here))) == f"{here}/a"


@pytest.mark.parametrize(("root", "key"), KEYS)
@pytest.mark.parametrize("name", ["2024", "010", "a b", "a #1", "#", "1:30", "on", "d\u00e4ta", "a=b"])
def test_any_name_is_a_path(root: Any, key: str, name: str, here: Path) -> None:
    Path(name).mkdir()  # a VAE name means a folder if that folder exists
    assert read(root, key, name) == f"{here}/{name}"


@given(st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1).filter(str.strip))
def test_an_absolute_path_is_unchanged(name: str) -> None:
    path = absolute(f"/x/{name}", PathKind.FOLDER) if "://" not in name else "/"
    assert absolute(path, PathKind.FOLDER) == path == os.path.abspath(path)


@pytest.mark.parametrize(("root", "key"), [pair for pair in KEYS if pair[1] != "checkpoint.url"])
@pytest.mark.parametrize("text", ["", " "])
def test_an_empty_path_is_refused(root: Any, key: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^command line: {key} is empty: expected a folder"):
        read(root, key, text)
    *sections, name = key.split(".")
    (tmp_path / "c.yaml").write_text(
        "".join(f"{part}: {{" for part in sections) + f"{name}: ''" + "}" * len(sections)
    )
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/c.yaml: {key} is empty: expected a folder"):
        load(root, tmp_path / "c.yaml")


@pytest.mark.parametrize(("root", "key"), KEYS)
def test_urls(root: Any, key: str) -> None:
    if key in ("data.url", "checkpoint.url", "source", "output"):
        assert read(root, key, "s3://bucket/a b/") == "s3://bucket/a b/"
    else:
        with pytest.raises(ConfigError, match=rf"{key} is s3://bucket/a: expected a folder"):
            read(root, key, "s3://bucket/a")
    for text in ("file://a", "hdfs://a/b"):
        with pytest.raises(ConfigError, match=rf"{key} is {text}: expected a folder"):
            read(root, key, text)


def test_a_vae_is_a_folder_if_there_is_one(here: Path) -> None:
    hub = "stabilityai/sd-vae-ft-ema"
    assert read(TrainConfig, "data.vae", hub) == hub
    Path(hub).mkdir(parents=True)
    assert read(TrainConfig, "data.vae", hub) == f"{here}/{hub}"
    assert read(TrainConfig, "data.vae", "./none") == f"{here}/none"
    assert load(EncodeConfig, None, ["vae=a", "output=o"], keep_relative=True).vae == "a"
    assert load(EncodeConfig, None, ["vae=~/a"], keep_relative=True).vae == f"{here}/a"


def test_without_a_home_directory_only_required_paths_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # a user without a passwd entry
    config = load(TrainConfig, None)
    assert config.data.cache_dir == "~/.cache/dit_scale/shards"
    with pytest.raises(ConfigError, match=r"run is ~/x: its home directory is unknown"):
        read(TrainConfig, "run", "~/x")
    cache = ShardCache(open_storage(tmp_path), config.data.cache_dir)
    with pytest.raises(NoRoomError, match=r"no home directory is known for ~/.cache.*; set data.cache_dir"):
        cache.fetch(ShardFile("0", "shards/0.tar", 1, "0" * 64))


# A run's folder


def test_a_run_is_found_from_any_folder_and_where_it_moved(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny_vae(here / "weights")
    write_run(Path("runs/x"), "weights")
    config = load(TrainConfig, "runs/x/config.yaml", ["data.vae=weights"])  # as saved at the start of the run
    open_storage("runs/x").write("config.yaml", dump(config).encode())
    assert (config.run, config.data.vae) == (f"{here}/runs/x", f"{here}/weights")
    for folder, run in (("a", "../runs/x"), ("runs", "x"), (".", "runs/x"), ("a", f"{here}/runs/x")):
        monkeypatch.chdir(here / folder)
        found = config_of_folder(run)
        assert (found.run, found.data) == (config.run, config.data)
        assert root_of_folder(run).url == config.run
    monkeypatch.chdir(here)
    Path("runs/x").rename("a/y")
    assert config_of_folder("a/y").run == f"{here}/a/y"
    monkeypatch.chdir(here / "runs")
    assert cli.main(["checkpoint", "list", "../a/y"]) == 0
    assert CheckpointId(STEP, ATTEMPT).name in capsys.readouterr().out
    assert root_of_folder("../a/y").exists(f"{CheckpointId(STEP, ATTEMPT).path()}/MANIFEST.json")


def test_a_moved_run_does_not_start_over_in_its_old_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("old").mkdir()
    Path("old/config.yaml").write_text(dump(load(TrainConfig, None, ["run=old", "engine.device=cpu"])))
    arguments = ["train", "new/config.yaml", "--dry-run"]
    Path("old").rename("new")
    assert cli.main(arguments) == 0, "a file of that name that lies in no run"
    Path("new/events.jsonl").touch()
    assert cli.main(arguments) == 2
    said = (
        f"new/config.yaml belongs to a run that was in {here}/old; pass run={here}/new to resume it here, or"
    )
    assert said in capsys.readouterr().err
    for run in ("new", "another"):
        assert cli.main([*arguments, f"run={run}"]) == 0
        assert f"run: {here}/{run}\n" in capsys.readouterr().out
    Path("old").symlink_to("new")
    assert cli.main(arguments) == 0


@pytest.mark.parametrize(
    ("url", "more", "found"),
    [
        ("old/state", [], "new/state"),
        ("old/state", ["checkpoint.url=old/state2"], "old/state2"),
        ("elsewhere", [], "elsewhere"),
    ],
)
def test_a_moved_run_resumes_from_the_checkpoints_that_moved_with_it(
    here: Path, url: str, more: list[str], found: str
) -> None:
    Path("new").mkdir()
    saved = load(TrainConfig, None, ["run=old", f"checkpoint.url={url}"])
    Path("new/config.yaml").write_text(dump(saved))
    Path("new/events.jsonl").touch()
    config = load_for_training("new/config.yaml", ["run=new", *more])
    assert (config.run, config.checkpoint.url) == (f"{here}/new", f"{here}/{found}")
    assert load_for_training("new/config.yaml", ["run=another"]).checkpoint == saved.checkpoint


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("", ""),
        ("/old/run", "/new/run"),
        ("/old/run/state", "/new/run/state"),
        ("/old/run2", "/old/run2"),
        ("s3://bucket/run", "s3://bucket/run"),
    ],
)
def test_checkpoints_below_a_run_move_with_it(url: str, found: str) -> None:
    tree = {"run": "/old/run", "checkpoint": {"url": url}}
    config = relocated(TrainConfig.model_validate(tree), "/new/run")
    assert (config.run, config.checkpoint.url) == ("/new/run", found)


def test_nodes_may_have_folders_with_different_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for node in ("a", "b"):
        (tmp_path / node).mkdir()
        monkeypatch.chdir(tmp_path / node)
        monkeypatch.setenv("HOME", str(tmp_path / node))
        digests.add(digest(load(TrainConfig, None, [f"data.url=/{node}/latents"])))
    assert len(digests) == 1
    assert digest(load(TrainConfig, None, ["optimizer.lr=1"])) not in digests
