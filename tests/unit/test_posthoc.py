"""Post-hoc EMA: the formulas against quadrature, and reconstructed averages against tracked ones."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_scale import cli, weights
from dit_scale.checkpoint import rankfile
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, MANIFEST, CheckpointId, Manifest
from dit_scale.checkpoint.partition import MASTER, Partition
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.checkpoint.writer import write_manifest
from dit_scale.config import EmaProfile, TrainConfig, dump
from dit_scale.errors import CheckpointError
from dit_scale.inference.posthoc import MAX_ERROR, PowerProfile, fit, lengths, overlaps
from dit_scale.models.embeddings import sincos_pos_embed
from dit_scale.models.zoo import shape_of
from dit_scale.storage import Storage, open_storage
from dit_scale.train.ema import Ema, ema_kind, power_gamma

STORED_WIDTHS = (0.05, 0.10)
STEPS, STORE_EVERY, SIZE = 2000, 80, 64

PROFILES = st.builds(PowerProfile, st.floats(0.002, 0.288), st.integers(1, 10**8))


def stored_at(steps: Sequence[int], widths: Sequence[float] = STORED_WIDTHS) -> list[PowerProfile]:
    return [PowerProfile(width, step) for step in steps for width in widths]


def weights_of_steps(profile: PowerProfile, num_steps: int) -> np.ndarray:
    """Return the coefficients of steps 1 to `num_steps` in an average, computed from the decays."""
    weights = np.zeros(num_steps)
    for step in range(1, profile.step + 1):
        decay = (1 - 1 / step) ** (power_gamma(profile.sigma_rel) + 1)
        weights *= decay
        weights[step - 1] = 1 - decay
    return weights


# Formulas


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (PowerProfile(0.05, 900), PowerProfile(0.1, 1000)),
        (PowerProfile(0.1, 900), PowerProfile(0.05, 1000)),
        (PowerProfile(0.2, 300), PowerProfile(0.28, 300)),
        (PowerProfile(0.01, 990), PowerProfile(0.01, 1000)),
        (PowerProfile(0.05, 1), PowerProfile(0.28, 5)),
    ],
)
def test_overlaps_and_lengths_are_integrals(one: PowerProfile, other: PowerProfile) -> None:
    edges = np.linspace(0, max(one.step, other.step), 2_000_001)
    tau = (edges[1:] + edges[:-1]) / 2

    def heights(profile: PowerProfile) -> np.ndarray:
        gamma = power_gamma(profile.sigma_rel)
        inside = np.minimum(tau / profile.step, 1)
        return np.where(tau <= profile.step, (gamma + 1) * inside**gamma / profile.step, 0)

    a, b = heights(one), heights(other)
    assert lengths([one, other]) == pytest.approx(
        np.sqrt(np.array([(a * a).sum(), (b * b).sum()]) * edges[1]), rel=1e-5
    )
    cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    assert overlaps([one], [other])[0, 0] == pytest.approx(cosine, rel=1e-5)


@given(st.lists(PROFILES, min_size=1, max_size=8), st.lists(PROFILES, min_size=1, max_size=3))
def test_overlaps_are_cosines_at_any_width_and_step(
    rows: list[PowerProfile], columns: list[PowerProfile]
) -> None:
    cosines = overlaps(rows, columns)
    assert cosines.shape == (len(rows), len(columns))
    assert np.all((cosines >= 0) & (cosines <= 1 + 1e-12))
    assert np.array_equal(cosines, overlaps(columns, rows).T)
    assert np.diag(overlaps(rows, rows)) == pytest.approx(np.ones(len(rows)))
    assert np.linalg.eigvalsh(overlaps(rows, rows)).min() > -1e-12


# Fits


@pytest.mark.parametrize(
    "target", [PowerProfile(0.07, 1000), PowerProfile(0.03, 1000), PowerProfile(0.2, 600)]
)
def test_the_error_is_the_distance_of_the_step_coefficients(target: PowerProfile) -> None:
    stored = [profile for profile in stored_at(range(40, 1001, 40)) if profile.step <= target.step]
    found = fit(stored, target)
    assert sum(found.weights) == pytest.approx(1, abs=1e-12)
    wanted = weights_of_steps(target, 1000)
    rebuilt = sum(
        weight * weights_of_steps(profile, 1000)
        for weight, profile in zip(found.weights, stored, strict=True)
    )
    assert found.error == pytest.approx(np.linalg.norm(rebuilt - wanted) / np.linalg.norm(wanted), rel=0.05)


@pytest.mark.parametrize("target", [PowerProfile(0.05, 1000), PowerProfile(0.1, 700)])
def test_a_stored_average_is_its_own_fit(target: PowerProfile) -> None:
    stored = stored_at(range(100, target.step + 1, 100))
    found = fit(stored, target)
    assert found.error < 1e-6
    expected = [float(profile == target) for profile in stored]
    assert found.weights == pytest.approx(expected, abs=1e-9)


def test_more_stored_steps_fit_better() -> None:
    errors = [
        fit(stored_at(range(every, 1001, every)), PowerProfile(0.07, 1000)).error
        for every in (200, 100, 50, 25)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 40 * errors[-1]


def test_many_stored_averages_are_combined_without_large_weights() -> None:
    stored = stored_at(range(10_000, 3_000_001, 10_000))
    for sigma_rel in (0.03, 0.07, 0.2):
        assert np.abs(fit(stored, PowerProfile(sigma_rel, 3_000_000)).weights).sum() < 20


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            PowerProfile(0.01, 2000),
            "reconstructing sigma_rel 0.01 at step 2000 has an error of 30.0%, expected at most 5%; 40 "
            "averages of sigma_rel 0.05, 0.1 are stored at steps 100 to 2000; choose a sigma_rel",
        ),
        (PowerProfile(0.08, 1950), "choose a step with stored averages, for example 1900 or 2000"),
        (PowerProfile(0.08, 2500), "choose a step with stored averages, for example 2000 or 1900"),
    ],
)
def test_a_bad_fit_is_refused(target: PowerProfile, said: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        fit(stored_at(range(100, 2001, 100)), target)
    assert said in str(refused.value)


def test_nothing_stored() -> None:
    with pytest.raises(CheckpointError, match="no power-function average is stored at or before step 100"):
        fit([], PowerProfile(0.1, 100))


# Against direct tracking


@cache
def tracked(widths: tuple[float, ...]) -> tuple[torch.Tensor, dict[PowerProfile, torch.Tensor]]:
    """Return the start of a random walk, and its averages of all widths at every stored step."""
    profiles = tuple(EmaProfile(name=str(width), sigma_rel=width) for width in widths)
    partition = Partition({MASTER: torch.zeros(SIZE)}, (ParameterSlice("w", 0, SIZE, 0),))
    ema = Ema(profiles, (partition,))
    generator = torch.Generator().manual_seed(1)
    begin = 10 * torch.randn(SIZE, generator=generator)
    walk = 0.02 * torch.randn(STEPS, SIZE, generator=generator).cumsum(0)
    partition.buffers[MASTER].copy_(begin)
    ema.start()
    averages = {}
    for step in range(1, STEPS + 1):
        partition.buffers[MASTER].copy_(begin + walk[step - 1])
        ema.update(step)
        if step % STORE_EVERY == 0:
            for width, profile in zip(widths, profiles, strict=True):
                averages[PowerProfile(width, step)] = partition.buffers[ema_kind(profile.name)].clone()
    return begin, averages


TARGET_WIDTHS = (0.03, 0.04, 0.07, 0.12, 0.15, 0.20)


@pytest.mark.parametrize("step", [STEPS, STEPS - 4 * STORE_EVERY])
@pytest.mark.parametrize("sigma_rel", TARGET_WIDTHS)
def test_a_reconstructed_average_equals_the_tracked_one(sigma_rel: float, step: int) -> None:
    """Within 1e-3 of the distance that the average moved, and within 1e-4 of its norm."""
    begin, averages = tracked((*STORED_WIDTHS, *TARGET_WIDTHS))
    stored = [profile for profile in averages if profile.sigma_rel in STORED_WIDTHS and profile.step <= step]
    found = fit(stored, PowerProfile(sigma_rel, step))
    rebuilt = sum(
        weight * averages[profile].double() for weight, profile in zip(found.weights, stored, strict=True)
    )
    wanted = averages[PowerProfile(sigma_rel, step)].double()
    off = float((rebuilt - wanted).norm())
    of_whole, of_change = off / float(wanted.norm()), off / float((wanted - begin).norm())
    print(f"sigma_rel {sigma_rel} at {step}: {of_whole:.1e} of all, {of_change:.1e} of the change")
    assert of_whole < 1e-4
    assert of_change < 1e-3
    assert of_change < found.error < MAX_ERROR


# From a run's files

SHAPES = {"head.weight": (5, 8), "head.bias": (SIZE - 40,)}
RANKS = ((0, 25), (25, SIZE))
"""Elements of the flat parameters that each of two ranks owns; both own part of the first parameter."""


def store(root: Storage, config: TrainConfig, folder: str, step: int, kinds: dict[str, torch.Tensor]) -> None:
    """Write a checkpoint with these kinds of flat fp32 state, from two ranks."""
    path, files = CheckpointId(step, 1).path(folder), []
    for rank, (low, high) in enumerate(RANKS):
        values, slices, offset = list[torch.Tensor](), list[tuple[str, ParameterSlice]](), 0
        for kind, flat in kinds.items():
            for parameter, begin, end in (("head.weight", 0, 40), ("head.bias", 40, SIZE)):
                first, last = max(low, begin), min(high, end)
                if first < last:
                    values.append(flat[first:last])
                    slices.append((kind, ParameterSlice(parameter, first - begin, last - first, offset)))
                    offset += last - first
        memory = torch.cat(values).numpy().view(np.uint8)
        files.append(rankfile.write(root, f"{path}/{rankfile.file_name(rank)}", memory, slices))
    manifest = Manifest(
        step=step,
        samples=step * config.global_batch,
        attempt=1,
        config=config.model_dump(mode="json"),
        data_sha256="0" * 64,
        vae_sha256="1" * 64,
        model_shapes=SHAPES,
        optimizer_groups=(),
        files=tuple(files),
    )
    write_manifest(root, manifest, folder)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with averages stored during training, and its last checkpoint."""
    folder = tmp_path / "run"
    config = TrainConfig.model_validate(
        {
            "run": str(folder),
            "model": {"name": "DiT-Ti/2", "image_size": 32, "num_classes": 5},
            "ema": [
                {"name": "constant", "decay": 0.9},
                {"name": "narrow", "sigma_rel": 0.05},
                {"name": "wide", "sigma_rel": 0.1},
            ],
        }
    )
    root = open_storage(folder)
    root.write("config.yaml", dump(config).encode())
    _, averages = tracked((*STORED_WIDTHS, *TARGET_WIDTHS))
    for step in range(STORE_EVERY, STEPS + 1, STORE_EVERY):
        narrow, wide = (averages[PowerProfile(width, step)] for width in STORED_WIDTHS)
        kinds = {"ema.narrow": narrow, "ema.wide": wide}
        if step < STEPS:
            store(root, config, EMA, step, kinds)
        else:
            store(root, config, CHECKPOINTS, step, {MASTER: wide, "ema.constant": wide, **kinds})
    return folder


