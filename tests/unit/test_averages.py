"""EMA profiles across restarts: late ones are reported, another width is refused, and neither is mixed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_scale import cli
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, CheckpointId
from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import EmaProfile, TrainConfig, dump
from dit_scale.errors import ConfigError
from dit_scale.inference.sources import open_source
from dit_scale.inference.stored_averages import stored_averages
from dit_scale.storage import Storage, open_storage
from dit_scale.train.averages import foreign_share, restored_kinds, since_steps
from dit_scale.train.ema import Ema, decay_at, ema_kind
from tests.support import checkpoints

SIZE = 6
NARROW, WIDE = EmaProfile(name="narrow", sigma_rel=0.05), EmaProfile(name="wide", sigma_rel=0.1)
CONSTANT = EmaProfile(name="constant", decay=0.9)
PROFILES = st.builds(lambda width: EmaProfile(name="x", sigma_rel=width), st.floats(0.03, 0.28)) | st.builds(
    lambda decay: EmaProfile(name="x", decay=decay), st.floats(0.5, 0.999)
)


@given(PROFILES, st.integers(1, 50), st.integers(0, 50))
def test_the_foreign_share_is_the_product_of_all_decays(
    profile: EmaProfile, since_step: int, more: int
) -> None:
    left = 1.0
    for step in range(since_step + 1, since_step + more + 1):
        left *= decay_at(profile, step)
    assert foreign_share(profile, since_step, since_step + more) == pytest.approx(left, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("profile", [NARROW, WIDE, CONSTANT])
def test_a_late_average_is_off_by_its_foreign_share(profile: EmaProfile) -> None:
    """Compare with the average over the complete past, which starts at step 0."""
    masters = torch.zeros(SIZE, dtype=torch.float64)
    owned = tuple(Partition({MASTER: masters}, ()) for _ in range(2))
    complete, late = (Ema((profile,), (partition,)) for partition in owned)
    averages = [partition.buffers[ema_kind(profile.name)] for partition in owned]
    generator = torch.Generator().manual_seed(0)
    complete.start()
    for step in range(1, 61):
        masters += torch.randn(SIZE, generator=generator, dtype=torch.float64)
        complete.update(step)
        if step == 40:
            late.start()
            offset_at_start = averages[1] - averages[0]
        elif step > 40:
            late.update(step)
    assert torch.allclose(
        averages[1] - averages[0], foreign_share(profile, 40, 60) * offset_at_start, rtol=1e-6
    )


# Across a restart


def config_of(*profiles: EmaProfile, run: Path | None = None) -> TrainConfig:
    model = {"name": "DiT-Nano/2", "image_size": 32, "num_classes": 10}
    return TrainConfig.model_validate({"run": str(run), "model": model, "ema": profiles})


def write(root: Storage, folder: str, step: int, *profiles: EmaProfile, **fields: Any) -> Checkpoint:
    """Write a checkpoint with the averages of these profiles."""
    buffers = {ema_kind(profile.name): torch.full((SIZE,), float(step)) for profile in profiles}
    checkpoint_id = CheckpointId(step, 1)
    config = config_of(*profiles).model_dump(mode="json")
    owned = [Partition(buffers, (ParameterSlice("w", 0, SIZE, 0),))]
    checkpoints.write(root, checkpoint_id, [owned], folder, config=config, **fields)
    return Checkpoint(root, checkpoint_id, folder)


def test_the_step_since_which_each_average_is_tracked(tmp_path: Path) -> None:
    root = open_storage(tmp_path)
    assert since_steps((NARROW, CONSTANT), None) == {"narrow": 0, "constant": 0}
    found = write(root, CHECKPOINTS, 40, NARROW, CONSTANT, ema_since={"narrow": 0, "constant": 7, "gone": 3})
    assert since_steps((NARROW, CONSTANT), found) == {"narrow": 0, "constant": 7}
    assert since_steps((NARROW, WIDE), found) == {"narrow": 0, "wide": 40}
    silent = write(root, CHECKPOINTS, 50, NARROW)
    assert since_steps((NARROW, WIDE), silent) == {"wide": 50}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (
            EmaProfile(name="narrow", sigma_rel=0.1),
            "has sigma_rel 0.1, but sigma_rel 0.05 in .*: resuming would mix",
        ),
        (
            EmaProfile(name="narrow", decay=0.9),
            "has decay 0.9, but .*; it starts from the weights of that step",
        ),
    ],
)
def test_another_width_under_the_same_name_is_refused(tmp_path: Path, now: EmaProfile, said: str) -> None:
    found = write(open_storage(tmp_path), CHECKPOINTS, 40, CONSTANT, NARROW)
    with pytest.raises(ConfigError, match=rf"the ema profile 'narrow' {said}"):
        restored_kinds(config_of(CONSTANT, now), found, print)


def test_another_order_or_a_new_name_is_no_other_width(tmp_path: Path) -> None:
    found, notes = write(open_storage(tmp_path), CHECKPOINTS, 40, CONSTANT, NARROW), list[str]()
    assert restored_kinds(config_of(NARROW, CONSTANT), found, notes.append) == (
        ["ema.narrow", "ema.constant"],
        [],
    )
    assert notes == []
    renamed = config_of(CONSTANT, EmaProfile(name="new", sigma_rel=0.1))
    assert restored_kinds(renamed, found, notes.append) == (["ema.constant"], ["ema.new"])
    assert len(notes) == 2


def test_a_sample_reports_a_late_average(tmp_path: Path) -> None:
    root = open_storage(tmp_path)
    root.write("config.yaml", dump(config_of(WIDE, NARROW)).encode())
    found = write(root, CHECKPOINTS, 50, WIDE, NARROW, ema_since={"wide": 40, "narrow": 10})
    late, negligible = (open_source(str(tmp_path), name).description for name in ("wide", "narrow"))
    share = foreign_share(WIDE, 40, 50)
    assert late == (
        f"EMA wide of {found} (tracked only since step 40: {share:.1%} of it is still what it started from)"
    )
    assert negligible == f"EMA narrow of {found}"


# Out of a run's files


def listed(run: Path, capsys: pytest.CaptureFixture[str]) -> dict[tuple[str, int], tuple[int, bool]]:
    """Return (profile, step) => (tracked since, whether it has a flaw)."""
    assert cli.main(["ema", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    return {(row["profile"], row["step"]): (row["since_step"], bool(row["flaw"])) for row in rows}


def test_averages_whose_start_the_checkpoints_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = open_storage(tmp_path)
    root.write("config.yaml", dump(config_of(NARROW, WIDE, run=tmp_path)).encode())
    since = {"narrow": 0, "wide": 30}
    write(root, EMA, 20, NARROW, ema_since={"narrow": 0})
    for step in (40, 60, 80):
        write(root, EMA, step, NARROW, WIDE, ema_since=since)
    assert listed(tmp_path, capsys) == {
        ("narrow", 20): (0, False),
        **{("narrow", step): (0, False) for step in (40, 60, 80)},
        **{("wide", step): (30, step < 80) for step in (40, 60, 80)},
    }
    assert cli.main(["ema", "list", str(tmp_path)]) == 0
    assert " wide ema/0000000060-0001 tracked only since step 30: 0.4%" in " ".join(
        capsys.readouterr().out.split()
    )


def test_averages_of_older_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They do not record since when they are tracked; the configurations of earlier ones show it."""
    root = open_storage(tmp_path)
    root.write("config.yaml", dump(config_of(NARROW, run=tmp_path)).encode())
    mixed = EmaProfile(name="narrow", sigma_rel=0.1)
    write(root, EMA, 10, NARROW)
    write(root, EMA, 20, NARROW)
    write(root, CHECKPOINTS, 20, NARROW)
    write(root, EMA, 30, mixed)
    write(root, EMA, 40, mixed, WIDE)
    write(root, EMA, 90, mixed, WIDE, ema_since={"wide": 35})
    assert listed(tmp_path, capsys) == {
        ("narrow", 10): (0, False),
        ("narrow", 20): (0, False),
        ("narrow", 30): (30, True),
        ("narrow", 40): (30, True),  # of two with this width at step 40, the one with the smaller flaw
        ("narrow", 90): (30, False),
    }


