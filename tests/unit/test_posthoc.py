"""Post-hoc EMA: the formulas against quadrature, and rebuilt averages against ones that were tracked."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_scale.config import EmaProfile
from dit_scale.errors import CheckpointError
from dit_scale.train.ema import Ema, ema_kind, power_gamma
from dit_scale.train.engine import MASTER, Extent, Partition
from dit_scale.train.posthoc import MAX_ERROR, Profile, fit, lengths, overlaps

STORED_WIDTHS = (0.05, 0.10)
STEPS, STORE_EVERY, SIZE = 2000, 80, 64

PROFILES = st.builds(Profile, st.floats(0.002, 0.288), st.integers(1, 10**8))


def stored_at(steps: Sequence[int], widths: Sequence[float] = STORED_WIDTHS) -> list[Profile]:
    return [Profile(width, step) for step in steps for width in widths]


def weights_of_steps(profile: Profile, num_steps: int) -> np.ndarray:
    """What the weights of steps 1 to `num_steps` count in an average, from the decays alone."""
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
        (Profile(0.05, 900), Profile(0.1, 1000)),
        (Profile(0.1, 900), Profile(0.05, 1000)),
        (Profile(0.2, 300), Profile(0.28, 300)),
        (Profile(0.01, 990), Profile(0.01, 1000)),
        (Profile(0.05, 1), Profile(0.28, 5)),
    ],
)
def test_overlaps_and_lengths_are_integrals(one: Profile, other: Profile) -> None:
    edges = np.linspace(0, max(one.step, other.step), 2_000_001)
    tau = (edges[1:] + edges[:-1]) / 2

    def heights(profile: Profile) -> np.ndarray:
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
def test_overlaps_are_cosines_at_any_width_and_step(rows: list[Profile], columns: list[Profile]) -> None:
    cosines = overlaps(rows, columns)
    assert cosines.shape == (len(rows), len(columns))
    assert np.all((cosines >= 0) & (cosines <= 1 + 1e-12))
    assert np.array_equal(cosines, overlaps(columns, rows).T)
    assert np.diag(overlaps(rows, rows)) == pytest.approx(np.ones(len(rows)))
    assert np.linalg.eigvalsh(overlaps(rows, rows)).min() > -1e-12


# Fits


@pytest.mark.parametrize("target", [Profile(0.07, 1000), Profile(0.03, 1000), Profile(0.2, 600)])
def test_the_error_is_that_of_what_each_step_counts(target: Profile) -> None:
    stored = [profile for profile in stored_at(range(40, 1001, 40)) if profile.step <= target.step]
    found = fit(stored, target)
    assert sum(found.weights) == pytest.approx(1, abs=1e-12)
    wanted = weights_of_steps(target, 1000)
    rebuilt = sum(
        weight * weights_of_steps(profile, 1000)
        for weight, profile in zip(found.weights, stored, strict=True)
    )
    assert found.error == pytest.approx(np.linalg.norm(rebuilt - wanted) / np.linalg.norm(wanted), rel=0.05)


@pytest.mark.parametrize("target", [Profile(0.05, 1000), Profile(0.1, 700)])
def test_a_stored_average_is_its_own_fit(target: Profile) -> None:
    stored = stored_at(range(100, target.step + 1, 100))
    found = fit(stored, target)
    assert found.error < 1e-6
    expected = [float(profile == target) for profile in stored]
    assert found.weights == pytest.approx(expected, abs=1e-9)


def test_more_stored_steps_fit_better() -> None:
    errors = [
        fit(stored_at(range(every, 1001, every)), Profile(0.07, 1000)).error for every in (200, 100, 50, 25)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 40 * errors[-1]


def test_many_stored_averages_are_combined_without_large_weights() -> None:
    stored = stored_at(range(10_000, 3_000_001, 10_000))
    for sigma_rel in (0.03, 0.07, 0.2):
        assert np.abs(fit(stored, Profile(sigma_rel, 3_000_000)).weights).sum() < 20


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (
            Profile(0.01, 2000),
            "the average of sigma_rel 0.01 at step 2000 would be off by 30.0%, expected at most 5%, from "
            "the 40 stored ones of sigma_rel 0.05, 0.1 at steps 100 to 2000; ask for a sigma_rel nearer to",
        ),
        (Profile(0.08, 1950), "ask for a step at which there are some, as 1900 or 2000"),
        (Profile(0.08, 2500), "ask for a step at which there are some, as 2000 or 1900"),
    ],
)
def test_a_bad_fit_is_refused(target: Profile, said: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        fit(stored_at(range(100, 2001, 100)), target)
    assert said in str(refused.value)


def test_nothing_stored() -> None:
    with pytest.raises(CheckpointError, match="no power-function average is stored up to this step"):
        fit([], Profile(0.1, 100))


# Against direct tracking


@cache
def tracked(widths: tuple[float, ...]) -> tuple[torch.Tensor, dict[Profile, torch.Tensor]]:
    """Weights that wander away from where they begin; the averages of all widths at every stored step."""
    profiles = tuple(EmaProfile(name=str(width), sigma_rel=width) for width in widths)
    partition = Partition({MASTER: torch.zeros(SIZE)}, (Extent("w", 0, SIZE, 0),))
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
                averages[Profile(width, step)] = partition.buffers[ema_kind(profile.name)].clone()
    return begin, averages


TARGET_WIDTHS = (0.03, 0.04, 0.07, 0.12, 0.15, 0.20)


@pytest.mark.parametrize("step", [STEPS, STEPS - 4 * STORE_EVERY])
@pytest.mark.parametrize("sigma_rel", TARGET_WIDTHS)
def test_a_rebuilt_average_is_the_tracked_one(sigma_rel: float, step: int) -> None:
    """To 1e-3 of how far the average has come from where the weights began, and better of the whole."""
    begin, averages = tracked((*STORED_WIDTHS, *TARGET_WIDTHS))
    stored = [profile for profile in averages if profile.sigma_rel in STORED_WIDTHS and profile.step <= step]
    found = fit(stored, Profile(sigma_rel, step))
    rebuilt = sum(
        weight * averages[profile].double() for weight, profile in zip(found.weights, stored, strict=True)
    )
    wanted = averages[Profile(sigma_rel, step)].double()
    off = float((rebuilt - wanted).norm())
    of_whole, of_change = off / float(wanted.norm()), off / float((wanted - begin).norm())
    print(f"sigma_rel {sigma_rel} at {step}: {of_whole:.1e} of all, {of_change:.1e} of the change")
    assert of_whole < 1e-4
    assert of_change < 1e-3
    assert of_change < found.error < MAX_ERROR
