"""The only module that uses DeepSpeed's engine: a model that ZeRO shards over several processes.

Some of DeepSpeed's defaults would hurt, so this module sets: no clipping unless configured (DeepSpeed clips
at 1.0), gradients accumulated and reduced in fp32 (DeepSpeed uses the weights' dtype), no overflow checks
that read from the device, no throughput timer, which waits for the device, and overlapped reduction in
smaller buckets. `Zero.owned` is a view of ZeRO's flat buffers that does not depend on the world size.

At ZeRO-1 with bf16 weights and fp32 gradients, DeepSpeed uses its BF16_Optimizer; otherwise it uses the
optimizer of the stage.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_scale.checkpoint.partition import EXP_AVG, EXP_AVG_SQ, MASTER, Partition
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.config import EngineConfig, OptimizerConfig
from dit_scale.data.batch_plan import BatchPlan
from dit_scale.dist import World
from dit_scale.train import traffic
from dit_scale.train.grad_norm import gradient_norm
from dit_scale.train.optim import build_optimizer, set_moments


class Zero:
    """A model under DeepSpeed ZeRO."""

    def __init__(
        self,
        model: nn.Module,
        config: EngineConfig,
        optimizer_config: OptimizerConfig,
        world: World,
        plan: BatchPlan,
    ) -> None:
        deepspeed = _import_deepspeed(world.device)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(parameters, optimizer_config, world.device)
        self._engine, self._zero, _, _ = deepspeed.initialize(
            model=model,
            optimizer=self.optimizer,
            config=deepspeed_config(config, optimizer_config, plan, world.device),
            dist_init_required=False,
        )
        self._zero.get_grad_norm_direct = _norm_over_ranks
        self.module: nn.Module = self._engine.module
        self._stage, self._device = config.zero_stage, world.device
        self.owned = tuple(self._partitions())
        self.masters: Sequence[Tensor] = [partition.buffers[MASTER] for partition in self.owned]

    def __call__(self, *inputs: Tensor) -> Tensor:
        output: Tensor = self._engine(*inputs)
        return output

    def backward(self, loss: Tensor, last: bool) -> None:
        """Accumulate the gradient of one micro-step; `last` marks the last one before `step`."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Compute the gradient norm, clip, update the masters, and cast them into the weights."""
        self._engine.step()

    def grad_norm(self) -> Tensor:
        """The global norm of the gradient in the current or last step, before clipping."""
        norm: Tensor | float = self._zero._global_grad_norm
        if isinstance(norm, Tensor):
            return norm.float()
        return torch.full((), norm, device=self._device)

    def publish_masters(self) -> None:
        """Cast restored fp32 masters into the weights that the forward pass reads."""
        if self._stage == 3:
            # Small parameters stay gathered between steps, so they must be gathered again.
            self._zero._partition_all_parameters()
            for index in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(index)
            persistent = self._zero.persistent_parameters
            if persistent:
                persistent[0].all_gather(persistent)
        elif hasattr(self._zero, "bf16_groups"):
            self._zero.update_lp_params()
        else:
            for index, master in enumerate(self._zero.single_partition_of_fp32_groups):
                rank = torch.distributed.get_rank(self._zero.real_dp_process_group[index])
                self._zero.parallel_partitioned_bit16_groups[index][rank].data.copy_(master.data)
            self._all_gather_stage_1_and_2()

    def _all_gather_stage_1_and_2(self) -> None:
        from deepspeed.runtime.utils import all_gather_dp_groups

        all_gather_dp_groups(
            groups_flat=self._zero.bit16_groups_flat,
            partitioned_param_groups=self._zero.parallel_partitioned_bit16_groups,
            dp_process_group=self._zero.real_dp_process_group,
            start_alignment_factor=self._zero.nccl_start_alignment_factor,
            allgather_bucket_size=self._zero.allgather_bucket_size,
        )
        for index in range(len(self._zero.bit16_groups)):
            self._zero._update_model_bit16_weights(index)

    def _partitions(self) -> Iterator[Partition]:
        if self._stage == 3:
            groups, masters = self._zero.fp16_groups, self._zero.fp32_partitioned_groups_flat
            slices_of = _slices_stage_3
        elif hasattr(self._zero, "bf16_groups"):
            groups, masters = self._zero.bf16_groups, self._zero.fp32_groups_flat_partition
            slices_of = _slices_stage_1_and_2
        else:
            groups, masters = self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups
            slices_of = _slices_stage_1_and_2
        for parameters, master in zip(groups, masters, strict=True):
            slices = tuple(slices_of(parameters, self._zero.param_names))
            moments = {kind: torch.zeros_like(master.data) for kind in (EXP_AVG, EXP_AVG_SQ)}
            set_moments(self.optimizer, master, *moments.values())
            yield Partition({MASTER: master, **moments}, slices)


