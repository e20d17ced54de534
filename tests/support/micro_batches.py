"""Micro-batches read directly, as an oracle for the loader."""

import numpy as np

from dit_scale.data.micro_batch import MicroBatch
from dit_scale.data.order import Order
from dit_scale.data.quarantine import Quarantine
from dit_scale.data.sample_reader import SampleReader
from dit_scale.data.shards import LatentDataset


def read_micro_batch(
    dataset: LatentDataset, positions_B: np.ndarray, num_real: int, seed: int, flip: bool
) -> MicroBatch:
    """The micro-batch at these positions of a run without windows, as a Loader returns it."""
    quarantine = Quarantine(len(dataset), (), "stop")
    reader = SampleReader(dataset, Order(len(dataset), seed), seed, flip, quarantine)
    return reader.micro_batch(positions_B, *reader.draws(positions_B), num_real)
