"""The activations of a block, counted from the model's tensors: in eager mode, compiled, and recomputed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table

from dit_scale.config import EngineConfig, ModelConfig
from dit_scale.models.checkpointing import CHECKPOINTINGS
from dit_scale.models.dit import DiT
from dit_scale.models.zoo import CONDITIONINGS, Shape, shape_of
from dit_scale.train.activations import backward_bytes, forward_bytes, kept_bytes, loss_bytes
from tests.support.live_memory import LiveMemory

BATCH = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shape_at(conditioning: str, image_size: int = 256, depth: int = 4) -> Shape:
    knobs = {"name": "DiT-S/2", "image_size": image_size, "num_classes": 10, "conditioning": conditioning}
    return replace(shape_of(ModelConfig.model_validate(knobs)), depth=depth)


def partitioned() -> Any:
    """Return the part of torch's default compiler that decides what is kept, without code generation."""
    return aot_autograd(
        fw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )


def counted(shape: Shape, engine: EngineConfig, batch: int = BATCH) -> tuple[int, int]:
    """Return the bytes that a forward pass keeps, and by how much the backward pass exceeds them."""
    # The kernel that sdpa takes on CUDA; on a CPU, sdpa would keep fp32 copies for attention in bf16.
    model = DiT(shape, "sdpa_flash").to(DTYPES[engine.precision])
    model.checkpoint_blocks(engine.activation_checkpointing)
    if engine.compile_blocks:
        torch._dynamo.reset()
        model.compile_blocks(backend=partitioned(), fullgraph=True)
    side = shape.latent_size
    inputs = torch.zeros(batch, 4, side, side), *(torch.zeros(batch, dtype=torch.int64) for _ in range(2))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model(*inputs)  # compiles
    with LiveMemory((*model.parameters(), *model.buffers(), *inputs)) as live:
        output = model(*inputs)
        kept = live.now
        live.peak = kept
        output.backward(torch.ones_like(output))
    torch._dynamo.reset()
    return kept, live.peak - kept


def predicted(shape: Shape, engine: EngineConfig) -> int:
    """Return the estimate of what the model keeps, without the loss; the output has no loss to keep it."""
    return kept_bytes(shape, engine, BATCH) - BATCH * loss_bytes(shape)


# torch's compiler reads .grad of the tokens and ignores the warning, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("mode", CHECKPOINTINGS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_kept_activations(conditioning: str, precision: str, compiled: bool, mode: str) -> None:
    shape = shape_at(conditioning)
    engine = EngineConfig.model_validate(
        {"precision": precision, "compile_blocks": compiled, "activation_checkpointing": mode}
    )
    kept, _ = counted(shape, engine)
    wanted = predicted(shape, engine)
    print(f"kept {kept}, estimated {wanted}: {wanted / kept - 1:+.1%}")
    assert wanted == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("mode", CHECKPOINTINGS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_backward_pass_of_a_block(conditioning: str, mode: str) -> None:
    """Batches are large enough for the gradients of weights to be small beside those of tokens."""
    shape, batch = shape_at(conditioning, depth=2), 16
    engine = EngineConfig.model_validate({"precision": "bf16", "activation_checkpointing": mode})
    kept, more = counted(shape, engine, batch)
    wanted = backward_bytes(shape, engine, batch)
    width = 2 * shape.width * batch * shape.tokens
    print(f"backward {more / width:.2f}, estimated {wanted / width:.2f} widths; kept {kept / width:.1f}")
    assert wanted == pytest.approx(more, abs=1.5 * width)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_the_kept_activations_at_512_pixels(conditioning: str) -> None:
    shape, engine = shape_at(conditioning, 512, depth=2), EngineConfig(precision="bf16")
    assert predicted(shape, engine) == pytest.approx(counted(shape, engine)[0], rel=0.02)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_pass_without_gradients(conditioning: str) -> None:
    shape, engine = shape_at(conditioning), EngineConfig(precision="bf16")
    model = DiT(shape, "sdpa_flash").to(torch.bfloat16)
    indices_B = torch.zeros(BATCH, dtype=torch.int64)
    x_BCHW = torch.zeros(BATCH, 4, shape.latent_size, shape.latent_size)
    with torch.no_grad(), LiveMemory((*model.parameters(), *model.buffers())) as live:
        model(x_BCHW, indices_B, indices_B)
    assert forward_bytes(shape, engine, BATCH) == pytest.approx(live.peak, rel=0.02)
