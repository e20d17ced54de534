"""One attempt of a run: its record in the chain of attempts, and everything that lives exactly as long."""

import time
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from dit_scale import rng
from dit_scale.checkpoint.attempts import AttemptRecord, Ranges, check_current
from dit_scale.checkpoint.manifest import Evaluated
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.data.loader import Loader
from dit_scale.data.order import ranges_of
from dit_scale.errors import StorageError
from dit_scale.heartbeat import Phase
from dit_scale.journal import Event
from dit_scale.telemetry.meters import COLUMNS, SKIPPED, Meters, StepRow
from dit_scale.telemetry.pace import Pace, over_ranks
from dit_scale.telemetry.progress import StatusLine
from dit_scale.telemetry.webhook import Notice
from dit_scale.train.claim import claim, next_attempt
from dit_scale.train.context import RunContext
from dit_scale.train.ema import ema_kind
from dit_scale.train.environment import environment
from dit_scale.train.evaluation_keys import headline
from dit_scale.train.logbook import Carried, Logbook, carried_over, check_writable
from dit_scale.train.memory import sharding
from dit_scale.train.rollback import failures_in_a_row, positions_of_steps, rollback_is_due
from dit_scale.train.run_state import state_of
from dit_scale.train.trainer import Trainer
from dit_scale.train.update_norms import update_ratio


