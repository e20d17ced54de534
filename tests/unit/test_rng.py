"""Position-keyed draws: Philox against published test vectors, and statistical tests."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_scale import rng
from dit_scale.rng import Purpose
from tests.support import philox

WORD = st.integers(0, 2**32 - 1)
POSITION = st.integers(0, 2**62)


def tensor_philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return tuple(int(word) for word in rng.philox4x32((c0, c1, c2, c3), key))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_test_vectors(counter: str, key: str, words: str) -> None:
    def read(text: str) -> tuple[int, ...]:
        return tuple(int(word, 16) for word in text.split())

    k0, k1 = read(key)
    assert tensor_philox(read(counter), (k0, k1)) == read(words)
    assert philox.philox(read(counter), (k0, k1)) == read(words)


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_philox_agrees_with_python_integers(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    assert tensor_philox(counter, key) == philox.philox(counter, key)


@given(POSITION, WORD, st.sampled_from(Purpose), st.integers(1, 11), st.integers(0, 999))
def test_words_are_blocks_of_the_positions_counter(
    position: int, seed: int, purpose: Purpose, num_words: int, stream: int
) -> None:
    drawn = rng.words(seed, purpose, torch.tensor([position]), num_words, stream)
    assert drawn.tolist() == [philox.words(seed, int(purpose), position, num_words, stream)]


@given(st.lists(POSITION, min_size=1, max_size=12), st.data())
def test_draws_depend_only_on_their_position(positions: list[int], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(range(len(positions))), min_size=1, max_size=20))
    position_N = torch.tensor(positions)
    for draw in (
        lambda at: rng.integers(5, Purpose.TIMESTEP, at, 1000),
        lambda at: rng.uniforms(5, Purpose.LABEL_DROP, at),
        lambda at: rng.normals(5, Purpose.NOISE, at, (4, 3, 3), stream=2),
    ):
        assert torch.equal(draw(position_N)[chosen], draw(position_N[chosen]))


def test_more_words_start_with_the_same_words() -> None:
    position_N = torch.arange(5)
    assert torch.equal(
        rng.words(1, Purpose.NOISE, position_N, 23)[:, :6], rng.words(1, Purpose.NOISE, position_N, 6)
    )


def test_seeds_purposes_streams_and_blocks_never_share_words() -> None:
    position_N = torch.tensor([0, 1, 2, 2**31, 2**32, 2**32 + 1, 10**15])
    drawn = torch.stack(
        [
            rng.words(seed, purpose, position_N, 8, stream)
            for seed in (0, 1, 2**32 - 1)
            for purpose in Purpose
            for stream in (0, 1, 2)
        ]
    )
    assert len(drawn.unique()) == drawn.numel()


def test_purposes_keep_their_numbers() -> None:
    assert [(purpose.name, purpose.value) for purpose in Purpose] == [
        ("TIMESTEP", 0),
        ("NOISE", 1),
        ("LABEL_DROP", 2),
        ("VIEW", 3),
        ("POSTERIOR", 4),
        ("SAMPLE_START", 5),
        ("SAMPLE_STEP", 6),
        ("HELD_OUT_TIMESTEP", 7),
        ("HELD_OUT_NOISE", 8),
        ("HELD_OUT_POSTERIOR", 9),
        ("SAMPLE_LABEL", 10),
    ]


@pytest.mark.parametrize("high", [1, 2, 3, 10, 1000, 2**31 - 1])
def test_integers_are_the_high_part_of_a_product(high: int) -> None:
    position_N = torch.arange(10**12, 10**12 + 500)
    words = rng.words(9, Purpose.TIMESTEP, position_N, 1)[:, 0].tolist()
    drawn = rng.integers(9, Purpose.TIMESTEP, position_N, high)
    assert drawn.tolist() == [word * high >> 32 for word in words]
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < high


def test_integers_are_uniform() -> None:
    from scipy import stats

    counts = torch.bincount(rng.integers(3, Purpose.TIMESTEP, torch.arange(200_000), 1000), minlength=1000)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_uniforms_are_exact_and_uniform() -> None:
    from scipy import stats

    position_N = torch.arange(200_000)
    drawn = rng.uniforms(3, Purpose.LABEL_DROP, position_N)
    words = rng.words(3, Purpose.LABEL_DROP, position_N, 1)[:, 0]
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn * 2.0**32, words.double())
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3


def test_normals_are_box_muller_on_pairs_of_words() -> None:
    words = rng.words(4, Purpose.NOISE, torch.tensor([77]), 6)[0].tolist()
    expected = []
    for first, second in zip(words[::2], words[1::2], strict=True):
        radius, angle = math.sqrt(-2 * math.log((first + 0.5) / 2**32)), 2 * math.pi * second / 2**32
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    drawn = rng.normals(4, Purpose.NOISE, torch.tensor([77]), (2, 3))
    assert drawn.shape == (1, 2, 3)
    assert drawn.dtype == torch.float32
    np.testing.assert_allclose(drawn.flatten().numpy(), expected, rtol=2e-7)


def test_an_odd_count_drops_the_last_of_its_pairs() -> None:
    position_N = torch.arange(4)
    even, odd = (rng.normals(4, Purpose.NOISE, position_N, (count,)) for count in (6, 5))
    assert torch.equal(even[:, :5], odd)


def test_no_word_gives_an_infinite_normal(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([[0, 0, 2**32 - 1, 0, 0, 2**32 - 1, 2**32 - 1, 2**32 - 1]])
    monkeypatch.setattr(rng, "words", lambda *_: ends)
    drawn = rng.normals(0, Purpose.NOISE, torch.zeros(1), (8,))
    assert bool(drawn.isfinite().all())
    assert drawn.abs().max().item() == pytest.approx(math.sqrt(66 * math.log(2)))


def test_normals_have_the_moments_and_tails_of_the_normal_distribution() -> None:
    from scipy import stats

    drawn = rng.normals(11, Purpose.NOISE, torch.arange(1000), (500,)).double().numpy().ravel()
    error = 1 / math.sqrt(drawn.size)
    assert abs(drawn.mean()) < 4 * error
    assert abs(drawn.var() - 1) < 4 * math.sqrt(2) * error
    assert abs((drawn**3).mean()) < 4 * math.sqrt(15) * error
    assert abs((drawn**4).mean() - 3) < 4 * math.sqrt(96) * error
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    for limit in (3.0, 4.0):
        expected = 2 * stats.norm.sf(limit) * drawn.size
        assert abs((np.abs(drawn) > limit).sum() - expected) < 4 * math.sqrt(expected)


def test_neighbours_and_pairs_are_uncorrelated() -> None:
    drawn = rng.normals(2, Purpose.NOISE, torch.arange(2000), (64,)).double().numpy()
    error = 1 / math.sqrt(drawn.size)
    for one, other in (
        (drawn[:-1], drawn[1:]),
        (drawn[:, ::2], drawn[:, 1::2]),
        (drawn, rng.normals(2, Purpose.POSTERIOR, torch.arange(2000), (64,)).double().numpy()),
        (drawn, rng.normals(3, Purpose.NOISE, torch.arange(2000), (64,)).double().numpy()),
    ):
        assert abs((one * other).mean()) < 6 * error