def flat(file: Path) -> torch.Tensor:
    state = weights.read(file)
    return torch.cat([state[name].flatten() for name in SHAPES])


@pytest.mark.parametrize(("more", "step"), [((), STEPS), (("--step", "1680"), 1680)])
def test_reconstruct_writes_the_tracked_average(
    run: Path, more: tuple[str, ...], step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run / "between.safetensors"
    assert cli.main(["ema", "reconstruct", str(run), "--sigma-rel", "0.07", *more, "--out", str(out)]) == 0
    num_stored = 2 * step // STORE_EVERY
    assert capsys.readouterr().out.startswith(
        f"EMA of sigma_rel 0.07 at step {step}, reconstructed from {num_stored} stored averages of {run} ("
    )
    begin, averages = tracked((*STORED_WIDTHS, *TARGET_WIDTHS))
    wanted = averages[PowerProfile(0.07, step)]
    assert (flat(out) - wanted).norm() < 1e-3 * (wanted - begin).norm()


def test_a_reconstructed_file_has_metadata(run: Path) -> None:
    out = run / "between.safetensors"
    assert cli.main(["ema", "reconstruct", str(run), "--sigma-rel", "0.07", "--out", str(out)]) == 0
    state, said = weights.read(out), weights.read_metadata(out)
    model = TrainConfig.model_validate({"model": json.loads(said["model"])}).model
    position = sincos_pos_embed(shape_of(model).width, shape_of(model).grid)
    assert torch.equal(state.pop("pos_embed"), position)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == SHAPES
    assert said["vae_sha256"] == "1" * 64
    assert 0 < float(said["predicted_error"]) < 0.01
    parts = json.loads(said["rebuilt_from"])
    stored = [
        (name, step) for step in range(STORE_EVERY, STEPS + 1, STORE_EVERY) for name in ("narrow", "wide")
    ]
    places = [
        f"{run}/{CheckpointId(step, 1).path(EMA if step < STEPS else CHECKPOINTS)}" for _, step in stored
    ]
    assert [(part["profile"], part["checkpoint"]) for part in parts] == [
        (name, place) for (name, _), place in zip(stored, places, strict=True)
    ]
    assert sum(part["weight"] for part in parts) == pytest.approx(1)


def test_stored_averages_are_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ema", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 2 * STEPS // STORE_EVERY
    assert rows[:2] == [
        {
            "step": 80,
            "sigma_rel": sigma_rel,
            "profile": profile,
            "checkpoint": CheckpointId(80, 1).path(EMA),
            "since_step": 0,
            "flaw": "",
        }
        for profile, sigma_rel in (("narrow", 0.05), ("wide", 0.1))
    ]
    assert rows[-1]["checkpoint"] == CheckpointId(STEPS, 1).path()
    assert cli.main(["ema", "list", str(run)]) == 0
    header, _, *lines = filter(str.strip, capsys.readouterr().out.splitlines())
    assert header.split() == ["step", "sigma_rel", "profile", "checkpoint", "note"]
    assert len(lines) == len(rows)
    assert lines[0].split() == ["80", "0.05", "narrow", rows[0]["checkpoint"]]


def test_a_damaged_manifest_is_skipped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / CheckpointId(800, 1).path(EMA) / MANIFEST).write_bytes(b"{}")
    out = run / "between.safetensors"
    assert cli.main(["ema", "reconstruct", str(run), "--sigma-rel", "0.07", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert f"reconstructed from {2 * STEPS // STORE_EVERY - 2} stored averages" in printed.out
    assert printed.err.startswith(f"skipping {run}/{CheckpointId(800, 1).path(EMA)}/{MANIFEST} is damaged")
    begin, averages = tracked((*STORED_WIDTHS, *TARGET_WIDTHS))
    wanted = averages[PowerProfile(0.07, STEPS)]
    assert (flat(out) - wanted).norm() < 1e-3 * (wanted - begin).norm()
    assert cli.main(["ema", "list", str(run), "--json"]) == 0
    assert "is damaged" in json.loads(capsys.readouterr().out)[-1]["problem"]


def test_a_damaged_tensor_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / CheckpointId(800, 1).path(EMA) / rankfile.file_name(1)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    out = run / "between.safetensors"
    assert cli.main(["ema", "reconstruct", str(run), "--sigma-rel", "0.07", "--out", str(out)]) == 2
    assert f"{file}: ema.wide of head.bias is damaged" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--sigma-rel", "0.01"], "choose a sigma_rel closer to theirs"),
        (["--sigma-rel", "0.07", "--step", "1990"], "for example 2000 or 1920"),
        (["--sigma-rel", "0.07", "--step", "79"], "no power-function average is stored at or before step 79"),
    ],
)
def test_an_average_that_cannot_be_reconstructed_is_refused(
    run: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run / "out.safetensors"
    assert cli.main(["ema", "reconstruct", str(run), *more, "--out", str(out)]) == cli.USER_ERROR_EXIT_CODE
    assert said in capsys.readouterr().err
    assert not out.exists()
