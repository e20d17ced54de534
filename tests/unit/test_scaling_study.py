"""The conductor of a study: its folder, its commands, failed runs and requests to stop."""

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dit_scale import cli
from dit_scale.config import TrainConfig, load
from dit_scale.errors import ConfigError, DataError
from dit_scale.evaluate.scorecard import CARD, FORMAT, VERSION, write_card
from dit_scale.scaling import study as study_module
from dit_scale.scaling.config import StudyConfig, StudyRun, runs_of
from dit_scale.scaling.processes import command_line, run_command
from dit_scale.scaling.results import FRECHET, HELD_OUT, LOSS, WATCHED, final_value, read_results
from dit_scale.scaling.samples import folder_of, frechet_of, score_samples
from dit_scale.scaling.study import Conductor, claim_folder, training_command
from dit_scale.signals import REQUEUE_EXIT_CODE, StopRequest


class Request(StopRequest):
    """A request to stop that a test makes, without signals."""

    def __init__(self, wanted: bool = False) -> None:
        self.wanted = wanted


def tiny(folder: Path, *overrides: str) -> StudyConfig:
    """Two models and two designs; the fourth run costs most."""
    return load(
        StudyConfig,
        None,
        [
            f"folder={folder}",
            "models=DiT-Nano/4,DiT-Nano/2",
            "conditionings=adaln_zero,in_context",
            "train.model.image_size=32",
            "train.steps=4",
            *overrides,
        ],
    )


