"""THE loop: one training run from its configuration to its last checkpoint.

    dit-scale train configs/demo.yaml
    deepspeed -q --num_gpus 8 --no_local_rank --module dit_scale.cli train configs/dit_xl2_256.yaml

Started again with the same command it goes on from the newest committed checkpoint.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack

from dit_scale import dist
from dit_scale.config import TrainConfig
from dit_scale.data.loader import Batch
from dit_scale.heartbeat import Heart, Phase
from dit_scale.signals import REQUEUE_EXIT_CODE, StopRequest
from dit_scale.train import determinism
from dit_scale.train.session import Session


def train(config: TrainConfig) -> int:
    """Run, or resume, to the last step. Returns the exit code: 0 done, 75 stopped on request and saved."""
    stop = StopRequest()
    heart = Heart(int(os.environ.get("RANK", "0")))
    determinism.pin(config.engine)
    world = dist.start(config.engine)
    with ExitStack() as stack:
        stack.callback(dist.stop)
        run = Session(config, world, stack, heart)
        run.begin()
        gc.collect()
        gc.freeze()  # so that no collection stops a step in order to look at what stays
        gc.enable()
        if run.state.step >= config.steps:
            run.say(f"the run is done: its newest checkpoint is step {run.state.step}, steps={config.steps}")
        while run.state.step < config.steps:
            sums = run.trainer.accumulate(_beating(heart, run.loader, run.state.step))
            # Late in the step, so that a request to stop counts for this one; its answer comes meanwhile.
            vote = world.start_vote(stop.wanted, *run.saver.flags(), run.has_found_damage())
            row = run.trainer.update(sums, run.state.step)
            run.state.step += 1
            heart.beat(Phase.AGREE, run.state.step)
            run.count(row)

            stopping, at_work, failed, damage = vote.result()
            run.follow_save(at_work, failed)
            if damage:
                run.note_damage()
            last = run.state.step == config.steps
            log_point = last or run.state.step % config.log.every_steps == 0
            save_point = last or stopping or run.save_is_due()
            heart.beat(Phase.LOG, run.state.step)
            if (log_point or save_point) and run.keeps_failing():
                run.roll_back()
                continue
            if log_point:
                run.log()
            if last or stopping:
                heart.beat(Phase.WAIT_SAVE, run.state.step)
                run.save_and_wait()
            elif save_point:
                heart.beat(Phase.SAVE, run.state.step)
                run.save()
            if stopping and not last:
                run.say(f"stopped on request at step {run.state.step}; the same command goes on from there")
                return REQUEUE_EXIT_CODE
        heart.beat(Phase.LOG, run.state.step)
        run.finish()
    return 0


def _beating(heart: Heart, batches: Iterator[Batch], step: int) -> Iterator[Batch]:
    """The same batches; the heart tells the wait for one from the work on it."""
    while True:
        heart.beat(Phase.DATA, step)
        batch = next(batches)
        heart.beat(Phase.COMPUTE, step)
        yield batch
