"""The command line: quick help, and one message with exit code 2 for every mistake of a user."""

import argparse
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from dit_scale import cli, recipes
from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import CHECKPOINTS, MANIFEST, CheckpointId
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.checkpoint.writer import write_manifest
from dit_scale.data.shards import INFO_KEY
from dit_scale.inference.sources import open_source
from dit_scale.storage import open_storage
from tests.support.latents import write_latents
from tests.support.tiny_run import STEP, write_run

CONFIGS = Path(__file__).parents[2] / "configs"
COMMANDS = cli._parser()[1]
NEWEST_ID = CheckpointId(STEP, 1)
NEWEST = NEWEST_ID.name

HEAVY = ("torch", "deepspeed", "diffusers", "numpy", "scipy", "pydantic", "yaml", "boto3", "rich", "PIL")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, num=8, shard_samples=4, num_classes=5)
    return folder


@pytest.fixture
def run(tmp_path: Path, tiny_vae: str) -> Path:
    write_run(tmp_path / "run", tiny_vae)
    return tmp_path / "run"


def small(folder: Path, data: Path) -> list[str]:
    """`train` of a tiny model on the CPU; later overrides win."""
    return [
        "train",
        str(CONFIGS / "dit_xl2_256.yaml"),
        f"run={folder / 'run'}",
        f"data.url={data}",
        "model={name: DiT-Ti/2, image_size: 32, num_classes: 5}",
        "engine={device: cpu, precision: fp32}",
        "global_batch=2",
    ]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the message of a command that must exit with code 2, without a traceback."""
    assert cli.main(list(arguments)) == cli.USER_ERROR_EXIT_CODE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"dit-scale {arguments[0]}")
    assert "Traceback" not in printed.err
    return printed.err


# Help


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return the parsers of all commands and actions, such as `checkpoint` and `checkpoint list`."""
    found = dict(COMMANDS)
    for name, parser in COMMANDS.items():
        for action in parser._subparsers._group_actions if parser._subparsers else ():
            found |= {f"{name} {own}": actual for own, actual in dict(action.choices or {}).items()}
    return found


