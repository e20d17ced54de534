"""The Triton kernels of the draws: the numbers of the plain version, and what they take on a GPU."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch

from dit_scale.rng import plain
from tests.support import philox
from tests.support.hopper import compile_for_hopper
from tests.support.interpreter import Call, interpreter
from tests.support.needs import needs

POSITIONS = [0, 1, 5, 2**32 + 5, 10**12, 2**62 - 1]
KEYS = [(0, 0), (42, 1), (2**32 - 1, 10)]
POINTERS = {"position_ptr": "*i64", "out_ptr": "*i64"}
NUMBERS = {"seed": "i64", "purpose": "i32"}


@pytest.fixture(scope="module", autouse=True)
def triton() -> None:
    needs(find_spec("triton") is not None, "triton")


@pytest.fixture(scope="module")
def call() -> Iterator[Call]:
    with interpreter() as call:
        yield call


def drawn(name: str, positions: list[int], *args: int) -> np.ndarray:
    """Draw with a kernel, in the interpreter's process."""
    from dit_scale.kernels import philox as kernels

    result: torch.Tensor = getattr(kernels, name)(torch.tensor(positions), *args)
    return result.numpy()


def words(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Draw words with the generator that the kernels call, in the interpreter's process."""
    from tests.support import philox_parts

    return philox_parts.words(counter, key)


@pytest.mark.parametrize("vector", philox.VECTORS)
def test_published_test_vectors(call: Call, vector: philox.Vector) -> None:
    assert call(words, vector.counter, vector.key) == list(vector.words)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("high", [1, 1000, 2**31 - 1])
def test_integers_equal_those_of_the_plain_version(call: Call, key: tuple[int, int], high: int) -> None:
    expected = plain.integers(torch.tensor(POSITIONS), *key, high)
    assert call(drawn, "integers", POSITIONS, *key, high).tolist() == expected.tolist()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("num", [1, 255, 256, 257])
def test_uniforms_equal_those_of_the_plain_version(call: Call, key: tuple[int, int], num: int) -> None:
    positions = list(range(10**12, 10**12 + num))
    expected = plain.uniforms(torch.tensor(positions), *key)
    assert call(drawn, "uniforms", positions, *key).tolist() == expected.tolist()


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("count", [1, 5, 512, 1027, 4096])
def test_normals_equal_those_of_the_plain_version_to_one_ulp(
    call: Call, key: tuple[int, int], count: int
) -> None:
    expected = plain.normals(torch.tensor(POSITIONS), *key, count, 3).numpy()
    found = call(drawn, "normals", POSITIONS, *key, count, 3)
    assert found.dtype == np.float32
    ulps = np.abs(found.view(np.int32) - expected.view(np.int32))
    print(f"{(ulps > 0).sum()} of {ulps.size} normals differ, by at most {ulps.max()} ulp")
    assert ulps.max() <= 1


def transformed(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Transform words as the kernels do, in the interpreter's process."""
    from tests.support import philox_parts

    return philox_parts.transformed(first, second)


def test_the_transform_at_the_ends_of_every_octant(call: Call) -> None:
    """Angles around the multiples of pi/4, where the reduction changes; the smallest and largest radius."""
    angles = [(octant * 2**29 + delta) % 2**32 for octant in range(8) for delta in (-1, 0, 1, 2**28)]
    firsts = [0, 1, 2**31, 2**32 - 1]
    first, second = (np.array(words).reshape(-1) for words in np.meshgrid(firsts, angles))
    pairs = torch.from_numpy(np.stack((first, second), axis=1))[None]
    expected = plain.box_muller(pairs)[0].unflatten(0, (-1, 2)).T.numpy()
    found = call(transformed, first, second)
    # At multiples of a quarter turn, one of the two is zero but for the rounding of 2 pi in float64.
    np.testing.assert_allclose(found, expected, rtol=1.2e-7, atol=1e-14)


@pytest.mark.parametrize("name", ["integers", "uniforms"])
def test_kernels_of_one_word_fit_into_a_gpu(name: str) -> None:
    from dit_scale.kernels import philox as kernels

    numbers = {"num": "i32"} | NUMBERS | ({"high": "i32"} if name == "integers" else {})
    kernel = getattr(kernels, f"{name}_kernel")
    taken = compile_for_hopper(kernel, POINTERS | numbers, SIZE=kernels.POSITIONS)
    print(taken)
    assert taken.spilled_bytes == taken.stack_bytes == 0
    assert taken.registers <= 32


def test_the_kernel_of_normals_fits_into_a_gpu_and_stores_four_at_once() -> None:
    from dit_scale.kernels import philox as kernels

    types: dict[str, Any] = {"position_ptr": "*i64", "out_ptr": "*fp32", "count": "i32:16"}
    taken = compile_for_hopper(
        kernels.normals_kernel, types | NUMBERS | {"stream": "i32"}, SIZE=kernels.COUNTERS
    )
    print(taken)
    assert taken.spilled_bytes == taken.stack_bytes == 0
    # A multiprocessor has 65,536 registers: with 32 per thread, it runs as many threads as it can hold.
    assert taken.registers <= 32
    assert taken.wide_stores == 1
