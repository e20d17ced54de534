"""Conducts a study: trains one run after another, scores its samples, and continues after any interruption.

<folder>/study.json     what all runs share, sealed; written first
<folder>/configs/       one training configuration per run
<folder>/runs/          the run folders
<folder>/logs/          what each run printed
<folder>/samples/       samples and scores by run and denoising steps
<folder>/results.json   the results, see `results`
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_scale.config import TrainConfig, dump
from dit_scale.errors import ConfigError
from dit_scale.lines import Say, read_objects
from dit_scale.scaling.config import StudyConfig, StudyRun, runs_of
from dit_scale.scaling.processes import command_line, last_lines, run_command
from dit_scale.scaling.results import is_trained
from dit_scale.scaling.samples import score_samples
from dit_scale.sealed import sealed, unseal
from dit_scale.signals import REQUEUE_EXIT_CODE, StopRequest
from dit_scale.storage.outputs import new_file
from dit_scale.trees import flat

STUDY = "study.json"
FORMAT, VERSION = "dit-scale scaling study", 1
SHARED_KEYS = ("seed", "steps", "global_batch")
SHARED_SECTIONS = ("diffusion", "optimizer", "ema", "guard")
SHARED_DATA_KEYS = ("url", "horizontal_flip", "window_shards")
SHARED_EVALUATE_KEYS = ("held_out", "seed")
"""They decide which samples training sees; the other keys of `evaluate` only measure."""
SHARED_MODEL_KEYS = ("image_size", "num_classes")
SAY_EVERY_S = 10.0


class Conductor:
    """Runs what is missing of a study, run by run, the cheapest first."""

    def __init__(self, study: StudyConfig, stop: StopRequest, say: Say) -> None:
        self._study, self._stop, self._say = study, stop, say
        self.failed: list[str] = []
        """Names of the runs that failed."""

    def conduct(self) -> int:
        """Complete the study and return the exit code.

        0: complete; 1: at least one run failed; 75: stopped on request. Raises ConfigError if the folder
        belongs to another study.
        """
        claim_folder(self._study)
        runs = sorted(runs_of(self._study), key=lambda run: (run.training_flops, run.name))
        for number, run in enumerate(runs, 1):
            if self._stop.wanted:
                break
            where = f"[{number}/{len(runs)}] {run.name}"
            if not (self._train(run, where) and self._score(run, where)) and not self._stop.wanted:
                self.failed.append(run.name)
        if self._stop.wanted:
            self._say("stopped on request; the same command continues the study")
            return REQUEUE_EXIT_CODE
        return 1 if self.failed else 0

    def _train(self, run: StudyRun, where: str) -> bool:
        if is_trained(run):
            self._say(f"{where}: trained already")
            return True
        self._say(f"{where}: training, {run.parameters:,} parameters, {run.training_flops:.3g} FLOP")
        config, log = write_config(self._study, run), _log(self._study, run)
        command = command_line(training_command(self._study, config))
        code = run_command(command, log, self._stop, Progress(run.config, where, self._say))
        return self._is_good(code, where, log)

    def _score(self, run: StudyRun, where: str) -> bool:
        log = _log(self._study, run)

        def command(arguments: Sequence[str]) -> int:
            self._say(f"{where}: dit-scale {' '.join(arguments)}")
            return run_command(command_line(arguments, self._study.processes), log, self._stop)

        for steps in self._study.evaluation.all_steps:
            if self._stop.wanted:
                return False
            code = score_samples(self._study, run, steps, command)
            if not self._is_good(code, f"{where}: {steps} denoising steps", log):
                return False
        return True

    def _is_good(self, code: int, where: str, log: Path) -> bool:
        if code and not self._stop.wanted:
            self._say(f"{where}: FAILED with exit code {code}; {log} ends with\n{last_lines(log)}")
        return code == 0


class Progress:
    """Shows the newest line of a run's record, at most every few seconds."""

    def __init__(self, config: TrainConfig, where: str, say: Say) -> None:
        self._config, self._where, self._say = config, where, say
        self._said_s, self._said_step = time.monotonic(), 0

    def __call__(self) -> None:
        """Show the newest line, if it is new and enough time has passed."""
        if time.monotonic() - self._said_s < SAY_EVERY_S:
            return
        rows = read_objects(Path(self._config.run) / "metrics.jsonl", "step", "loss")
        if rows and rows[-1]["step"] != self._said_step and rows[-1]["loss"] is not None:
            self._said_s, self._said_step = time.monotonic(), rows[-1]["step"]
            self._say(
                f"{self._where}: step {self._said_step}/{self._config.steps}, loss {rows[-1]['loss']:.4f}"
            )


def training_command(study: StudyConfig, config: Path) -> list[str]:
    """Return the arguments of `dit-scale` that train a run from its configuration file."""
    if study.processes == 1:
        return ["train", str(config)]
    return ["launch", str(config), "--slots", str(study.processes)]


def config_path(study: StudyConfig, run: StudyRun) -> Path:
    """Return the path of a run's configuration file."""
    return Path(study.folder) / "configs" / f"{run.name}.yaml"


def write_config(study: StudyConfig, run: StudyRun) -> Path:
    """Write the training configuration of a run and return its path."""
    path = config_path(study, run)
    with new_file(path) as tmp:
        tmp.write_text(dump(run.config))
    return path


def claim_folder(study: StudyConfig) -> None:
    """Write into the folder what all runs share. Raises ConfigError like `check_folder`."""
    check_folder(study)
    with new_file(Path(study.folder) / STUDY) as tmp:
        tmp.write_bytes(sealed(_identity(study), indent=2))


def check_folder(study: StudyConfig) -> None:
    """Raise ConfigError, naming the keys that differ, if the folder belongs to another study."""
    path = Path(study.folder) / STUDY
    if not path.is_file():
        return
    before, now = flat(unseal(path.read_bytes(), str(path), ConfigError)), flat(_identity(study))
    # A key that the file lacks came with a later version, and changes nothing of what was done before.
    changed = [
        f"{key} was {_text(before[key])}, is {_text(now.get(key))}"
        for key in before
        if before[key] != now.get(key)
        if not key.startswith("evaluation.") or before["evaluation.network"]  # scores may come later
    ]
    if changed:
        raise ConfigError(
            f"{study.folder} holds another study: {'; '.join(changed)}. Restore these values to continue it, "
            "or choose another folder=FOLDER"
        )


def _identity(study: StudyConfig) -> dict[str, Any]:
    """Return what must be the same for all runs of a study, so that they can be compared."""
    train = study.train.model_dump(mode="json")
    return {
        "format": FORMAT,
        "version": VERSION,
        "train": {
            **{key: train[key] for key in (*SHARED_KEYS, *SHARED_SECTIONS)},
            "data": {key: train["data"][key] for key in SHARED_DATA_KEYS},
            "evaluate": {key: train["evaluate"][key] for key in SHARED_EVALUATE_KEYS},
            "model": {key: train["model"][key] for key in SHARED_MODEL_KEYS},
        },
        "evaluation": study.evaluation.model_dump(mode="json", exclude={"sampling_steps"}),
    }


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _log(study: StudyConfig, run: StudyRun) -> Path:
    return Path(study.folder) / "logs" / f"{run.name}.log"
