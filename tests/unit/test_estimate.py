"""The estimate for a run on machines that fail, and `dit-scale plan`."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from dit_scale import cli
from dit_scale.forecast.estimate import (
    Machines,
    Work,
    best_every_steps,
    daly_goodput,
    daly_s,
    estimate,
    poisson_excess,
    sensitivities,
)
from dit_scale.forecast.timeline import Costs

CONFIG = str(Path(__file__).parents[2] / "configs" / "dit_xl2_256.yaml")
PLAN = ["plan", CONFIG, "--gpus", "64", "--images-per-s", "400", "--price", "2"]


@pytest.mark.parametrize(("mtbf_min", "best_min"), [(24 * 60, 117), (6 * 60, 57), (15, 9.1)])
def test_intervals_of_dalys_paper(mtbf_min: float, best_min: float) -> None:
    """From the captions of its figures 3 to 5; a dump takes 5 minutes."""
    assert daly_s(5.0, mtbf_min) == pytest.approx(best_min, rel=0.01)


def test_dalys_interval_at_its_ends() -> None:
    """Young's for saves that are short against the time between failures; that time itself for long ones."""
    assert daly_s(1e-6, 1e6) == pytest.approx(math.sqrt(2.0), rel=1e-5)
    assert daly_s(30.0, 15.0) == 15.0


@pytest.mark.parametrize("mtbf_s", [900.0, 21_600.0, 86_400.0])
def test_dalys_interval_is_the_best_of_his_model(mtbf_s: float) -> None:
    best = daly_s(300.0, mtbf_s)
    chosen = daly_goodput(best, 300.0, mtbf_s, 600.0)
    around = [daly_goodput(best * 1.01**i, 300.0, mtbf_s, 600.0) for i in range(-200, 201)]
    assert chosen == pytest.approx(max(around), rel=2e-3)


def test_without_failures_only_saves_cost() -> None:
    assert daly_goodput(98.0, 2.0, math.inf, 60.0) == 0.98
    calm = Machines(4, failures_per_1000_node_days=0.0)
    costs = Costs(save_stall_s=2.0, commit_lag_s=2.0)
    found = estimate(calm, Work(10**9, 98, costs))
    assert found.goodput == pytest.approx(0.98, abs=1e-6)
    assert found.failures == 0
    assert found.missing_nodes == 0


def test_a_run_that_makes_no_progress() -> None:
    assert daly_goodput(1e6, 1.0, 10.0, 1.0) == 0.0
    doomed = estimate(Machines(4, failures_per_1000_node_days=1e12), Work(10, 10, Costs()))
    assert doomed.goodput == 0
    assert doomed.wall_s == math.inf


@pytest.mark.parametrize(("mean", "spares"), [(0.5, 0), (2.0, 1), (3.0, 7)])
def test_nodes_beyond_the_spares(mean: float, spares: int) -> None:
    weights = [math.exp(-mean) * mean**k / math.factorial(k) for k in range(60)]
    over = sum(weight * max(0, k - spares) for k, weight in enumerate(weights))
    assert poisson_excess(mean, spares) == pytest.approx((over, sum(weights[spares:])))


def test_intervals_are_no_shorter_than_a_save() -> None:
    costs = Costs(step_s=0.5, save_stall_s=0.0, commit_lag_s=10.0)
    assert best_every_steps(Machines(1024), costs) == 20


def test_every_change_for_the_worse_costs_goodput() -> None:
    machines = Machines(1024, spares=11)
    rows = sensitivities(machines, Work(10**6, best_every_steps(machines, Costs()), Costs()))
    asked = rows.pop("as asked").goodput
    for name in ("spares 1 %", "spares 2 %"):
        assert rows.pop(name).goodput >= asked
    assert [name for name, row in rows.items() if row.goodput >= asked] == []


def test_1024_nodes_reach_98_percent() -> None:
    machines = Machines(1024, spares=11)
    work = Work(10**6, best_every_steps(machines, Costs()), Costs())
    assert machines.mtbf_s == pytest.approx(86400 / 6.656)
    assert estimate(machines, work).goodput > 0.98
    for costs in (replace(Costs(), init_s=200.0), replace(Costs(), commit_lag_s=200.0)):
        assert estimate(machines, replace(work, every_steps=200, costs=costs)).goodput < 0.98


def test_plan_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*PLAN, "--simulate", "1"]) == 0
    printed = capsys.readouterr().out
    for words in ("64 GPUs on 8 nodes", "restart time x 2", "spares 2 %", "cost", "checkpoint "):
        assert words in printed
    assert "with checkpoint.every_steps=5000 of the configuration: goodput" in printed


def test_plan_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*PLAN, "--spares", "1", "--simulate", "0.5", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    # 256 images on 64 GPUs at 400 images/s.
    assert tree["work"]["costs"]["step_s"] == 0.01
    asked = tree["estimates"]["as asked"]
    assert asked["gpu_hours"] == pytest.approx(asked["days"] * 24 * 72)
    assert asked["cost"] == 2 * asked["gpu_hours"]
    assert 0.99 < tree["simulated"]["goodput"] < 1
    ledger_s = tree["simulated"]["ledger_s"]
    assert sum(ledger_s.values()) == pytest.approx(tree["simulated"]["days"] * 86400)


def test_plan_takes_the_fastest_row_of_the_benchmark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"model": "DiT-XL/2", "image_size": 256, "images_per_s": 200.0},
        {"model": "DiT-XL/2", "image_size": 256, "images_per_s": 400.0},
        {"model": "DiT-XL/2", "image_size": 256, "problem": "out of memory"},
        {"model": "DiT-XL/2", "image_size": 512, "images_per_s": 9000.0},
    ]
    path = tmp_path / "rows.jsonl"
    torn = '{"model": "DiT-XL/2", "image_size": 256, "images_per'
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + torn)
    assert cli.main(["plan", CONFIG, "--gpus", "64", "--speed-from", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["work"]["costs"]["step_s"] == 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "60", "--images-per-s", "1"], "a multiple of --gpus-per-node 8"),
        (["--gpus", "8192", "--images-per-s", "1"], "expected at most global_batch=256, one sample per GPU"),
        (
            ["--gpus", "8", "--images-per-s", "1", "--crash", "0.9", "--hang", "0.2"],
            "expected a sum of at most 1",
        ),
        (["--gpus", "8", "--speed-from", "/nowhere"], "expected the output of `train_step.py --json`"),
        (["--gpus", "8", "--speed-from", CONFIG], "with images_per_s of DiT-XL/2 at 256 pixels, found none"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", CONFIG, *arguments]) == 2
    assert message in capsys.readouterr().err
