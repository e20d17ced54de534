"""Samples that spoil a step or cannot be read, and a run that reports the samples it was given."""

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from unittest.mock import patch

import google_crc32c
import numpy as np
import torch

from dit_scale.config import TrainConfig
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.data.order import Order
from dit_scale.data.shards import LATENT_DTYPE, LatentDataset, encode_sample, write_index
from dit_scale.train import loop
from dit_scale.train.objective import MicroBatchObserver, SampleLosses
from dit_scale.train.trainer import Trainer
from tests.support.latents import edit_info
from tests.support.ranks import jobs

Fed = dict[int, list[tuple[int, int]]]
"""Step, counted from 1 => (position, label) of the samples of one rank, or of all ranks."""


WORLD, BATCH, STEPS, NUM = 2, 7, 12, 200
"""No sample occurs twice: NUM exceeds what all steps need, including the excluded samples."""


def sample_of(step: int, place: int) -> int:
    """Return the id of a sample in a step, counted from 1, of a run that excludes nothing."""
    return int(ids_at(np.array([(step - 1) * BATCH + place]))[0])


def ids_at(positions: np.ndarray) -> np.ndarray:
    return Order(NUM, seed=0).ids(positions)


def config_of(
    folder: Path, data: Path, log_every_steps: int = 1, damaged: str = "stop", **guard: int
) -> TrainConfig:
    config = jobs.saving(jobs.small_config(folder, data), steps=STEPS, every_steps=3)
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"damaged": damaged}),
            "guard": config.guard.model_copy(update=guard),
            "log": config.log.model_copy(update={"every_steps": log_every_steps}),
        }
    )


def spoil(folder: Path, sample_ids: Collection[int]) -> None:
    """Make the latents of these samples NaN, with valid checksums."""
    dataset = LatentDataset.open(folder)
    npy = encode_sample(np.full(dataset.info.latent_shape, np.nan, LATENT_DTYPE))
    shards = list(dataset.info.shards)
    for number, shard in enumerate(shards):
        tar, records = bytearray((folder / shard.tar_key).read_bytes()), dataset.records(number).copy()
        for at in map(dataset.locate, sample_ids):
            if at.shard == number:
                start = int(records["offset"][at.row])
                tar[start : start + len(npy)] = npy
                records["crc32c"][at.row] = google_crc32c.value(npy)
        index = write_index(records)
        (folder / shard.tar_key).write_bytes(tar)
        (folder / shard.index_key).write_bytes(index)
        digests = {
            "sha256": hashlib.sha256(tar).hexdigest(),
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }
        shards[number] = shard.model_copy(update=digests)
    edit_info(folder, shards=[shard.model_dump(mode="json") for shard in shards])


def damage(folder: Path, sample_id: int) -> None:
    """Flip a bit of a sample, so that its checksum does not match."""
    dataset = LatentDataset.open(folder)
    at = dataset.locate(sample_id)
    path = folder / dataset.info.shards[at.shard].tar_key
    tar = bytearray(path.read_bytes())
    tar[int(dataset.records(at.shard)["offset"][at.row]) + 200] ^= 1
    path.write_bytes(tar)


def train_and_report(config: TrainConfig) -> Fed:
    """Train as one rank; a step that was taken twice is reported the second time."""
    fed: Fed = {}
    samples: list[tuple[int, int]] = []
    accumulate, update = Trainer.accumulate, Trainer.update

    def accumulate_and_tell(
        self: Trainer, batches: Iterator[MicroBatch], observer: MicroBatchObserver
    ) -> torch.Tensor:
        samples.clear()

        def tell(batch: MicroBatch, by_sample: SampleLosses) -> None:
            observer(batch, by_sample)
            real = batch.weight_B > 0
            samples.extend(zip(batch.position_B[real].tolist(), batch.y_B[real].tolist(), strict=True))

        return accumulate(self, batches, tell)

    def update_and_tell(self: Trainer, sums: torch.Tensor, step: int) -> torch.Tensor:
        fed[step + 1] = samples.copy()
        return update(self, sums, step)

    with (
        patch.object(Trainer, "accumulate", accumulate_and_tell),
        patch.object(Trainer, "update", update_and_tell),
    ):
        assert loop.train(config) == 0
    return fed


def of_all(ranks: list[Fed]) -> Fed:
    """Return the samples that all ranks were given, in order of position."""
    return {step: sorted(sample for fed in ranks for sample in fed[step]) for step in ranks[0]}