@pytest.mark.parametrize("command", ["", *parsers()])
def test_help_imports_nothing_heavy(command: str) -> None:
    script = f"""
import sys
import tomllib
from dit_scale import cli, recipes
try:
    cli.main({[*command.split(), "--help"]!r})
except SystemExit as end:
    assert end.code == 0
print("loaded:", *sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: dit-scale {command}".rstrip())
    assert done.stdout.splitlines()[-1] == "loaded:"


@pytest.mark.parametrize("arguments", [[], ["--help"]], ids=["alone", "help"])
def test_the_front_page_lists_commands_and_recipes(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 0
    listed = re.findall(r"^  (\w+) +\w+.* \w+", capsys.readouterr().out, re.MULTILINE)
    assert [name for name in listed if name in COMMANDS] == list(COMMANDS)
    assert recipes.names()[0] in listed
    assert set(listed) - set(COMMANDS) <= set(recipes.names())


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    project = tomllib.loads((CONFIGS.parent / "pyproject.toml").read_text())["project"]
    assert first == f"dit-scale {project['version']}"
    assert f"python {platform.python_version()}, torch {torch.__version__}, deepspeed " in second


@pytest.mark.parametrize("name", parsers())
def test_help_has_an_example_that_can_be_run(name: str) -> None:
    """The parser accepts every example, and at least one is of this command."""
    text = str(parsers()[name].description).replace("\\\n", " ")
    lines = r"^  (?:dit-scale|deepspeed .*dit_scale\.cli) (\S.*?)(?:  +\(.*\)| > \S+)?$"
    examples = re.findall(lines, text, re.MULTILINE)
    assert any(example.startswith(f"{name} ") or example == name for example in examples)
    for example in examples:
        assert cli._parse(shlex.split(example)).name.startswith(f"dit-scale {name}")


@pytest.mark.parametrize("name", parsers())
def test_every_argument_is_explained(name: str) -> None:
    """A default alone is no explanation."""
    arguments = [a for a in parsers()[name]._actions if not isinstance(a, argparse._SubParsersAction)]
    assert [a.dest for a in arguments if not re.match(r"[\w.]", a.help or "")] == []


@pytest.mark.parametrize("columns", [80, 200])
@pytest.mark.parametrize("name", parsers())
def test_help_fits_the_terminal(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All lines except those of a description that are meant to be copied."""
    monkeypatch.setenv("COLUMNS", str(columns))
    parser = parsers()[name]
    copied = [line for line in str(parser.description).splitlines() if line.startswith("  ")]
    lines = [line for line in parser.format_help().splitlines() if line not in copied]
    assert max(map(len, lines)) <= columns


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tarin"], "unknown command 'tarin'; did you mean 'train'? `dit-scale` alone lists the commands"),
        (["qqq"], "unknown command 'qqq'; `dit-scale` alone lists the commands"),
        (["checkpoint", "lsit"], "invalid choice: 'lsit'"),
        (["train"], "the following arguments are required: config"),
        (["train", "x", "--world", "0"], "--world: expected an integer from 1"),
        (["sample", "x", "--images", "0"], "--images: expected an integer from 1"),
        (
            ["sample", "x", "--batch", "many"],
            "--batch: expected an integer from 1 to 2147483647, got 'many'",
        ),
        (["sample", "x", "--seed", "4294967296"], "--seed: expected an integer from 0 to 4294967295"),
        (["sample", "x", "--classes", "1,dog"], "--classes: expected an integer from 0"),
        (["sample", "x", "--classes", ""], "--classes: expected an integer from 0"),
        (["checkpoint", "export", "x", "y.pt"], "out: expected a path that ends in .safetensors, got 'y.pt'"),
        (["ema", "reconstruct", "x", "--out", "y.safetensors"], "required: --sigma-rel"),
        (["ema", "reconstruct", "x", "--sigma-rel", "0.3"], "expected a number above 0 and below 0.289"),
        (["ema", "reconstruct", "x", "--sigma-rel", "nan"], "expected a number above 0 and below 0.289"),
        (["ema", "reconstruct", "x", "--sigma-rel", "thin"], "below 0.289, got 'thin'"),
        (["sample", "x", "--guidance", "nan"], "--guidance: expected a number, got 'nan'"),
        (["launch", "x", "--lease-s", "0"], "--lease-s: expected a number > 0"),
        (["launch", "x", "--gather-s", "inf"], "--gather-s: expected a number, got 'inf'"),
        (["launch", "x", "--grow-s", "-1"], "--grow-s: expected a number >= 0, got '-1'"),
        (["sample", "x", "--guidance-interval", "9:2"], "--guidance-interval: expected LOW:HIGH"),
        (["sample", "x", "--format", "jpg"], "--format: expected npz, png or tar"),
        (["sample", "x", "--sampler", "euler"], "--sampler: invalid choice: 'euler'"),
    ],
)
def test_arguments_of_the_wrong_kind(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == cli.USER_ERROR_EXIT_CODE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["models", "--json", "--x"], ["train", "x", "a=1", "--dry", "--x", "b=2"]]
)
def test_arguments_that_do_not_exist(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == cli.USER_ERROR_EXIT_CODE
    assert "unrecognized arguments: --x" in capsys.readouterr().err


def test_a_setting_with_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "demo", "--steps=7"])
    said = "unrecognized arguments: --steps=7; settings have no dashes: steps=7\n"
    assert capsys.readouterr().err.endswith(said)


# Training