def test_averages_with_a_flaw_are_not_mixed_with_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = open_storage(tmp_path)
    root.write("config.yaml", dump(config_of(NARROW, WIDE, run=tmp_path)).encode())
    for step in range(10, 101, 10):
        write(root, EMA, step, NARROW, WIDE, ema_since={"narrow": 0, "wide": 95 if step == 100 else 0})
    out = tmp_path / "out.safetensors"
    arguments = ["ema", "reconstruct", str(tmp_path), "--sigma-rel", "0.08", "--out", str(out)]
    assert cli.main(arguments) == 2  # one average alone at step 100 is too few
    said = capsys.readouterr().err
    assert said.startswith("skipping wide at step 100: tracked only since step 95: ")
    assert "has an error of" in said
    assert cli.main([*arguments, "--step", "90"]) == 0
    assert f"reconstructed from {2 * 9} stored averages" in capsys.readouterr().out
    assert sum(bool(one.flaw) for one in stored_averages(root)[0]) == 1


def test_a_run_whose_averages_all_have_a_flaw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = open_storage(tmp_path)
    root.write("config.yaml", dump(config_of(WIDE, run=tmp_path)).encode())
    write(root, EMA, 20, WIDE, ema_since={"wide": 19})
    out = tmp_path / "out.safetensors"
    assert cli.main(["ema", "reconstruct", str(tmp_path), "--sigma-rel", "0.1", "--out", str(out)]) == 2
    assert "none of the power-function averages of" in capsys.readouterr().err
    assert not out.exists()
