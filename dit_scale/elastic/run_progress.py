"""What a supervisor asks of the run: its newest checkpoint, and the samples of a step."""

import numpy as np

from dit_scale.checkpoint import attempts
from dit_scale.config import TrainConfig
from dit_scale.data.held_out import held_out_mask
from dit_scale.data.order import Order, positions_of
from dit_scale.data.shards import read_info
from dit_scale.errors import DitScaleError
from dit_scale.storage import Storage, open_storage


def committed_step(root: Storage) -> int:
    """Return the step of the newest checkpoint whose manifest can be read; -1 when there is none."""
    committed = attempts.committed(root)
    return next((newest.step for newest in committed if attempts.is_readable(root, newest)), -1)


def samples_of(config: TrainConfig, root: Storage, step: int) -> list[int]:
    """Return the sample ids of the step that follows `step` steps, with damaged samples not yet replaced."""
    try:
        info = read_info(open_storage(config.data.url))
        attempt = attempts.newest(root)
        held_out = held_out_mask(info.samples, config.evaluate.held_out, config.evaluate.seed)
    except DitScaleError:
        return []  # this may be why the run failed, which the message says already
    sizes = [shard.samples for shard in info.shards]
    indices = np.arange(step * config.global_batch, (step + 1) * config.global_batch, dtype=np.int64)
    positions = positions_of(indices, attempt.excluded_positions if attempt else ())
    order = Order(info.samples, config.seed, sizes, config.data.window_shards, held_out)
    ids: list[int] = order.ids(positions).tolist()
    return ids