def test_a_dry_run_starts_nothing(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*small(tmp_path, data), "--dry-run", "--world", "2"]) == 0
    assert "2 samples on 2 processes: 1 micro-steps of 1 each" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            ["optimizer.learning_rate=1"],
            "unknown key 'optimizer.learning_rate'; did you mean 'optimizer.lr'?",
        ),
        (["global_batch=99999999999999999999"], "global_batch: Input should be less than 2147483648"),
        (["engine.zero_stage=0"], "engine.zero_stage: Input should be 1, 2 or 3, got 0"),
        (["--dry-run", "--world", "3"], "global_batch=2 is smaller than the world size of 3"),
        (
            ["--dry-run", "model.image_size=40"],
            "image_size 40 does not fit DiT-Ti/2: expected a multiple of 16",
        ),
        (["--dry-run", "model.name=DiT-M/2"], "unknown model 'DiT-M/2'"),
    ],
)
def test_configurations_that_cannot_be(
    tmp_path: Path, data: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *small(tmp_path, data), *more)


def test_overrides_before_and_behind_options(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--dry-run", "global_batch=6", "--world", "3", "engine.zero_stage=3"]
    assert cli.main([*small(tmp_path, data), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "6 samples on 3 processes" in printed
    assert "at ZeRO-3" in printed


def test_a_missing_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no configuration file at none.yaml" in refused(capsys, "train", "none.yaml")


@pytest.mark.usefixtures("same_process")
def test_a_device_that_is_not_there(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = refused(capsys, *small(tmp_path, data), "engine.device=cuda")
    assert "device=cuda, but no CUDA device is visible; use device=auto or device=cpu" in said


@pytest.mark.usefixtures("same_process")
def test_a_data_set_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *small(tmp_path, tmp_path / "nothing"))
    assert f"{tmp_path}/nothing has no dataset.json: not a latent data set; make one with" in said


@pytest.mark.usefixtures("same_process")
def test_a_data_set_that_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(tmp_path / "data", num=4)
    (tmp_path / "data" / INFO_KEY).rename(tmp_path / "data" / "encode.json")
    said = refused(capsys, *small(tmp_path, tmp_path / "data"))
    assert "its encoding has not finished; run the same encoding command again" in said


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.image_size=64", "holds latents of 32 px images, but model.image_size is 64"),
        ("model.num_classes=4", "has 5 classes, but model.num_classes is 4"),
    ],
)
def test_a_data_set_of_another_kind(
    tmp_path: Path, data: Path, override: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, *small(tmp_path, data), override)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("same_process")
def test_a_data_set_without_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_latents(tmp_path / "data", num=0, num_classes=5)
    assert "holds no sample" in refused(capsys, *small(tmp_path, tmp_path / "data"))


@pytest.mark.usefixtures("same_process")
def test_a_launcher_that_says_half(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    said = refused(capsys, *small(tmp_path, data))
    assert "RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT; use the deepspeed launcher" in said


def test_an_interrupt_is_said_quietly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.models, "_run", interrupt)
    assert cli.main(["models"]) == 130
    assert capsys.readouterr().err == "dit-scale models: interrupted\n"


# Sampling and checkpoints


@pytest.mark.usefixtures("same_process")
def test_sample_draws_from_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--images", "3", "--classes", "4, 2", "--steps", "2", "--device", "cpu", "--ema", "second"]
    assert cli.main(["sample", str(run), *arguments]) == 0
    said = f"EMA second of {run}/checkpoints/{NEWEST}: 3 images in {run}/samples/grid.png and {run}/samples/"
    printed = capsys.readouterr().out
    assert printed.startswith(said)
    assert printed.endswith("classes: balanced over classes 4,2\n")
    assert cli.main(["sample", str(run), *arguments]) == 0
    assert capsys.readouterr().out.startswith(f"already complete: {said}")
    assert "sampling.seed: the folder has 0, this command 7" in refused(
        capsys, "sample", str(run), *arguments, "--seed", "7"
    )
    assert (run / "samples" / "grid.png").is_file()
    assert (run / "samples" / "samples.npz").is_file()


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--classes", "5"], "class 5: expected 0 to 4"),
        (["--ema", "paper"], "has no EMA profile 'paper'; it has first, second"),
        (["--steps", "fast"], "respacing 'fast': expected a number of steps"),
        (["--steps", "250"], "respacing '250': section 1 of 1 has 100 of the 100 timesteps"),
    ],
)
def test_samples_that_cannot_be_drawn(
    run: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "sample", str(run), "--device", "cpu", *more)


