"""Position-keyed draws: Philox against published test vectors, and statistical tests."""

import math
import subprocess
import sys
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_scale import rng
from dit_scale.rng import Purpose, cpu, plain
from tests.support import philox
from tests.support.operators import Operators

WORD = st.integers(0, 2**32 - 1)
POSITION = st.integers(0, 2**62)


def tensor_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    return tuple(int(word) for word in plain.philox4x32((c0, c1, c2, c3), (key[0], key[1])))


def array_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    room_611 = np.empty((6, 1, 1), np.uint64)
    room_611[:4, 0, 0] = counter
    cpu.philox4x32_(room_611[:4], room_611[4:], (key[0], key[1]))
    return tuple(room_611[:4, 0, 0].tolist())


@pytest.mark.parametrize("generator", [philox.philox, tensor_philox, array_philox])
@pytest.mark.parametrize("vector", philox.VECTORS)
def test_published_test_vectors(generator: Callable[..., tuple[int, ...]], vector: philox.Vector) -> None:
    assert generator(vector.counter, vector.key) == vector.words


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_philox_agrees_with_python_integers(counter: tuple[int, ...], key: tuple[int, int]) -> None:
    assert tensor_philox(counter, key) == array_philox(counter, key) == philox.philox(counter, key)


@given(st.lists(POSITION, min_size=1, max_size=9), WORD, st.sampled_from(Purpose), st.integers(1, 70), WORD)
def test_a_cpu_draws_the_bits_of_the_plain_version(
    positions: list[int], seed: int, purpose: Purpose, count: int, stream: int
) -> None:
    position_N = torch.tensor(positions)
    expected = plain.normals(position_N, seed, int(purpose), count, stream)
    with patch.object(cpu, "CHUNK_BLOCKS", 32):
        assert torch.equal(rng.normals(seed, purpose, position_N, (count,), stream), expected)
    expected = plain.integers(position_N, seed, int(purpose), 1000)
    assert torch.equal(rng.integers(seed, purpose, position_N, 1000), expected)
    expected = plain.uniforms(position_N, seed, int(purpose))
    assert torch.equal(rng.uniforms(seed, purpose, position_N), expected)


def test_a_large_draw_has_the_bits_of_the_plain_version() -> None:
    position_N = torch.arange(10**12, 10**12 + 19)
    drawn = rng.normals(1, Purpose.NOISE, position_N, (4, 64, 64))
    assert len(position_N) * 4 * 64 * 64 // 4 > 2 * cpu.CHUNK_BLOCKS
    assert torch.equal(drawn.flatten(1), plain.normals(position_N, 1, int(Purpose.NOISE), 4 * 64 * 64, 0))


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


def test_no_word_gives_an_infinite_normal() -> None:
    ends_14 = torch.tensor([[0, 0, 2**32 - 1, 0, 0, 2**32 - 1, 2**32 - 1, 2**32 - 1]])
    drawn_18 = plain.box_muller(ends_14.unflatten(1, (-1, 2)))
    assert bool(drawn_18.isfinite().all())
    assert drawn_18.abs().max().item() == pytest.approx(math.sqrt(66 * math.log(2)))


def test_a_draw_is_one_operator() -> None:
    """On CUDA it is one kernel; the plain version has a kernel for each of its operators."""
    position_N = torch.arange(8, device="meta")
    with Operators() as seen:
        drawn = rng.normals(1, Purpose.NOISE, position_N, (4, 8, 8), stream=1)
        assert (drawn.shape, drawn.dtype) == ((8, 4, 8, 8), torch.float32)
        drawn = rng.integers(1, Purpose.TIMESTEP, position_N, 1000)
        assert (drawn.shape, drawn.dtype) == ((8,), torch.int64)
        drawn = rng.uniforms(1, Purpose.LABEL_DROP, position_N)
        assert (drawn.shape, drawn.dtype) == ((8,), torch.float64)
    assert seen.called == {f"dit_scale::{name}": 1 for name in ("normals", "integers", "uniforms")}
    with Operators() as seen:
        plain.normals(position_N, 1, int(Purpose.NOISE), 4 * 8 * 8, 0)
    print(f"{seen.kernels()} kernels in the plain version")
    assert seen.kernels() > 100


def test_draws_do_not_break_a_compiled_graph() -> None:
    def two_draws(position_N: torch.Tensor) -> torch.Tensor:
        noise_NW = rng.normals(1, Purpose.NOISE, position_N, (4,))
        return noise_NW * rng.uniforms(1, Purpose.LABEL_DROP, position_N)[:, None]

    position_N = torch.arange(5)
    compiled = torch.compile(two_draws, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(position_N), two_draws(position_N))


@pytest.mark.parametrize("lack", ["", "triton is not installed"])
def test_cuda_draws_with_triton_where_it_is(lack: str) -> None:
    """The operators choose when they are defined, so this looks at a new process."""
    script = (
        "import torch\n"
        "from dit_scale import kernels\n"
        f"kernels.missing = lambda: {lack!r}\n"
        "from dit_scale import rng\n"
        "names = [f'dit_scale::{name}' for name in ('integers', 'uniforms', 'normals')]\n"
        "has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print([has_kernel(name, 'CUDA') for name in names], rng.backend(torch.device('cuda')))"
    )
    output = subprocess.check_output([sys.executable, "-c", script], text=True).strip()
    assert output == (f"[False, False, False] torch ({lack})" if lack else "[True, True, True] triton")


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
