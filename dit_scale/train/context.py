"""What a training process opens once and keeps through all its attempts."""

from dataclasses import dataclass
from statistics import mean

import torch

from dit_scale.config import TrainConfig
from dit_scale.data.batch_plan import BatchPlan
from dit_scale.data.held_out import Mask, held_out_mask
from dit_scale.data.shards import LatentDataset
from dit_scale.dist import World
from dit_scale.heartbeat import Heart
from dit_scale.models.zoo import FLOPS_PER_MAC, TRAINING_FORWARDS, forward_macs, shape_of
from dit_scale.storage import Storage
from dit_scale.telemetry.matmul import matmul_flops_per_s
from dit_scale.telemetry.pace import Work
from dit_scale.telemetry.sinks import check_installed
from dit_scale.train.dataset_check import check_dataset, data_digest
from dit_scale.train.memory import plan_of
from dit_scale.train.precision import choose_precision
from dit_scale.train.run_folder import root_of

MATMUL_S = 0.1
"""About how long each start measures a matrix product."""


@dataclass(frozen=True)
class RunContext:
    """The configuration of a run with everything that follows from it and this machine."""

    config: TrainConfig
    """With the precision resolved."""
    world: World
    heart: Heart
    dataset: LatentDataset
    data_sha256: str
    """Digest of dataset.json."""
    held_out: Mask | None
    """The samples that training never reads; None for none."""
    plan: BatchPlan
    root: Storage
    work: Work
    notes: tuple[str, ...]
    """What the user should know about these choices, one line each."""

    @classmethod
    def open(cls, config: TrainConfig, world: World, heart: Heart) -> "RunContext":
        """Resolve and check the configuration against this machine and the data; all ranks call this.

        Raises ConfigError, DataError or StorageError.
        """
        config, precision_note = choose_precision(config, world)
        check_installed(config.log)
        dataset = LatentDataset.open(config.data.url, config.data.cache_dir, config.data.cache_bytes)
        notes = (precision_note, check_dataset(config, dataset), *dataset.notes)
        return cls(
            config=config,
            world=world,
            heart=heart,
            dataset=dataset,
            data_sha256=data_digest(dataset),
            held_out=held_out_mask(len(dataset), config.evaluate.held_out, config.evaluate.seed),
            plan=plan_of(config, world.size),
            root=root_of(config),
            work=_work(config, world),
            notes=tuple(filter(None, notes)),
        )


def _work(config: TrainConfig, world: World) -> Work:
    """What a step computes, and what a device could: as configured, or the mean of what all ranks measure."""
    flops_per_s = 1e12 * config.log.peak_tflops
    if not flops_per_s:
        dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
        flops_per_s = mean(world.gather(matmul_flops_per_s(dtype, world.device, budget_s=MATMUL_S)))
        if world.device.type == "cuda":  # the matrices are no part of the memory of training
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(world.device)
    flops_per_image = FLOPS_PER_MAC * TRAINING_FORWARDS * forward_macs(shape_of(config.model))
    return Work(config.global_batch, flops_per_image, flops_per_s)