def deepspeed_config(
    config: EngineConfig, optimizer_config: OptimizerConfig, plan: BatchPlan, device: torch.device
) -> dict[str, Any]:
    """DeepSpeed's configuration, with every default that matters set explicitly."""
    bucket = config.reduce_bucket_elements
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": 1,  # `backward` sets the accumulation boundary itself
        "gradient_clipping": optimizer_config.clip_grad_norm,
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": config.zero_stage,
            # gloo reduces on the host: there is no stream to overlap with.
            "overlap_comm": config.overlap_comm and device.type == "cuda",
            "contiguous_gradients": True,
            # At stages 1 and 2 "reduce_scatter" is an all-reduce too, and it rounds the fp32 gradients to the
            # weights' dtype before it sums them (3e-4 of the gradient norm in bf16).
            "reduce_scatter": config.zero_stage == 3,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_param_persistence_threshold": traffic.SMALL,
        },
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device
    }


def _import_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device, without its banner and without compiling its CPU kernels."""
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed requires it, even for one process
    import deepspeed
    import deepspeed.ops
    import deepspeed.runtime.bf16_optimizer
    import deepspeed.runtime.compiler
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    deepspeed.runtime.bf16_optimizer.see_memory_usage = (
        _silent  # prints on every start and cannot be disabled
    )
    deepspeed.runtime.bf16_optimizer.get_global_norm_of_tensors = _norm_of_all
    # Importing any optimizer imports Muon, whose decorator imports torch's inductor: 1.3 s.
    deepspeed.runtime.compiler.compile = lambda: deepspeed.runtime.compiler.dummy_decorator
    # DeepSpeed uses deprecated names of torch's collectives; users cannot act on that.
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", f".*torch.distributed.{name}. is deprecated", FutureWarning)
    if device.type == "cpu":
        # DeepSpeed would compile a shared-memory all-reduce for 30 s and more; we use gloo on CPU.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _norm_of_all(input_tensors: Sequence[Tensor], **_: object) -> Tensor:
    """Replace the norm of BF16_Optimizer's gradients, all of which every rank has; inf or NaN if they are.

    DeepSpeed handles them one by one, and copies a number from the host.
    """
    return gradient_norm(input_tensors)


def _norm_over_ranks(gradients: Sequence[Tensor], _parameters: object) -> Tensor:
    """Replace the norm of the gradients that this and the other ranks own; inf or NaN if they are.

    DeepSpeed casts them to fp64 one by one, and copies a number from the host.
    """
    squared = gradient_norm(gradients).square()
    torch.distributed.all_reduce(squared)
    return squared.sqrt()


def _silent(*_: object, **__: object) -> None:
    """Replace a debug print."""


def _slices_stage_1_and_2(
    parameters: list[nn.Parameter], names: dict[nn.Parameter, str]
) -> Iterator[ParameterSlice]:
    for parameter in parameters:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            piece, place = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield ParameterSlice(names[parameter], piece.start, piece.numel, place.start)


def _slices_stage_3(
    parameters: list[nn.Parameter], names: dict[nn.Parameter, str]
) -> Iterator[ParameterSlice]:
    offset = 0
    rank = torch.distributed.get_rank()
    for parameter in parameters:
        share = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        start = rank * share
        real = min(share, parameter.ds_numel - start)  # type: ignore[attr-defined]
        if real > 0:
            yield ParameterSlice(names[parameter], start, real, offset)
        offset += share