class Attempt:
    """The part of a run from a restored state until it is done, stops, or rolls back.

    Creating it claims the next number and opens record, journal and loader. All ranks create it together and
    call the same public methods in the same order. `close` may be called more than once.
    """

    def __init__(
        self,
        context: RunContext,
        trainer: Trainer,
        checkpoint: Checkpoint | None,
        *,
        notes: list[str],
        start_s: float,
        previous: "Attempt | None" = None,
        excluded: Ranges = (),
    ) -> None:
        """Start from the checkpoint that was restored into `trainer` (None: from step 0).

        `notes` are shown and recorded with the start. `start_s` is when restoring started, by
        time.monotonic. After a rollback, `previous` is the attempt before it, and `excluded` are the
        positions to exclude.

        Raises SupersededError when another process has started the next attempt.
        """
        config, world, plan = context.config, context.world, context.plan
        self._context, self._trainer = context, trainer
        with ExitStack() as stack:
            first_step = checkpoint.manifest.step if checkpoint else 0
            self._status = StatusLine(config.steps, first_step, world.is_first)
            stack.callback(self._status.close)
            self.record, carried = self._claim(checkpoint, previous, excluded)
            self.state = state_of(config, checkpoint, self.record.excluded_positions)
            self._first_step = self._observed_step = self.state.step
            restore_s = time.monotonic() - start_s
            self.meters = Meters(self.state.pending)
            self.pace = Pace(world.device)
            self._logbook: Logbook | None = None
            if world.is_first:
                self._logbook = Logbook(
                    config=config,
                    root=context.root,
                    attempt=self.record.number,
                    carried=carried,
                    step=lambda: self.state.step,
                    say=self.say,
                )
                stack.callback(self._logbook.close)
            self.loader = Loader(
                dataset=context.dataset,
                config=config.data,
                plan=plan,
                rank=world.rank,
                seed=config.seed,
                first_step=self.state.step,
                excluded=self.state.excluded,
                quarantined=tuple(self.state.quarantined),
                held_out=context.held_out,
            )
            stack.callback(self.loader.close)
            self._announce(notes, restore_s)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Stop the loader and close record, journal and status line."""
        self._stack.close()

    def say(self, message: str) -> None:
        """Show a line on the terminal of rank 0."""
        self._status.say(message)

    def write(self, event: Event, **details: object) -> None:
        """Write an entry into the journal (rank 0 alone)."""
        if self._logbook:
            self._logbook.event(event, **details)

    def notify(self, notice: Notice, reason: str) -> None:
        """Send a message to the webhook of the run (rank 0 alone)."""
        if self._logbook:
            self._logbook.notify(notice, reason)

    def count(self, row: Tensor) -> None:
        """Count the step that has just finished; `row` is its `meters.StepRow`."""
        self.pace.finished()
        self.meters.add(row)
        self._status.advance()
        if self.state.step == self._first_step + 1:
            self.write(Event.FIRST_STEP, data_s=round(self.loader.waited_s, 3))

    def keeps_failing(self) -> bool:
        """Record the steps skipped since the last call; whether a rollback is due. Waits for the device."""
        rows = self.meters.collect()
        first = self.state.step - len(rows) + 1
        for step, row in enumerate(rows, first):
            if step > self._observed_step and row[SKIPPED]:
                self._note_skipped(step, row)
        self._observed_step = self.state.step
        config = self._context.config
        return rollback_is_due(
            self.failures(), self.state.step, config.guard.rollback_after, config.log.every_steps
        )

    def failures(self) -> int:
        """How many steps in a row were skipped, up to this one."""
        return failures_in_a_row(self.state.skipped, self.state.step)

    def has_new_damage(self) -> bool:
        """Whether this rank's loader replaced a sample that the run does not know of yet."""
        return not self.loader.quarantined().keys() <= self.state.quarantined.keys()

    def share_damage(self) -> None:
        """Tell all ranks which samples any of them had to replace, and record them."""
        for damaged in self._context.world.gather(self.loader.quarantined()):
            for sample_id, reason in sorted(damaged.items()):
                if sample_id not in self.state.quarantined:
                    self.state.quarantined[sample_id] = reason
                    self.write(Event.QUARANTINED, sample_id=sample_id, reason=reason)
                    self.say(f"sample {sample_id} is replaced from now on: {reason}")

    def log(self) -> None:
        """Write what the steps since the last log point measured; the ranks exchange their figures.

        Call `keeps_failing` before it.
        """
        last_updated = self.state.step - self.failures() - 1
        mine = (self.pace.take(self.loader.waited_s), self._trainer.update_norms(last_updated))
        figures, norms = zip(*self._context.world.gather(mine), strict=True)
        record = {
            "samples": self.state.step * self._context.config.global_batch,
            **self.meters.take(),
            "update_ratio": update_ratio(norms),
            **over_ranks(figures, self._context.work),
            "lr": self._trainer.engine.hyper_parameters()[0]["lr"],
        }
        for note in self.loader.notes():
            self.say(note)
        if self._logbook:
            self._logbook.row(record)
        self._status.report(self.state.step, record)
        self.write(Event.LOG, data_s=round(self.loader.waited_s, 3))

    def evaluated(
        self, result: Evaluated, values: dict[str, float | None], grids: dict[str, Path], seconds: float
    ) -> None:
        """Record an evaluation of the weights of this step, which took so long; `grids` are its pictures."""
        self.state.evaluated = result
        self.pace.exclude(seconds)
        if self._logbook:
            if values:
                samples = self.state.step * self._context.config.global_batch
                self._logbook.row({"samples": samples, **values})
            for profile, grid in grids.items():
                self._logbook.picture(f"evaluation/{profile}", grid)
        self.write(Event.EVALUATION, measure=result.measure, value=result.value, seconds=round(seconds, 3))
        found = headline(values) or "a grid of samples"
        self.say(f"evaluation of step {self.state.step} in {seconds:.1f} s: {found}")

    def finish(self) -> None:
        """Record that the run is done. Raises StorageError when its record is incomplete."""
        self.write(Event.DONE)
        self.notify(Notice.DONE, "all steps are taken and saved")
        if self._logbook and (problem := self._logbook.close()):
            raise StorageError(f"all {self.state.step} steps are taken and saved, but {problem}")
        self.say(f"done: {self.state.step} steps in {self._context.config.run}")

    def _claim(
        self, checkpoint: Checkpoint | None, previous: "Attempt | None", excluded: Ranges
    ) -> tuple[AttemptRecord, Carried]:
        """Claim the next number; on rank 0 also return the lines of record and journal to continue from."""
        config, root = self._context.config, self._context.root
        step = previous.state.step if previous else 0
        carried = Carried()

        def claim_and_carry() -> AttemptRecord:
            nonlocal carried
            check_writable(config)
            record = next_attempt(
                root, checkpoint.id if checkpoint else None, excluded, previous.record if previous else None
            )
            claim(
                root,
                record,
                config.checkpoint.deadline_s,
                lambda: self._context.heart.beat(Phase.RESTORE, step),
                self.say,
            )
            carried = carried_over(config, checkpoint, record.number)
            check_current(root, record.number)
            return record

        record = self._context.world.broadcast(claim_and_carry)
        return record, carried

    def _announce(self, notes: list[str], restore_s: float) -> None:
        """Show how the attempt starts, and write its first journal entry."""
        context, plan, config = self._context, self._context.plan, self._context.config
        notes = [*context.notes, *notes, *self.loader.notes()]
        peak_tflops, stated = context.work.flops_per_s / 1e12, bool(config.log.peak_tflops)
        for note in notes:
            self.say(note)
        self.say(
            f"{config.model.name} at {config.model.image_size} px, {config.engine.precision}, "
            f"{sharding(config.engine.zero_stage, plan.world)}, attention "
            f"{self._trainer.attention_backend}, draws by {rng.backend(context.world.device)}, on "
            f"{plan.world} x {context.world.device.type}: {plan.global_batch} samples per step in "
            f"{plan.micro_steps} micro-steps of {plan.micro_batch} per process; mfu is relative to "
            f"{peak_tflops:.3g} TFLOP/s per device, {'as configured' if stated else 'measured'}"
        )
        start = f"resumed at step {self.state.step}" if self.record.resumed_from else "a new run"
        self.say(f"{config.run}: {start}, attempt {self.record.number}")
        self.write(
            Event.START,
            resumed_from=self.record.resumed_from and self.record.resumed_from.path(),
            restore_s=round(restore_s, 3),
            world=plan.world,
            peak_tflops=float(f"{peak_tflops:.4g}"),
            peak_measured=not stated,
            attention=self._trainer.attention_backend,
            ema=[ema_kind(profile.name) for profile in config.ema],
            excluded_positions=self.state.excluded,
            environment=environment(context.world),
            notes=notes,
        )

    def _note_skipped(self, step: int, row: StepRow) -> None:
        self.state.skipped = (*self.state.skipped, step)
        config = self._context.config
        positions = positions_of_steps(range(step - 1, step), config.global_batch, self.state.excluded)
        sample_ids = self.loader.sample_ids(step - 1, self.state.quarantined)
        self.write(
            Event.SKIPPED_STEP,
            skipped_step=step,
            **dict(zip(COLUMNS[:-1], map(str, row), strict=False)),
            positions=ranges_of(positions),
            sample_ids=sample_ids.tolist(),
        )
        self.say(
            f"skipped step {step}: loss {row[0]:g}, gradient norm {row[3]:g}; events.jsonl lists its samples"
        )
