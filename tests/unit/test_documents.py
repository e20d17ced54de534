"""The real parsers accept every command in the documents; keys, files and targets in them exist."""

import argparse
import ast
import importlib
import importlib.util
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dit_scale import cli, recipes
from dit_scale.config import EncodeConfig, Section, TrainConfig, load
from dit_scale.errors import ConfigError
from dit_scale.keys import groups
from dit_scale.scaling.config import StudyConfig
from tests.support.documents import DOCUMENTS, HEADERS, ROOT, Command, commands, inline_code

COMMANDS = cli._parser()[1]
ROOTS: dict[str, type[Section]] = {
    "train": TrainConfig,
    "launch": TrainConfig,
    "plan": TrainConfig,
    "encode": EncodeConfig,
    "scaling": StudyConfig,
}
"""Commands that read a configuration => its class."""
PLACEHOLDERS = {
    "CONFIG": "dit_xl2_256",
    "STUDY": "scaling_digits",
    "N": "8",
    "I": "0",
    "S": "400",
    "DAYS": "14",
}
"""Words that stand for what the reader chooses => a choice."""
OUR_FOLDERS = ("benchmarks/", "cluster/", "configs/", "data_pipeline/", "demo/", "docs/", "tests/")
FILES = (".py", ".md", ".json", ".yaml", ".npz")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


class Mistake(Exception):
    """Why a command cannot be run."""


class Parsed(Exception):
    """A program has read its arguments."""


