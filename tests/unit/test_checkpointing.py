"""Activation checkpointing keeps every bit and recomputes what it says; each mode compiles to one graph.

The compiler backend stops before code generation, which takes minutes on a GPU.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from dit_scale.config import EngineConfig, ModelConfig
from dit_scale.models import dit
from dit_scale.models.checkpointing import CHECKPOINTINGS
from dit_scale.models.zoo import CONDITIONINGS
from tests.support.operators import Operators

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRODUCTS = ("aten::mm", "aten::addmm")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
DEPTH = 6


def random_model(mode, conditioning="adaln_zero", precision="fp32", attention="sdpa"):
    config = ModelConfig(
        name="DiT-Ti/2", image_size=32, conditioning=conditioning, num_classes=10, attention=attention
    )
    model = dit.build(config, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.checkpoint_blocks(mode)
    return model.to(DTYPES[precision])


def results_of(model):
    """Return the output and all gradients of one pass."""
    model.zero_grad()
    x_BCHW = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    output = model(x_BCHW, torch.tensor([3, 500]), torch.tensor([1, 10]))
    output.square().mean().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_outputs_and_gradients_keep_their_bits(conditioning, precision):
    plain, *others = [results_of(random_model(mode, conditioning, precision)) for mode in CHECKPOINTINGS]
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))


def operators_of(mode):
    with Operators() as seen:
        results_of(random_model(mode))
    return seen.called


def test_block_runs_each_block_again_in_the_backward_pass():
    plain, again = operators_of("none"), operators_of("block")
    assert again[ATTENTION] == 2 * plain[ATTENTION] == 2 * DEPTH
    # The last product of a block is not needed: recomputation stops when all saved tensors are there again.
    products = sum(again[name] - plain[name] for name in PRODUCTS)
    assert products in (4 * DEPTH, 5 * DEPTH)


def test_selective_repeats_neither_products_nor_attention():
    plain, again = operators_of("none"), operators_of("selective")
    assert {name: again[name] for name in (*PRODUCTS, ATTENTION)} == {
        name: plain[name] for name in (*PRODUCTS, ATTENTION)
    }
    assert again["aten::gelu"] == 2 * plain["aten::gelu"] == 2 * DEPTH
    assert again["aten::native_layer_norm"] > plain["aten::native_layer_norm"]


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_a_pass_without_gradients_recomputes_nothing(mode):
    model = random_model(mode)
    with torch.no_grad(), Operators() as seen:
        model(torch.zeros(2, 4, 4, 4), torch.tensor([3, 500]), torch.tensor([1, 10]))
    assert seen.called[ATTENTION] == DEPTH


CASES = [
    *((conditioning, precision, "sdpa") for conditioning in CONDITIONINGS for precision in DTYPES),
    *(("adaln_zero", "bf16", attention) for attention in ("sdpa_flash", "sdpa_math")),
]


# torch's compiler reads .grad of the tokens and ignores the warning, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("mode", CHECKPOINTINGS)
@pytest.mark.parametrize(("conditioning", "precision", "attention"), CASES)
def test_blocks_compile_to_one_graph_without_breaks_or_recompilations(
    conditioning, precision, attention, mode
):
    torch._dynamo.reset()
    counters.clear()
    model = random_model(mode, conditioning, precision, attention)
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=1):  # a second compilation is an error
        compiled = [results_of(model) for _ in range(2)]
    torch._dynamo.reset()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    # torch's compiler decomposes some operators, which may round differently.
    for one, two in zip(
        results_of(random_model(mode, conditioning, precision, attention)), compiled[1], strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0.02 if precision == "bf16" else 1e-4, atol=1e-5)


def test_selective_needs_weights_that_stay():
    assert EngineConfig(activation_checkpointing="block", zero_stage=3).zero_stage == 3
    with pytest.raises(
        ValueError, match=r"selective with zero_stage=3 cannot run.*activation_checkpointing=block"
    ):
        EngineConfig(activation_checkpointing="selective", zero_stage=3)