class Machine:
    """Pretends to run commands; runs whose name contains `broken` fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, broken: str = "-") -> None:
        self.trained: list[str] = []
        self._broken = broken
        monkeypatch.setattr(study_module, "run_command", self.run)
        monkeypatch.setattr(study_module, "is_trained", lambda run: run.name in self.trained)

    def run(
        self, command: Sequence[str], log: Path, stop: StopRequest, tick: Callable[[], None] = lambda: None
    ) -> int:
        name = load(TrainConfig, command[-1]).run.rpartition("/")[2]
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("first\nthe disk is full\n")
        tick()
        if self._broken in name:
            return 2
        self.trained.append(name)
        return 0


BROKEN = "in_context"
SCORED = "evaluation={network: 'classifier:F', reference: real}"


def test_runs_are_trained_once_and_the_cheapest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, said = Machine(monkeypatch, broken="nothing"), []
    for _ in range(2):
        assert Conductor(tiny(tmp_path), Request(), said.append).conduct() == 0
    costs = {run.name: run.training_flops for run in runs_of(tiny(tmp_path))}
    assert machine.trained == sorted(costs, key=lambda name: costs[name])
    assert [line for line in said if "trained already" in line] == [
        f"[{number}/4] {name}: trained already" for number, name in enumerate(machine.trained, 1)
    ]


def test_a_failed_run_is_named_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, said = Machine(monkeypatch, BROKEN), []
    conductor = Conductor(tiny(tmp_path), Request(), said.append)
    assert conductor.conduct() == 1
    assert sorted(conductor.failed) == ["DiT-Nano-2-in_context", "DiT-Nano-4-in_context"]
    assert len(machine.trained) == 2
    failures = [line for line in said if "FAILED" in line]
    assert all("exit code 2" in line and line.endswith("first\nthe disk is full") for line in failures)
    assert len(failures) == 2


def test_a_request_to_stop_starts_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine, said = Machine(monkeypatch), []
    assert Conductor(tiny(tmp_path), Request(wanted=True), said.append).conduct() == REQUEUE_EXIT_CODE
    assert machine.trained == []
    assert said == ["stopped on request; the same command continues the study"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps=5", "train.steps was 4, is 5"),
        ("train.optimizer.lr=1", "train.optimizer.lr was 0.0001, is 1.0"),
        ("train.evaluate.held_out=0.1", "train.evaluate.held_out was 0.0, is 0.1"),
        ("train.model.num_classes=3", "train.model.num_classes was 1000, is 3"),
        ("evaluation.images=7", "evaluation.images was 10000, is 7"),
        ("evaluation={}", 'evaluation.network was classifier:F, is ""; evaluation.reference was real, is ""'),
    ],
)
def test_the_folder_of_another_study_is_refused(tmp_path: Path, override: str, said: str) -> None:
    claim_folder(tiny(tmp_path, SCORED))
    with pytest.raises(ConfigError, match=f"holds another study: {said}. Restore"):
        claim_folder(tiny(tmp_path, SCORED, override))


@pytest.mark.parametrize(
    "override", ["models=DiT-Ti/4", "processes=2", "train.log.every_steps=1", "evaluation.images=7", SCORED]
)
def test_a_study_may_grow_and_change_what_results_do_not_depend_on(tmp_path: Path, override: str) -> None:
    claim_folder(tiny(tmp_path))
    claim_folder(tiny(tmp_path, override))


def test_several_processes_are_supervised(tmp_path: Path) -> None:
    path = tmp_path / "one.yaml"
    assert training_command(tiny(tmp_path), path) == ["train", str(path)]
    several = training_command(tiny(tmp_path, "processes=3"), path)
    assert several == ["launch", str(path), "--slots", "3"]
    assert command_line(["sample"], 3)[-5:] == ["--num_gpus", "3", "--module", "dit_scale.cli", "sample"]


# Results


def record(run: StudyRun, losses: Sequence[float | None]) -> None:
    folder = Path(run.config.run)
    folder.mkdir(parents=True)
    rows = [{"step": i, "loss": loss} for i, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_an_unfinished_run_has_a_curve_and_no_final_value(tmp_path: Path) -> None:
    study = tiny(tmp_path)
    record(next(runs_of(study)), [0.5, None, 0.25])
    first, second, *_ = read_results(study)
    assert first.curves == {LOSS: ((256, 0.5), (768, 0.25))}
    assert (first.images, first.finished, first.metrics) == (768, False, {})
    assert first.training_flops == pytest.approx(6e9 * first.gmacs * 768)
    assert (second.images, second.curves) == (0, {})


def test_the_final_value_is_the_mean_of_the_last_tenth() -> None:
    assert final_value([(i, float(i)) for i in range(10, 201, 10)]) == 195.0  # type: ignore[arg-type]
    assert final_value(((100, 3.0), (200, 1.0))) == 1.0


# Samples and scores


def test_samples_are_scored_by_commands_that_exist(tmp_path: Path) -> None:
    spec = "evaluation={network: 'classifier:F', reference: real, images: 50, sampler: dpmpp_2m, steps: 20}"
    study = tiny(tmp_path, spec, "evaluation.sampling_steps=5,10")
    run, asked = next(runs_of(study)), []

    def command(arguments: Sequence[str]) -> int:
        asked.append(cli._parse(arguments))
        return 0

    assert study.evaluation.all_steps == (5, 10, 20)
    assert score_samples(study, run, 20, command) == 0
    sample, evaluate = asked
    assert (sample.source, sample.images, sample.steps, sample.guidance) == (run.config.run, 50, "20", 1.0)
    assert (sample.sampler, sample.out) == ("dpmpp_2m", str(folder_of(study, run, 20)))
    assert (evaluate.source, evaluate.network) == (sample.out, ["classifier:F"])
    assert (evaluate.reference, evaluate.metrics) == ("real", ("frechet",))


def test_a_failed_sample_is_not_scored(tmp_path: Path) -> None:
    asked: list[str] = []

    def command(arguments: Sequence[str]) -> int:
        asked.append(arguments[0])
        return 2

    study = tiny(tmp_path)
    assert score_samples(study, next(runs_of(study)), 20, command) == 2
    assert asked == ["sample"]


def test_the_score_is_read_from_the_score_card(tmp_path: Path) -> None:
    study = tiny(tmp_path, "evaluation={network: 'classifier:F', reference: real, guidance: 1.5}")
    run = next(runs_of(study))
    assert frechet_of(study, run, 250) is None
    write_score(folder_of(study, run, 250), [{"metric": "KID", "value": 1.0}, {"metric": "FD", "value": 2.5}])
    assert frechet_of(study, run, 250) == 2.5
    assert score_samples(study, run, 250, lambda arguments: 1) == 0  # nothing left to do
    result = read_results(study)[0]
    assert result.metrics == {FRECHET: 2.5}
    # Guidance doubles the cost of a step.
    (score,) = result.sampling
    assert (score.steps, score.gflops_per_image) == (250, pytest.approx(run.gmacs * 2 * 250 * 2))
    write_score(folder_of(study, run, 250), [{"metric": "KID", "value": 1.0}])
    with pytest.raises(DataError, match="has no Frechet distance; remove it"):
        frechet_of(study, run, 250)


def write_score(folder: Path, results: list[dict[str, object]]) -> None:
    write_card({"format": FORMAT, "version": VERSION, "results": results}, folder / CARD)


def test_evaluations_during_training_are_metrics_too(tmp_path: Path) -> None:
    study = tiny(tmp_path)
    folder = Path(next(runs_of(study)).config.run)
    folder.mkdir(parents=True)
    rows = [
        {"step": 0, "eval_loss_ema.paper": 1.0, "eval_frechet": 90.0},
        {"step": 1, "loss": 0.5},
        {"step": 2, "eval_loss_ema.paper": 0.75, "eval_frechet": 30.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    curves = read_results(study)[0].curves
    assert curves == {LOSS: ((256, 0.5),), HELD_OUT: ((512, 0.75),), WATCHED: ((512, 30.0),)}


# Child processes


def test_a_command_is_logged_and_returns_its_exit_code(tmp_path: Path) -> None:
    log = tmp_path / "logs/one.log"
    assert run_command(command_line(["--version"]), log, Request()) == 0
    assert run_command(command_line(["trian"]), log, Request()) == 2
    assert "did you mean 'train'?" in log.read_text()
    assert log.read_text().startswith("dit-scale ")


def test_a_request_to_stop_reaches_the_command(tmp_path: Path) -> None:
    stop = Request()

    def ask() -> None:
        stop.wanted = True

    watched = ["status", str(tmp_path), "--watch", "--json"]
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    assert run_command(command_line(watched), tmp_path / "log", stop, ask) == -signal.SIGTERM


# The command line


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["scaling", *arguments]) == cli.USER_ERROR_EXIT_CODE
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err


def test_a_study_or_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected either a study" in refused(capsys)
    assert "expected either a study" in refused(capsys, "scaling_digits", "--paper")
    assert "--out is for --paper" in refused(capsys, "scaling_digits", "--out", "x")
    assert "did you mean 'scaling_digits'" in refused(capsys, "scaling_digit")
    assert "unknown key 'modles'; did you mean 'models'" in refused(capsys, "scaling_digits", "modles=1")


def test_the_papers_table_needs_no_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scaling", "--paper"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("DiT-XL/2") == 4
    assert "12 runs; correlation with log GMACs -0.93" in printed


def test_a_dry_run_prints_costs_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["scaling", "scaling_digits", "--dry-run", f"folder={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    commands = [line for line in printed.splitlines() if line.startswith("dit-scale train ")]
    assert len(commands) == 7
    config = load(TrainConfig, commands[0].split()[2])
    assert (config.model.name, config.model.conditioning) == ("DiT-Nano/4", "adaln_zero")
    assert config.run == f"{tmp_path}/runs/DiT-Nano-4-adaln_zero"


def test_without_matplotlib_there_is_still_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_scale.scaling.canvas.is_available", lambda: False)
    assert cli.main(["scaling", "--paper", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "figures need matplotlib: pip install 'dit-scale[plots]'" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    tree = json.loads((tmp_path / "results.json").read_text())
    assert (len(tree["runs"]), tree["fits"][0]["law"]["points"]) == (15, 12)
