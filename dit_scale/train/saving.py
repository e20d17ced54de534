"""The saves of an attempt: when one is due, what its manifest says, and how it turned out."""

import time

import torch

from dit_scale import __version__
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, Manifest
from dit_scale.checkpoint.partition import OPTIMIZER_KINDS
from dit_scale.checkpoint.saver import Saver, SaveResult
from dit_scale.errors import CheckpointError
from dit_scale.heartbeat import Phase
from dit_scale.journal import Event
from dit_scale.train.attempt import Attempt
from dit_scale.train.context import RunContext
from dit_scale.train.ema import ema_kind
from dit_scale.train.trainer import Trainer

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Backoff between two tries of the last save."""


class Saves:
    """Drives the saver through the saves of one attempt. All ranks call every public method alike."""

    def __init__(self, context: RunContext, trainer: Trainer, saver: Saver, attempt: Attempt) -> None:
        self._context, self._trainer, self._saver, self._attempt = context, trainer, saver, attempt
        self._saved_step = self._committed_step = attempt.state.step
        self.has_progress = False
        """Whether this attempt has committed a step that was not skipped."""

    def flags(self) -> tuple[bool, bool]:
        """(this rank's writer is busy, it has failed): this rank's part of the vote."""
        return self._saver.flags()

    def is_due(self) -> bool:
        """Whether this step, or one that passed while a save was in flight, calls for a save."""
        config = self._context.config.checkpoint
        intervals = (config.every_steps, config.ema_every_steps)
        return not self._saver.in_flight and any(self._passed(steps, self._saved_step) for steps in intervals)

    def save(self) -> None:
        """Start to save this step asynchronously, after waiting for a save in flight.

        A step that failed is not saved: a rollback needs the checkpoints before it.
        """
        self._wait()
        if not self._attempt.failures():
            self._start()

    def follow(self, any_busy: bool, any_failed: bool) -> None:
        """Advance the save in flight, given the vote of all ranks."""
        self._report(self._saver.advance(any_busy, any_failed))

    def wait(self) -> None:
        """Wait until no save is in flight."""
        self._wait()

    def save_and_wait(self) -> None:
        """Commit this step before continuing; retries for up to `checkpoint.deadline_s`.

        Raises CheckpointError, on all ranks, when that fails.
        """
        self._attempt.share_damage()
        start_s, pause_s = time.monotonic(), FIRST_PAUSE_S
        self._wait()
        give_up_s = time.monotonic() + self._context.config.checkpoint.deadline_s
        while self._committed_step != self._attempt.state.step:
            self._start()
            result = self._wait()
            assert result is not None
            is_late = self._context.world.broadcast(lambda: time.monotonic() > give_up_s)
            if result.problem and (result.is_final or is_late):
                raise CheckpointError(f"{self._context.root.url}: the last save failed: {result.problem}")
            if result.problem:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._attempt.write(Event.WAITED, stall_s=round(time.monotonic() - start_s, 4))

    def _start(self) -> None:
        config, state = self._context.config, self._attempt.state
        kinds = (*OPTIMIZER_KINDS, *(ema_kind(profile.name) for profile in config.ema))
        folders = {CHECKPOINTS: kinds}
        stored = tuple(ema_kind(profile.name) for profile in config.ema if profile.sigma_rel is not None)
        if stored and self._passed(config.checkpoint.ema_every_steps, since=self._committed_step):
            # Before the checkpoint: a run that resumes from it must find this average.
            folders = {EMA: stored, **folders}
        start_s = time.monotonic()
        self._saver.begin(self._manifest(), folders)
        self._saved_step = state.step
        self._attempt.write(Event.SAVE, stall_s=round(time.monotonic() - start_s, 4))

    def _wait(self) -> SaveResult | None:
        heart, step = self._context.heart, self._attempt.state.step
        result = self._saver.wait(lambda: heart.beat(Phase.WAIT_SAVE, step))
        self._report(result)
        return result

    def _manifest(self) -> Manifest:
        context, config, state = self._context, self._context.config, self._attempt.state
        return Manifest(
            step=state.step,
            samples=state.step * config.global_batch,
            attempt=self._attempt.record.number,
            config=config.model_dump(mode="json"),
            data_sha256=context.data_sha256,
            vae_sha256=context.dataset.info.vae.weights_sha256,
            model_shapes=self._trainer.shapes,
            optimizer_groups=self._trainer.engine.hyper_parameters(),
            pending_metrics=self._attempt.meters.collect(),
            guard=self._trainer.guard.state(),
            skipped_steps=state.skipped,
            excluded_positions=state.excluded,
            quarantined=dict(state.quarantined),
            ema_since=state.ema_since,
            evaluated=state.evaluated,
            versions={"dit_scale": __version__, "torch": torch.__version__},
            written_by={"world": context.world.size, "zero_stage": config.engine.zero_stage},
        )

    def _passed(self, every_steps: int, since: int) -> bool:
        """Whether a multiple of `every_steps` lies after step `since`, up to this step."""
        return every_steps > 0 and self._attempt.state.step // every_steps > since // every_steps

    def _report(self, result: SaveResult | None) -> None:
        """Show and record how a save ended."""
        if result is None:
            return
        attempt, name = self._attempt, result.manifest.id.name
        if result.problem:
            attempt.write(Event.SAVE_FAILED, name=name, problem=result.problem)
            attempt.say(f"ALARM: checkpoint {name} was not saved, training continues: {result.problem}")
            return
        self._committed_step = result.manifest.step
        if self._committed_step not in result.manifest.skipped_steps:
            self.has_progress = True
        attempt.write(Event.CHECKPOINT, name=name, dropped=result.dropped, seconds=round(result.seconds, 3))
        if result.retention_problem:
            attempt.write(Event.RETENTION_FAILED, name=name, problem=result.retention_problem)
            attempt.say(f"ALARM: old checkpoints were not pruned: {result.retention_problem}")
