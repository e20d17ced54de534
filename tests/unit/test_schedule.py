"""The schedule's tables against published numbers, Markov chains and the definition of respacing."""

import math
from dataclasses import FrozenInstanceError
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dit_scale.diffusion.schedule import Schedule, float64_tables, linear, respace
from dit_scale.diffusion.spacing import kept_indices
from dit_scale.errors import ConfigError

FULL = linear(1000)
TABLES = float64_tables(FULL.betas_float64)


@pytest.mark.parametrize(
    ("table", "index", "value"),
    [
        ("alphas_cumprod", 0, 0.9999),
        ("alphas_cumprod", 1, 0.9997800921),
        ("alphas_cumprod", 250, 0.5214230306),
        ("alphas_cumprod", 500, 0.07779665837),
        ("alphas_cumprod", 750, 0.003300158362),
        ("alphas_cumprod", 999, 4.035829765e-05),
        ("posterior_variance", 0, 0.0),
        ("posterior_variance", 1, 5.4531876613e-05),
        ("posterior_log_variance_clipped", 0, -9.816725135),
        ("posterior_log_variance_clipped", 1, -9.816725135),
        ("posterior_log_variance_clipped", 999, -3.912023829),
        ("log_betas", 999, -3.912023005),
    ],
)
def test_linear_1000_has_the_published_values(table, index, value):
    assert TABLES[table][index] == pytest.approx(value, rel=1e-9, abs=0)


def test_linear_betas_are_evenly_spaced():
    betas = FULL.betas_float64
    assert (betas[0], betas[-1]) == (1e-4, 2e-2)
    np.testing.assert_allclose(np.diff(betas), (2e-2 - 1e-4) / 999, rtol=1e-10)


@pytest.mark.parametrize("schedule", [FULL, respace(FULL, "250"), linear(21)], ids=["1000", "250", "21"])
def test_tables_are_the_float64_tables_cast_once(schedule):
    assert set(vars(schedule)) == set(TABLES) | {"betas_float64", "timesteps"}
    for name, expected in float64_tables(schedule.betas_float64).items():
        table = getattr(schedule, name)
        assert table.dtype == torch.float32
        assert torch.isfinite(table).all(), name
        np.testing.assert_array_equal(table.numpy(), expected.astype(np.float32), err_msg=name)
    assert schedule.timesteps.dtype == torch.int64
    assert len(schedule) == len(schedule.timesteps)


def test_alphas_cumprod_is_the_chain_of_single_steps():
    signal, variance = 1.0, 0.0
    for t, beta in enumerate(FULL.betas_float64):
        signal, variance = signal * math.sqrt(1 - beta), variance * (1 - beta) + beta
        assert TABLES["sqrt_alphas_cumprod"][t] == pytest.approx(signal, rel=1e-12)
        assert TABLES["sqrt_one_minus_alphas_cumprod"][t] ** 2 == pytest.approx(variance, rel=1e-10)


def test_other_lengths_scale_the_betas():
    half = linear(500)
    assert half.betas_float64[[0, -1]].tolist() == pytest.approx([2e-4, 4e-2])
    # About the same amount of signal remains at the end.
    assert float64_tables(half.betas_float64)["alphas_cumprod"][-1] == pytest.approx(4e-5, rel=0.2)


@pytest.mark.parametrize("timesteps", [-1, 0, 1, 2, 20])
def test_too_short_a_diffusion_is_refused(timesteps):
    with pytest.raises(ConfigError, match="expected 21 or more"):
        linear(timesteps)


def test_respacing_250_has_the_published_values():
    short = respace(FULL, "250")
    timesteps = short.timesteps.tolist()
    assert timesteps[:6] == [0, 4, 8, 12, 16, 20]
    assert timesteps[-4:] == [987, 991, 995, 999]
    assert (len(timesteps), sum(timesteps)) == (250, 124875)
    betas = short.betas_float64[[0, 1, -1]].tolist()
    assert betas == pytest.approx([1e-4, 5.990655646e-04, 0.07751934499], rel=1e-9)


def test_respacing_ddim50_is_a_stride_of_20():
    assert respace(FULL, "ddim50").timesteps.tolist() == list(range(0, 1000, 20))


def test_respacing_by_sections_spreads_in_each():
    kept = kept_indices(1000, "10,15,20")
    first, second, third = kept[:10], kept[10:25], kept[25:]
    # 1000 = 334 + 333 + 333: the first sections take the remainder.
    assert (first[0], first[-1]) == (0, 333)
    assert (second[0], second[-1]) == (334, 666)
    assert (third[0], third[-1]) == (667, 999)
    assert np.diff(first).tolist() == [37] * 9
    assert third == [667 + round(i * 332 / 19) for i in range(20)]


