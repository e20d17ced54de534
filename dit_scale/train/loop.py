"""THE loop: one training run from its configuration to its last checkpoint.

    dit-scale train configs/demo.yaml
    deepspeed -q --num_gpus 8 --no_local_rank --module dit_scale.cli train configs/dit_xl2_256.yaml

The same command resumes the run from its newest committed checkpoint.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack

from dit_scale import dist
from dit_scale.config import TrainConfig
from dit_scale.data.micro_batch import MicroBatch
from dit_scale.heartbeat import Heart, Phase
from dit_scale.signals import REQUEUE_EXIT_CODE, StopRequest
from dit_scale.train import determinism
from dit_scale.train.attempt import Attempt
from dit_scale.train.session import Session


def train(config: TrainConfig) -> int:
    """Train to the last step, resuming if there is something to resume.

    Returns the exit code: 0 when the run is done, 75 when it was asked to stop and has saved.
    """
    stop = StopRequest()
    heart = Heart(int(os.environ.get("RANK", "0")))
    determinism.pin(config.engine)
    world = dist.start(config.engine)
    with ExitStack() as stack:
        stack.callback(dist.stop)
        run = Session(config, world, heart, stack)
        gc.collect()
        gc.freeze()  # collections must not stop a step to scan objects that live as long as the run
        gc.enable()
        if run.state.step >= config.steps:
            run.attempt.say(
                f"the run is done: its newest checkpoint is step {run.state.step}, steps={config.steps}"
            )
        while run.state.step < config.steps:
            attempt, saves, state = run.attempt, run.saves, run.state
            if run.evaluate(stop):  # due here only before the first step of an attempt
                saves.save_and_wait()
                return REQUEUE_EXIT_CODE
            batches = _watched(attempt, heart, state.step)
            sums = run.trainer.accumulate(batches, attempt.pace.computed)
            # Late in the step, so that a request to stop still counts for it; the answer arrives meanwhile.
            vote = world.start_vote(stop.wanted, *saves.flags(), attempt.has_new_damage())
            row = run.trainer.update(sums, state.step)
            state.step += 1
            heart.beat(Phase.AGREE, state.step)
            attempt.count(row)

            stopping, any_busy, any_failed, any_damage = vote.result()
            saves.follow(any_busy, any_failed)
            if any_damage:
                attempt.share_damage()
            last = state.step == config.steps
            log_point = last or state.step % config.log.every_steps == 0
            best_point = config.checkpoint.keep_best and run.evaluation_is_due()
            save_point = last or stopping or best_point or saves.is_due()
            heart.beat(Phase.LOG, state.step)
            if (log_point or save_point) and attempt.keeps_failing():
                run.roll_back()
                continue
            if log_point:
                attempt.log()
            stopping |= run.evaluate(stop)
            if last or stopping:
                heart.beat(Phase.WAIT_SAVE, state.step)
                saves.save_and_wait()
            elif save_point:
                heart.beat(Phase.SAVE, state.step)
                saves.save()
            if stopping and not last:
                attempt.say(f"stopped on request at step {state.step}; the same command resumes the run")
                return REQUEUE_EXIT_CODE
        heart.beat(Phase.LOG, run.state.step)
        run.attempt.finish()
    return 0


def _watched(attempt: Attempt, heart: Heart, step: int) -> Iterator[MicroBatch]:
    """Yield the micro-batches; heartbeat and pace tell the wait for one from the work on it."""
    while True:
        heart.beat(Phase.DATA, step)
        attempt.pace.waits()
        batch = next(attempt.loader)
        heart.beat(Phase.COMPUTE, step)
        yield batch