def test_sources_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "sample", str(tmp_path))
    assert f"{tmp_path}: expected a run folder, a checkpoint folder, a weights file (.safetensors, " in said


def test_a_bare_weights_file_needs_a_vae(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "weights.pt"
    torch.save(open_source(str(run)).state, bare)
    assert "pass --vae FOLDER_OR_HUB_NAME" in refused(capsys, "sample", str(bare))


def test_checkpoint_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, folder = open_storage(run), run / CHECKPOINTS
    whole = Checkpoint(root, NEWEST_ID)
    next_name, damaged_name = CheckpointId(STEP + 1, 1).name, CheckpointId(STEP + 2, 1).name
    shutil.copytree(folder / NEWEST, folder / next_name, ignore=shutil.ignore_patterns(MANIFEST))
    write_manifest(root, whole.manifest.model_copy(update={"step": STEP + 1}))
    root.write(f"{CHECKPOINTS}/{damaged_name}/{MANIFEST}", b"{}")
    assert cli.main(["checkpoint", "list", str(run), "--json"]) == 0
    damaged, *rows = json.loads(capsys.readouterr().out)
    assert "is damaged" in damaged.pop("problem")
    assert damaged == {"name": damaged_name}
    assert rows == [
        {"name": next_name, "step": STEP + 1, "bytes": whole.bytes},
        {"name": NEWEST, "step": STEP, "bytes": whole.bytes},
    ]
    assert cli.main(["checkpoint", "list", str(run)]) == 0
    _, _, *lines = filter(str.strip, capsys.readouterr().out.splitlines())
    assert [line.split()[0] for line in lines] == [damaged["name"], *(row["name"] for row in rows)]


def test_checkpoint_list_of_a_run_without_any(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / CHECKPOINTS)
    assert cli.main(["checkpoint", "list", str(run)]) == 0
    assert capsys.readouterr().out == "no committed checkpoint\n"


def test_checkpoint_list_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a run folder" in refused(capsys, "checkpoint", "list", str(tmp_path))


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def test_checkpoint_verify(run: Path, capsys: pytest.CaptureFixture[str], tiny_vae: str) -> None:
    write_run(run, tiny_vae, STEP + 1)
    newest, older = CheckpointId(STEP + 1, 1).name, NEWEST
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{CHECKPOINTS}/{newest}", f"{CHECKPOINTS}/{older}"]
    assert all(line.endswith("MB in 2 files") for line in lines)
    file = run / CHECKPOINTS / older / "rank-00001.safetensors"
    damage(file)
    assert cli.main(["checkpoint", "verify", str(run)]) == 1
    whole, damaged = capsys.readouterr().out.splitlines()
    assert whole == lines[0]
    assert damaged.startswith(f"{CHECKPOINTS}/{older}: {file}: ema.second of ")
    assert "is damaged (CRC-32C of elements" in damaged
    folder = run / CHECKPOINTS
    assert cli.main(["checkpoint", "verify", str(folder / newest)]) == 0
    assert capsys.readouterr().out.startswith(f"{folder / newest}: intact, ")
    assert cli.main(["checkpoint", "verify", str(folder / older)]) == 1
    assert f"{file}: ema.second of" in capsys.readouterr().out


def test_checkpoint_prune(run: Path, capsys: pytest.CaptureFixture[str], tiny_vae: str) -> None:
    for step in (STEP + 1, STEP + 2, STEP + 3):
        write_run(run, tiny_vae, step)
    oldest, old, next_newest, newest = (CheckpointId(STEP + n, 1) for n in range(4))
    root = open_storage(run)
    assert cli.main(["checkpoint", "prune", str(run)]) == 0
    assert capsys.readouterr().out == f"{oldest.path()}: would be deleted\n{old.path()}: would be deleted\n"
    assert committed(root) == [newest, next_newest, old, oldest]
    assert cli.main(["checkpoint", "prune", str(run), "--yes"]) == 0
    assert capsys.readouterr().out == f"{oldest.path()}: deleted\n{old.path()}: deleted\n"
    assert cli.main(["checkpoint", "prune", str(run), "--yes", "--keep", "1"]) == 0
    assert capsys.readouterr().out == f"{next_newest.path()}: deleted\n"
    assert committed(root) == [newest]


def test_prune_says_where_the_configuration_was_edited(
    run: Path, capsys: pytest.CaptureFixture[str], tiny_vae: str
) -> None:
    write_run(run, tiny_vae, STEP + 1)
    text = (run / "config.yaml").read_text()
    assert text.count("  keep: 2\n") == 1
    (run / "config.yaml").write_text(text.replace("  keep: 2\n", "  keep: 1\n"))
    assert cli.main(["checkpoint", "prune", str(run)]) == 0
    note, gone = capsys.readouterr().out.splitlines()
    newest = CheckpointId(STEP + 1, 1).path()
    assert note == f"note: config.yaml differs from {newest}: checkpoint.keep: 2 -> 1"
    assert gone == f"{CHECKPOINTS}/{NEWEST}: would be deleted"


def test_checkpoint_keep(run: Path, capsys: pytest.CaptureFixture[str], tiny_vae: str) -> None:
    write_run(run, tiny_vae, STEP + 1)
    assert cli.main(["checkpoint", "keep", str(run), NEWEST]) == 0
    assert capsys.readouterr().out == f"{CHECKPOINTS}/{NEWEST} is kept permanently\n"
    assert cli.main(["checkpoint", "prune", str(run), "--yes", "--keep", "1"]) == 0
    assert capsys.readouterr().out == ""
    assert cli.main(["checkpoint", "verify", str(run)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    for name in (CheckpointId(STEP + 2, 1).name, "latest"):
        said = refused(capsys, "checkpoint", "keep", str(run), name)
        assert f"{run} has no checkpoint {name}; `dit-scale checkpoint list` prints their names" in said


def test_nothing_is_pruned_when_the_newest_is_damaged(
    run: Path, capsys: pytest.CaptureFixture[str], tiny_vae: str
) -> None:
    write_run(run, tiny_vae, STEP + 1)
    damage(run / CheckpointId(STEP + 1, 1).path() / "rank-00000.safetensors")
    assert "is damaged" in refused(capsys, "checkpoint", "prune", str(run), "--yes", "--keep", "1")
    assert len(committed(open_storage(run))) == 2


def test_a_run_without_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / CHECKPOINTS)
    assert "has no committed checkpoint" in refused(capsys, "checkpoint", "prune", str(run))
    assert "has no committed checkpoint yet" in refused(capsys, "checkpoint", "verify", str(run))


def test_a_run_without_power_function_averages(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ema", "list", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    out = tmp_path / "weights.safetensors"
    said = refused(capsys, "ema", "reconstruct", str(run), "--sigma-rel", "0.1", "--out", str(out))
    assert "has no power-function average; set checkpoint.ema_every_steps and an ema profile" in said


def test_averages_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected a run folder" in refused(capsys, "ema", "list", str(tmp_path))


def test_checkpoint_export(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "weights.safetensors"
    assert cli.main(["checkpoint", "export", str(run), str(out), "--ema", "second"]) == 0
    assert capsys.readouterr().out == f"EMA second of {run}/checkpoints/{NEWEST} -> {out}\n"
    exported, second = open_source(str(out)), open_source(str(run), ema="second")
    assert all(torch.equal(exported.state[name], tensor) for name, tensor in second.state.items())