def test_a_section_with_one_step_takes_its_first():
    assert kept_indices(10, "1,2") == [0, 5, 9]


def test_halves_round_to_even():
    assert kept_indices(10, "7") == [0, 2, 3, 4, 6, 8, 9]  # 0 1.5 3 4.5 6 7.5 9


@pytest.mark.parametrize("spec", ["250", "ddim50", "10,15,20", "2", "1000"])
def test_respacing_keeps_the_marginals(spec):
    short = respace(FULL, spec)
    np.testing.assert_allclose(
        float64_tables(short.betas_float64)["alphas_cumprod"],
        TABLES["alphas_cumprod"][short.timesteps.numpy()],
        rtol=1e-12,
    )


def test_respacing_to_every_step_changes_nothing():
    same = respace(FULL, "1000")
    assert torch.equal(same.timesteps, FULL.timesteps)
    np.testing.assert_allclose(same.betas_float64, FULL.betas_float64, rtol=1e-11)


def test_respacing_twice_keeps_original_timesteps():
    assert respace(respace(FULL, "ddim50"), "ddim10").timesteps.tolist() == list(range(0, 1000, 100))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("1001", "has 1000 of the 1000 timesteps"),
        ("10,501", "section 2 of 2 has 500"),
        ("400,10,10", "section 1 of 3 has 334"),
        ("1", "2 or more steps"),
        ("ddim1", "no integer stride"),
        ("ddim999", "no integer stride"),
        ("ddim1001", "no integer stride"),
        ("", "expected a number of steps"),
        ("0", "expected a number of steps"),
        ("-5", "expected a number of steps"),
        ("2.5", "expected a number of steps"),
        ("10,,20", "expected a number of steps"),
        ("ddim", "expected a number of steps"),
        ("ddim10,20", "expected a number of steps"),
        ("fast27", "expected a number of steps"),
    ],
)
def test_impossible_respacings_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        respace(FULL, spec)


def test_to_moves_every_tensor():
    moved = FULL.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == len(TABLES) + 1
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.betas_float64 is FULL.betas_float64


def test_a_schedule_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        FULL.betas = FULL.log_betas


@st.composite
def sections(draw):
    """Draw (timesteps, counts) of a possible respacing."""
    num_timesteps = draw(st.integers(2, 1500))
    num_sections = draw(st.integers(1, min(6, num_timesteps // 2)))
    counts = draw(
        st.lists(st.integers(1, num_timesteps // num_sections), min_size=num_sections, max_size=num_sections)
    )
    assume(sum(counts) >= 2)
    return num_timesteps, counts


@given(sections())
@settings(deadline=None)
def test_kept_indices_are_a_dense_spread_of_each_section(case):
    num_timesteps, counts = case
    kept = kept_indices(num_timesteps, ",".join(map(str, counts)))
    assert len(kept) == sum(counts)
    assert kept == sorted(set(kept))
    assert kept[0] == 0
    for section, count in enumerate(counts):
        # Sections tile the diffusion: the first num_timesteps % num_sections are one longer.
        lower = section * (num_timesteps // len(counts)) + min(section, num_timesteps % len(counts))
        size = num_timesteps // len(counts) + (section < num_timesteps % len(counts))
        inside = [index for index in kept if lower <= index < lower + size]
        assert len(inside) == count
        assert inside[0] == lower
        if count > 1:
            stride = Fraction(size - 1, count - 1)
            assert inside[-1] == lower + size - 1
            assert all(math.floor(stride) <= gap <= math.ceil(stride) for gap in np.diff(inside))
            # Each is the nearest integer to its exact value; only halves may round either way.
            assert all(abs(i - lower - n * stride) <= Fraction(1, 2) for n, i in enumerate(inside))


@given(st.integers(2, 1500), st.data())
@settings(deadline=None)
def test_ddim_respacing_is_the_smallest_stride_that_fits(num_timesteps, data):
    stride = data.draw(st.integers(1, num_timesteps - 1))
    kept = kept_indices(num_timesteps, f"ddim{len(range(0, num_timesteps, stride))}")
    assert kept[0] == 0
    assert len(kept) == len(range(0, num_timesteps, stride))
    assert set(np.diff(kept)) == {kept[1]}
    assert kept[1] <= stride


@given(sections())
@settings(deadline=None, max_examples=30)
def test_respaced_tables_are_finite_and_in_range(case):
    num_timesteps, counts = case
    assume(num_timesteps > 20)
    short: Schedule = respace(linear(num_timesteps), ",".join(map(str, counts)))
    assert ((short.betas_float64 > 0) & (short.betas_float64 < 1)).all()
    assert all(torch.isfinite(getattr(short, name)).all() for name in TABLES)
    assert (short.posterior_log_variance_clipped <= short.log_betas + 1e-6)[1:].all()
