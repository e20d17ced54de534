"""The configuration of a study: its runs, their costs, and the mistakes that it refuses."""

from pathlib import Path

import pytest

from dit_scale.config import load
from dit_scale.errors import ConfigError
from dit_scale.models.zoo import PAPER_GMACS
from dit_scale.scaling import paper
from dit_scale.scaling.config import StudyConfig, runs_of, sampling_gflops


def test_the_papers_study_has_its_fifteen_runs() -> None:
    study = load(StudyConfig, "scaling_paper")
    runs = list(runs_of(study))
    assert [(run.shape.name, run.shape.conditioning) for run in runs[:12]] == list(paper.FID)[:12]
    assert {(run.shape.name, run.shape.conditioning) for run in runs} == set(paper.FID)
    for run in runs:
        assert run.images == paper.STEPS * paper.GLOBAL_BATCH
        published = PAPER_GMACS[run.shape.name, paper.IMAGE_SIZE, run.shape.conditioning]
        assert run.gmacs == pytest.approx(published, abs=0.021)
        # Forward and backward cost three forward passes, a multiply-add is two operations.
        assert run.training_flops == pytest.approx(6 * run.gmacs * 1e9 * 400_000 * 256)


def test_a_step_of_xl2_costs_what_is_known_of_it() -> None:
    study = load(StudyConfig, "scaling_paper", ["train.steps=1", "train.global_batch=1"])
    largest = next(run for run in runs_of(study) if run.name == "DiT-XL-2-adaln_zero")
    assert round(largest.training_flops / 1e9, 2) == 711.73
    assert round(sampling_gflops(largest.gmacs, steps=1, guided=False), 3) == 237.243
    assert sampling_gflops(largest.gmacs, steps=250, guided=True) == pytest.approx(500 * 237.243, rel=1e-5)


def test_each_run_has_its_own_folder_and_storage(tmp_path: Path) -> None:
    study = load(
        StudyConfig,
        None,
        [
            f"folder={tmp_path}",
            "models=DiT-S/2,DiT-B/2",
            "conditionings=adaln,in_context",
            "train.checkpoint.url=s3://bucket/study",
        ],
    )
    runs = list(runs_of(study))
    assert [run.name for run in runs] == [
        "DiT-S-2-adaln",
        "DiT-S-2-in_context",
        "DiT-B-2-adaln",
        "DiT-B-2-in_context",
    ]
    assert runs[1].config.run == f"{tmp_path}/runs/DiT-S-2-in_context"
    assert runs[1].config.checkpoint.url == "s3://bucket/study/DiT-S-2-in_context"
    assert (runs[1].config.model.name, runs[1].config.model.conditioning) == ("DiT-S/2", "in_context")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("models=DiT-LX/2", r"models: unknown model 'DiT-LX/2'; did you mean 'DiT-L/2'\?"),
        ("models=XL/2", r"unknown model 'XL/2'; did you mean 'DiT-XL/2'\?"),
        ("all_conditionings_of=DiT-BB/4", r"unknown model 'DiT-BB/4'; did you mean 'DiT-B/4'\?"),
        (
            "conditionings=adaln_zeros",
            r"conditionings: unknown conditioning design 'adaln_zeros'; did you mean 'adaln_zero'\?",
        ),
        ("models=DiT-B/x", "unknown model 'DiT-B/x'; expected SIZE/PATCH"),
        ("models=DiT-B/7", "image_size 256 does not fit DiT-B/7: expected a multiple of 56"),
        ("models=DiT-B/4,DiT-B/4", "expected each name once"),
        ("models=[]", "expected at least one model"),
        ("train.model.name=DiT-B/4", "train: the study sets name of each run itself; remove it"),
        ("train.run=x", "train: the study sets run of each run itself"),
        (
            "train.optimizer.rate=1",
            r"unknown key 'train.optimizer.rate'; did you mean 'train.optimizer.lr'\?",
        ),
        ("evaluation={network: 'inception:x'}", "expected both network and reference, or neither"),
    ],
)
def test_mistakes(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(StudyConfig, "scaling_paper", [override])