@pytest.mark.parametrize("path", [*DOCUMENTS, *HEADERS], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_a_document_can_be_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = []
    for command in commands(path):
        try:
            check(command)
        except Mistake as mistake:
            found.append(f"{command}\n    {mistake}")
    assert found == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_keys_in_a_document_exist(path: Path) -> None:
    known = {
        name
        for root in (TrainConfig, EncodeConfig, StudyConfig)
        for group in groups(root)
        for name in (group.name, *(key.key for key in group.keys))
    }
    sections = {name.partition(".")[0].removesuffix("[]") for name in known if "." in name}
    pattern = re.compile(rf"((?:{'|'.join(sorted(sections))})(?:\.\w+)+)(?:[=:].*)?")
    matches = [(line, pattern.fullmatch(code)) for line, code in inline_code(path.read_text())]
    named = [(line, re.sub(r"\.\d+\.", "[].", match[1])) for line, match in matches if match]
    assert [(line, key) for line, key in named if key not in known and not key.endswith(FILES)] == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("dit-scale tarin demo", "no command tarin"),
        ("dit-scale status RUN --wach", "no option --wach"),
        ("dit-scale checkpoint lsit RUN", "no action lsit"),
        ("dit-scale train dit_xl2_265", "no recipe dit_xl2_265"),
        ("dit-scale train demo optimizer.learning_rate=1", "did you mean 'optimizer.lr'"),
        ("deepspeed --num_gpu 8 --module dit_scale.cli train demo", "expected --no_local_rank"),
        ("ray job submit --workdir . -- python data_pipeline/encode_latents.py", "No such option"),
        ("ray job submit -- python data_pipeline/encode_latents.py --config demo_encode", "no recipe"),
        ("sbatch cluster/slurm_xl2_256.sh stepz=1", "did you mean 'steps'"),
        ("sbatch cluster/slurm_xl3.sh", "cluster/slurm_xl3.sh does not exist"),
        ("python -m benchmarks.loader --smok", "refuses"),
        ("python -m benchmarks.missing", "no module"),
        ("python -m pytest tests/unit/test_rng.py -k nothing_like_this", "no test with nothing_like_this"),
        ("make tset", "no target tset"),
        ("pip install 'dit-scale[wamdb]'", "no extra wamdb"),
        ("kubectl apply -k cluster/kubernetes/overlays/xl3", "does not exist"),
    ],
)
@pytest.mark.parametrize("inline", [False, True], ids=["block", "sentence"])
def test_mistakes_in_commands_are_found(
    words: str, said: str, inline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(Mistake, match=re.escape(said)):
        check(Command("here", tuple(shlex.split(words)), inline))


def check(command: Command) -> None:
    """Raise Mistake if the program would not accept the command."""
    words = [PLACEHOLDERS.get(word, re.sub(r"=(?=N$)", "=8", word)) for word in command.words]
    words = [re.sub(r"=8N$", "=8", word) for word in words]
    missing = [
        name
        for word in words
        for name in re.findall(r"(?:^|[=:])([\w.-]+/[\w./-]*)", word)
        if name.startswith(OUR_FOLDERS) and not (ROOT / name).exists() and "NAME" not in name
    ]
    if missing:
        raise Mistake(f"{', '.join(missing)} does not exist")
    CHECKS[words[0]](words[1:], command.inline)


def check_ours(words: Sequence[str], inline: bool) -> None:
    """Check a command of `dit-scale`: its arguments, and the configuration that it would read."""
    if not words or words in (["COMMAND", "--help"], ["--version"], ["--help"]):
        return
    _check_words(words)
    try:
        args = _read(lambda: cli._parse(words))
    except Mistake:
        if inline:  # arguments are left out
            return
        raise
    root = ROOTS.get(words[0])
    if root is None or getattr(args, "config", None) is None:
        return
    overrides = [text for text in args.overrides if "$" not in text]
    is_free = args.config.endswith("config.yaml") or args.config == "NAME"
    name = None if is_free else args.config
    if name is not None and name not in recipes.names() and not (ROOT / name).is_file():
        raise Mistake(f"no recipe {name}")
    try:
        load(root, name, overrides)
    except ConfigError as error:
        raise Mistake(str(error)) from error


def _check_words(words: Sequence[str]) -> None:
    """Raise Mistake for a command, action or option that does not exist."""
    if words[0] not in COMMANDS:
        raise Mistake(f"no command {words[0]}")
    parser: argparse.ArgumentParser = COMMANDS[words[0]]
    actions = parser._subparsers._group_actions[0].choices or {} if parser._subparsers else {}
    if actions and len(words) > 1 and not words[1].startswith("-"):
        if words[1] not in actions:
            raise Mistake(f"no action {words[1]} of {words[0]}")
        parser = dict(actions)[words[1]]
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    if unknown := [option for option in options if option not in parser._option_string_actions]:
        raise Mistake(f"no option {', '.join(unknown)} of {words[0]}")


def _read(parse: Callable[[], argparse.Namespace]) -> argparse.Namespace:
    try:
        return parse()
    except SystemExit as error:
        raise Mistake("the parser refuses it") from error


def check_deepspeed(words: Sequence[str], inline: bool) -> None:
    from deepspeed.launcher.runner import parse_args

    if not words:
        return
    args = _read(lambda: parse_args(list(words)))
    if (args.module, args.user_script, args.no_local_rank) != (True, "dit_scale.cli", True):
        raise Mistake("expected --no_local_rank --module dit_scale.cli")
    check_ours(args.user_args, inline)


def check_ray(words: Sequence[str], inline: bool) -> None:
    if words[:2] != ["job", "submit"] or (inline and len(words) == 2):
        return
    from click import ClickException
    from ray.dashboard.modules.job.cli import submit

    options, entry = words[2 : words.index("--")], words[words.index("--") + 1 :]
    try:
        submit.make_context("submit", [*options, "--", *entry])
    except ClickException as error:
        raise Mistake(error.format_message()) from error
    CHECKS[entry[0]](entry[1:], inline)


def check_sbatch(words: Sequence[str], inline: bool) -> None:
    """Check a job script and its arguments, which it passes on to one of our commands."""
    script = next((i for i, word in enumerate(words) if word.startswith("cluster/")), None)
    if script is None:
        if inline:
            return
        raise Mistake("expected a script in cluster/")
    arguments = list(words[script + 1 :])
    recipe = re.search(r"config=\$\{CONFIG:-(configs/.*)\}", (ROOT / words[script]).read_text())
    match words[script]:
        case "cluster/slurm_sample.sh":
            check_ours(["sample", *arguments], inline)
        case "cluster/slurm_encode_latents.sh" if recipe:
            named = [] if arguments[:1] == ["--config"] else ["--config", recipe[1]]
            check_ours(["encode", *named, *arguments], inline)
        case "cluster/slurm_train.sh":
            check_ours(["launch", *arguments], inline)
        case _ if recipe:
            check_ours(["launch", recipe[1], *arguments], inline)


def check_python(words: Sequence[str], inline: bool) -> None:
    """Check a script or a module, with its own parser."""
    if words[:2] == ["-m", "pytest"]:
        check_pytest(words[2:], inline)
    elif words[0] == "-m" and words[1].startswith(("benchmarks", "tests")):
        name = words[1]
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise Mistake(f"no module {name}")
        module = importlib.import_module(f"{name}.__main__" if spec.submodule_search_locations else name)
        _parse_only(module.main, words[1:])
    elif words[0] == "data_pipeline/encode_latents.py":
        check_ours(["encode", *words[1:]], inline)
    elif words[0].startswith("demo/"):
        _parse_only(lambda: runpy.run_path(str(ROOT / words[0]), run_name="__main__"), words)


def _parse_only(program: Callable[[], object], words: Sequence[str]) -> None:
    """Run a program until it has read its arguments."""
    parse_args = argparse.ArgumentParser.parse_args

    def read(parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> None:
        parse_args(parser)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", read)
        patch.setattr(sys, "argv", [*words])
        try:
            program()
        except Parsed:
            return
        except SystemExit as error:
            raise Mistake(f"the parser of {words[0]} refuses it") from error
    raise AssertionError(f"{words[0]} has read no arguments")


def check_pytest(words: Sequence[str], inline: bool) -> None:
    """Check that the files, the marker and a test with the wanted name exist."""
    parser = argparse.ArgumentParser()
    for option in ("-k", "-m", "-n", "-p"):
        parser.add_argument(option, default="")
    for flag in ("-s", "-q", "-x"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("paths", nargs="*", default=["tests"])
    args = _read(lambda: parser.parse_args(list(words)))
    markers = [text.partition(":")[0] for text in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    if args.m and args.m not in markers:
        raise Mistake(f"no marker {args.m}")
    names: set[str] = set()
    for text in args.paths:
        path, _, name = text.partition("::")
        if not (ROOT / path).exists():
            raise Mistake(f"{path} does not exist")
        own = _test_names(ROOT / path)
        if name and name not in own:
            raise Mistake(f"no test {name} in {path}")
        names |= own
    for word in re.findall(r"\w+", args.k):
        if word not in ("and", "or", "not") and not any(word in name for name in names):
            raise Mistake(f"no test with {word} in its name")


def _test_names(path: Path) -> set[str]:
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    trees = [ast.parse(file.read_text()) for file in files]
    return {file.name for file in files} | {
        node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)
    }


def check_make(words: Sequence[str], inline: bool) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    wanted = [word for word in words if "=" not in word and not word.startswith("-")]
    if unknown := set(wanted) - set(targets):
        raise Mistake(f"no target {', '.join(unknown)}")


def check_pip(words: Sequence[str], inline: bool) -> None:
    for word in words:
        if match := re.search(r"(?:dit-scale|\.)\[(.*)\]", word):
            extras = PROJECT["project"]["optional-dependencies"]
            if unknown := set(match[1].split(",")) - set(extras):
                raise Mistake(f"no extra {', '.join(unknown)}")


def check_files_only(words: Sequence[str], inline: bool) -> None:
    """`check` has already looked for the files of the project."""


CHECKS: dict[str, Callable[[Sequence[str], bool], None]] = {
    "dit-scale": check_ours,
    "deepspeed": check_deepspeed,
    "ray": check_ray,
    "sbatch": check_sbatch,
    "python": check_python,
    "pytest": check_pytest,
    "make": check_make,
    "pip": check_pip,
    "kubectl": check_files_only,
    "bash": check_files_only,
}
