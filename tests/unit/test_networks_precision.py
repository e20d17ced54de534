"""Feature networks compute in IEEE fp32, however a program has asked torch for TF32 or bf16."""

from collections.abc import Callable, Iterator

import pytest
import torch

from dit_scale.evaluate.networks.precision import plain_fp32

OPERATIONS = (
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
)


def precisions() -> list[str]:
    """Return what each operation would compute in."""
    return [operation.fp32_precision for operation in OPERATIONS]


def nothing() -> None:
    """Leave torch's defaults."""


def old_switches() -> None:
    """Allow TF32 as programs did before torch 2.9."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True


def matmul_precision() -> None:
    """Allow TF32 and its like in matrix products of every device."""
    torch.set_float32_matmul_precision("high")


def every_backend() -> None:
    """Allow TF32 everywhere."""
    torch.backends.fp32_precision = "tf32"


def single_operations() -> None:
    """Allow TF32 in single operations."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"


def cpu_in_bf16() -> None:
    """Allow bf16 on the CPU."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


@pytest.fixture
def defaults() -> Iterator[None]:
    """Start and end with settings that torch's old and new switches agree on, whatever ran before."""
    _agree()
    yield
    _agree()


def _agree() -> None:
    for module in (torch.backends, torch.backends.cudnn, torch.backends.mkldnn, *OPERATIONS):
        module.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True  # last: it sets convolutions and recurrent layers alike


@pytest.mark.usefixtures("defaults")
@pytest.mark.parametrize(
    "ask", [nothing, old_switches, matmul_precision, every_backend, single_operations, cpu_in_bf16]
)
def test_every_request_for_less_is_suspended_and_restored(ask: Callable[[], None]) -> None:
    ask()
    before = precisions(), torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    with plain_fp32(torch.device("cpu")):
        assert precisions() == ["ieee"] * len(OPERATIONS)
        # The older switches agree; otherwise these would raise an error, as a matrix product on a GPU would.
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.deterministic
        assert not torch.backends.cudnn.benchmark
        assert not torch.is_grad_enabled()
    assert (precisions(), torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic) == before
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("defaults")
def test_an_error_inside_restores_the_settings() -> None:
    torch.set_float32_matmul_precision("high")
    before = precisions()
    with pytest.raises(KeyError), plain_fp32(torch.device("cpu")):
        raise KeyError
    assert precisions() == before
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("defaults")
def test_autocast_is_suspended() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with plain_fp32(torch.device("cpu")):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
