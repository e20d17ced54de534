"""The campaign in short: some kills at one ZeRO stage, and a check that it would notice a difference."""

import ast
import random
from dataclasses import replace
from pathlib import Path

import pytest

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import EMA
from dit_scale.config import TrainConfig
from dit_scale.train.run_folder import root_of
from tests.chaos import stacks
from tests.chaos.campaign import config_of, new_stage, run_stage
from tests.chaos.report import Campaign, StageResult, as_text, histogram
from tests.support.needs import needs
from tests.support.ranks import jobs, record

ROOT = Path(__file__).parents[2]
KILLS, SEED = 6, 37
"""With this seed every way to choose a moment occurs."""


@pytest.mark.dist
@pytest.mark.long
def test_a_run_killed_at_random_gives_the_same_bits(tmp_path: Path) -> None:
    reason = stacks.why_not()
    needs(not reason, reason)
    result = new_stage(2, KILLS)
    run_stage(result, random.Random(SEED), tmp_path / "stage2", print)
    assert result.problems == []
    assert len(result.kills) == sum(histogram(result.kills).values()) == KILLS
    assert {kill.section for kill in result.kills + result.kills_at_start} <= {*stacks.SECTIONS}
    assert all(kill.step > kill.resumed_step >= 0 for kill in result.kills)
    assert result.rows_compared == result.steps
    campaign = Campaign(SEED, [result])
    print(as_text(campaign))
    assert not replace(campaign, stages=[replace(result, problems=["a row differs"])]).passed
    check_that_a_bit_is_seen(tmp_path / "stage2", result)


def check_that_a_bit_is_seen(folder: Path, result: StageResult) -> None:
    """Change the last bit of a rank's files in the killed run."""
    straight, killed = (config_of(folder, name, result) for name in ("straight", "killed"))
    root = root_of(killed)
    for path in (committed(root)[0].path(), *(average.path(EMA) for average in committed(root, EMA))):
        data = root.read(f"{path}/rank-00001.safetensors")
        root.write(f"{path}/rank-00001.safetensors", data[:-1] + bytes([data[-1] ^ 1]))
    assert record.differences_at_the_end(killed, straight) == ["the last file of rank 1 differs"]
    assert len(record.compare_averages(killed, straight)[1]) == result.averages_compared


@pytest.mark.parametrize(
    ("functions", "section"),
    [
        (("distributed_c10d.py:all_reduce", "engine.py:backward", "loop.py:train"), "reduce"),
        (("graph.py:_engine_run_backward", "engine.py:backward", "loop.py:train"), "backward"),
        (("distributed_c10d.py:all_reduce", "trainer.py:update", "loop.py:train"), "between these"),
        (("dist.py:result", "saver.py:wait", "loop.py:train"), "waiting for the last save"),
        (("dist.py:result", "loop.py:train"), "vote"),
        (("saver.py:begin", "saving.py:_start", "saving.py:save_and_wait"), "starting a save"),
        (("saving.py:is_due", "loop.py:train"), "between these"),
        ((), "unknown"),
    ],
)
def test_stacks_map_to_sections(functions: tuple[str, ...], section: str) -> None:
    folders = {
        "dist.py": "dit_scale/",
        "distributed_c10d.py": "torch/distributed/",
        "graph.py": "torch/",
        "saver.py": "dit_scale/checkpoint/",
    }
    stack = tuple(f"/x/{folders.get(f.split(':')[0], 'dit_scale/train/')}{f}" for f in functions)
    assert stacks.section_of(stack, stacks.RANK_SECTIONS) == section


def test_sections_name_existing_functions() -> None:
    frames = [frame for rule in stacks.RANK_SECTIONS + stacks.WRITER_SECTIONS for frame in rule[1:]]
    named = [frame.split(":") for frame in frames if frame.startswith(("dit_scale/", "tests/"))]
    for path, function in named:
        tree = ast.parse((ROOT / path).read_text())
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, path
    assert len(named) == len(frames) - 3  # the others name frames of torch, of Python, and any frame


def test_a_different_row_is_detected(tmp_path: Path) -> None:
    def written(name: str, text: str) -> TrainConfig:
        config = jobs.small_config(tmp_path / name, tmp_path)
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(text)
        return config

    line = '{{"step": {}, "loss": {}, "images_per_s": {}}}\n'.format
    wanted = record.rows(written("straight", line(1, 0.5, 7) + line(2, 0.25, 8)))
    assert record.first_difference(record.rows(written("torn", line(1, 0.5, 9) + '{"step": 2')), wanted) == ""
    other = record.rows(written("other", line(1, 0.5, 9) + line(2, 0.2500001, 8)))
    assert record.first_difference(other, wanted).startswith("row 2 is")
    gap = record.rows(written("gap", line(2, 0.25, 8)))
    assert record.first_difference(gap, wanted).startswith("row 1 is")
    assert record.first_difference([*wanted, *wanted], wanted) == "4 rows, expected 2 at most"
