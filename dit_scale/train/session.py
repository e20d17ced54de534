"""The objects of one run in this process, and the few things that the loop does with them.

`begin` starts an attempt: it fills in the newest checkpoint, claims the next number, opens the record and
the loader. A rollback begins another one in the same processes.
"""

import time
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from dit_scale import __version__
from dit_scale.checkpoint import reader
from dit_scale.checkpoint.attempts import AttemptRecord, Ranges, check_current
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, Manifest
from dit_scale.checkpoint.partition import MASTER, OPTIMIZER_KINDS
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.checkpoint.saver import Saver, SaveResult
from dit_scale.config import TrainConfig
from dit_scale.data.loader import Loader
from dit_scale.data.order import positions_of, ranges_of
from dit_scale.data.quarantine import Quarantine
from dit_scale.data.shards import LatentDataset
from dit_scale.dist import World
from dit_scale.errors import CheckpointError, StabilityError, StorageError
from dit_scale.heartbeat import Heart, Phase
from dit_scale.journal import Event
from dit_scale.telemetry.meters import COLUMNS, Meters, StepRow
from dit_scale.telemetry.progress import StatusLine
from dit_scale.telemetry.sinks import check_installed
from dit_scale.train.averages import restored_kinds
from dit_scale.train.claim import claim, next_attempt
from dit_scale.train.dataset_check import check_dataset, data_digest
from dit_scale.train.ema import ema_kind
from dit_scale.train.logbook import Carried, Logbook, carried_over, check_writable
from dit_scale.train.memory import plan_of
from dit_scale.train.precision import choose_precision
from dit_scale.train.restore import find_checkpoint
from dit_scale.train.run_folder import record_of, root_of
from dit_scale.train.run_state import RunState, merged, state_of
from dit_scale.train.trainer import Trainer

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # between two tries of the last save


class Session:
    """Everything that a run needs in this process. Every public method is called by all ranks alike."""

    def __init__(self, config: TrainConfig, world: World, stack: ExitStack, heart: Heart) -> None:
        """`heart` is told that a long read, or a long wait, gets on."""
        config, precision_note = choose_precision(config, world)
        self.config, self.world, self._heart = config, world, heart
        check_installed(config.log)
        dataset = LatentDataset.open(config.data.url, config.data.cache_dir, config.data.cache_bytes)
        self._notes = [precision_note, check_dataset(config, dataset), *dataset.notes]
        self.plan = plan_of(config, world.size)
        self._dataset = dataset
        self._data_sha256, self._vae_sha256 = data_digest(dataset), dataset.info.vae.weights_sha256
        self._root = root_of(config)
        self.state = RunState()
        self.trainer = Trainer(config, world, self.plan, dataset.info.vae.scale)
        self.saver = Saver(
            world, self._root.url, self.trainer.engine.owned, config.checkpoint, record_of(config)
        )
        stack.callback(self.saver.close)
        self._attempt_stack = stack.enter_context(ExitStack())
        self._logbook: Logbook | None = None
        self._carried = Carried()
        self._rollbacks = 0
        self._began_step = self._observed_step = self._saved_step = self._committed_step = 0

    def begin(
        self, at_most_step: int | None = None, excluded: Ranges = (), behind: AttemptRecord | None = None
    ) -> None:
        """Start an attempt from the newest checkpoint (up to a step), or from nothing.

        Raises SupersededError when another one has begun behind the attempt `behind`.
        """
        config, notes, begin_s = self.config, list[str](), time.monotonic()
        self._heart.beat(Phase.RESTORE, self.state.step)
        # A configuration that this run refuses must not count as an attempt or replace its config.yaml.
        found = find_checkpoint(
            config,
            self._data_sha256,
            self.world,
            lambda checkpoint: self._fill(checkpoint, notes),
            notes.append,
            at_most_step,
        )
        self.status = StatusLine(config.steps, found.manifest.step if found else 0, self.world.is_first)
        self._attempt_stack.callback(self.status.close)
        self._heart.beat(Phase.RESTORED, self.state.step)
        self.attempt = self.world.broadcast(lambda: self._claim(found, excluded, behind))
        self._go_on_from(found)
        self._open(notes, found is not None, restore_s=time.monotonic() - begin_s)

    def say(self, message: str) -> None:
        self.status.say(message)

    def count(self, row: Tensor) -> None:
        """A step was taken; `row` as Meters has it."""
        self.meters.add(row)
        self.status.advance()
        if self.state.step == self._began_step + 1:
            self._record(Event.FIRST_STEP, data_s=round(self.loader.waited_s, 3))

    def keeps_failing(self) -> bool:
        """Look at the steps since the last look, and name those that were skipped: waits for the device.

        Whether too many in a row were, up to this one. Multiples of log.every_steps alone decide that: at
        which other steps the run comes here depends on how long its saves take.
        """
        rows = self.meters.collect()
        first = self.state.step - len(rows) + 1
        for step, row in enumerate(rows, first):
            if step > self._observed_step and row[-1]:
                self._note_skipped(step, row)
        self._observed_step = self.state.step
        decides = self.state.step % self.config.log.every_steps == 0
        return decides and self._failures() >= self.config.guard.rollback_after

    def roll_back(self) -> None:
        """Go back to before the steps that failed, and leave their positions out from now on.

        Raises StabilityError when that has not helped before.
        """
        failures = self._failures()
        before = self.state.step - failures
        positions = self._positions(before, self.state.step)
        excluded = merged((*self.state.excluded, *ranges_of(positions)))
        message = f"{failures} steps in a row failed, from step {before + 1} on"
        if self._rollbacks == self.config.guard.max_rollbacks:
            raise StabilityError(
                f"{self.config.run}: {message}, after {self.config.guard.max_rollbacks} rollbacks; lower "
                "optimizer.lr or look at one of them with `dit-scale replay`"
            )
        self._report(self._wait_for_save())
        self._record(Event.ROLLBACK, failed_steps=[before + 1, self.state.step], excluded_positions=excluded)
        self.say(f"{message}: going back to a checkpoint before it, and on without its samples")
        self._heart.beat(Phase.WAIT_SAVE, self.state.step)  # the last rows of a mirror may take a while
        self._attempt_stack.close()
        self._rollbacks += 1
        self.begin(before, excluded, behind=self.attempt)

    def has_found_damage(self) -> bool:
        """Whether this rank's loader replaced a sample that the run does not know of yet."""
        return not self.loader.quarantined().keys() <= self.state.quarantined.keys()

    def note_damage(self) -> None:
        """Make the samples that any rank had to replace known to all, and write them down."""
        for found in self.world.gather(self.loader.quarantined()):
            for sample_id, reason in sorted(found.items()):
                if sample_id not in self.state.quarantined:
                    self.state.quarantined[sample_id] = reason
                    self._record(Event.QUARANTINED, sample_id=sample_id, reason=reason)
                    self.say(f"sample {sample_id} is replaced from now on: {reason}")

    def log(self) -> None:
        """Close the window of steps since the last log point and write it down."""
        record = {
            "samples": self.state.step * self.config.global_batch,
            **self.meters.take(),
            "lr": self.trainer.engine.hyper_parameters()[0]["lr"],
        }
        for note in self.loader.notes():
            self.say(note)
        if self._logbook:
            self._logbook.row(record)
        self.status.report(self.state.step, record)
        self._record(Event.LOG, data_s=round(self.loader.waited_s, 3))

    def save_is_due(self) -> bool:
        """Whether this step, or one that passed while a save was in flight, asks for a save."""
        every = (self.config.checkpoint.every_steps, self.config.checkpoint.ema_every_steps)
        return not self.saver.in_flight and any(self._passed(steps, self._saved_step) for steps in every)

    def save(self) -> None:
        """Begin to save this step in the background, unless it failed: a rollback needs what is there."""
        if not self._failures():
            self._begin_save()

    def _begin_save(self) -> None:
        profiles, kinds = self.config.ema, (*OPTIMIZER_KINDS, *(ema_kind(p.name) for p in self.config.ema))
        folders = {CHECKPOINTS: kinds}
        stored = tuple(ema_kind(profile.name) for profile in profiles if profile.sigma_rel is not None)
        if stored and self._passed(self.config.checkpoint.ema_every_steps, since=self._committed_step):
            # before the checkpoint: a run that goes on from it has this average behind it
            folders = {EMA: stored, **folders}
        begin_s = time.monotonic()
        self.saver.begin(self._manifest(), folders)
        self._saved_step = self.state.step
        self._record(Event.SAVE, stall_s=round(time.monotonic() - begin_s, 4))

    def follow_save(self, any_at_work: bool, any_failed: bool) -> None:
        """See how the save in flight is doing, given the vote of all ranks."""
        self._report(self.saver.advance(any_at_work, any_failed))

    def save_and_wait(self) -> None:
        """Commit this step before going on; tried again, if it can help, for `checkpoint.deadline_s`.

        Raises CheckpointError, on all ranks, when it cannot be done.
        """
        self.note_damage()
        begin_s, pause_s = time.monotonic(), FIRST_PAUSE_S
        self._report(self._wait_for_save())
        give_up_s = time.monotonic() + self.config.checkpoint.deadline_s
        while self._committed_step != self.state.step:
            self._begin_save()
            outcome = self._wait_for_save()
            self._report(outcome)
            assert outcome is not None
            is_late = self.world.broadcast(lambda: time.monotonic() > give_up_s)
            if outcome.problem and (outcome.is_final or is_late):
                raise CheckpointError(f"{self._root.url}: the last save failed: {outcome.problem}")
            if outcome.problem:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._record(Event.WAITED, stall_s=round(time.monotonic() - begin_s, 4))

    def _wait_for_save(self) -> SaveResult | None:
        return self.saver.wait(lambda: self._heart.beat(Phase.WAIT_SAVE, self.state.step))

    def finish(self) -> None:
        """The run is done: say where everything is. Raises StorageError when its record is not whole."""
        self._record(Event.DONE)
        if self._logbook and (problem := self._logbook.close()):
            raise StorageError(f"all {self.state.step} steps are taken and saved, but {problem}")
        self.say(f"done: {self.state.step} steps in {self.config.run}")

    def _claim(
        self, found: Checkpoint | None, excluded: Ranges, behind: AttemptRecord | None
    ) -> AttemptRecord:
        """Begin the next attempt, and read what it goes on from (rank 0 alone)."""
        check_writable(self.config)
        attempt = next_attempt(self._root, found.id if found else None, excluded, behind)
        claim(
            self._root,
            attempt,
            self.config.checkpoint.deadline_s,
            lambda: self._heart.beat(Phase.RESTORE, self.state.step),
            self.say,
        )
        self._carried = carried_over(self.config, found, attempt.number)
        check_current(self._root, attempt.number)
        return attempt

    def _fill(self, found: Checkpoint, notes: list[str]) -> None:
        """Read what this rank owns. No collectives: a rank that cannot read must not keep others waiting."""
        said = list[str]()
        old, new = restored_kinds(self.config, found, said.append)
        owned = self.trainer.engine.owned

        def read(kind: str, parameter: str, start: int, length: int) -> Tensor:
            self._heart.beat(Phase.RESTORE, self.state.step)
            return found.read(kind, parameter, start, length)

        try:
            reader.fill(owned, (*OPTIMIZER_KINDS, *old), read)
            reader.fill(owned, new, lambda _, *where: read(MASTER, *where))
        finally:
            self._heart.beat(Phase.RESTORED, self.state.step)
        notes += said

    def _go_on_from(self, found: Checkpoint | None) -> None:
        self.state = state_of(self.config, found, self.attempt.excluded_positions)
        if found is None:
            self.trainer.start()
        else:
            self.trainer.resume(found.manifest.guard)
        self._began_step = self._observed_step = self._saved_step = self._committed_step = self.state.step

    def _open(self, notes: list[str], resumed: bool, restore_s: float) -> None:
        """The record, the journal and the loader of this attempt."""
        config, state, stack = self.config, self.state, self._attempt_stack
        self.meters = Meters(config.global_batch, state.pending)
        self._logbook = None
        if self.world.is_first:
            number, carried = self.attempt.number, self._carried
            self._logbook = Logbook(config, self._root, number, carried, lambda: self.state.step, self.say)
            stack.callback(self._logbook.close)
        self.loader = Loader(
            self._dataset,
            config.data,
            self.plan,
            self.world.rank,
            config.seed,
            state.step,
            state.excluded,
            tuple(state.quarantined),
        )
        stack.callback(self.loader.close)
        self._announce(notes, resumed, restore_s)

    def _announce(self, notes: list[str], resumed: bool, restore_s: float) -> None:
        plan, config = self.plan, self.config
        notes = [*filter(None, self._notes), *notes, *self.loader.notes()]
        for note in notes:
            self.say(note)
        self.say(
            f"{config.model.name} at {config.model.image_size} px, {config.engine.precision}, "
            f"ZeRO-{config.engine.zero_stage}, attention {self.trainer.attention_backend}, on {plan.world} x "
            f"{self.world.device.type}: {plan.global_batch} samples per step in {plan.micro_steps} "
            f"micro-steps of {plan.micro_batch} per process"
        )
        start = f"resumed at step {self.state.step}" if resumed else "a new run"
        self.say(f"{config.run}: {start}, attempt {self.attempt.number}")
        self._record(
            Event.START,
            resumed_from=self.attempt.resumed_from and self.attempt.resumed_from.path(),
            restore_s=round(restore_s, 3),
            world=plan.world,
            attention=self.trainer.attention_backend,
            ema=[ema_kind(profile.name) for profile in config.ema],
            excluded_positions=self.state.excluded,
            notes=notes,
        )

    def _manifest(self) -> Manifest:
        config, state = self.config, self.state
        return Manifest(
            step=state.step,
            samples=state.step * config.global_batch,
            attempt=self.attempt.number,
            config=config.model_dump(mode="json"),
            data_sha256=self._data_sha256,
            vae_sha256=self._vae_sha256,
            model_shapes=self.trainer.shapes,
            optimizer_groups=self.trainer.engine.hyper_parameters(),
            pending_metrics=self.meters.collect(),
            guard=self.trainer.guard.state(),
            skipped_steps=state.skipped,
            excluded_positions=state.excluded,
            quarantined=dict(state.quarantined),
            ema_since=state.ema_since,
            versions={"dit_scale": __version__, "torch": torch.__version__},
            written_by={"world": self.world.size, "zero_stage": config.engine.zero_stage},
        )

    def _passed(self, every_steps: int, since: int) -> bool:
        """Whether a multiple of so many steps lies between that step and this one."""
        return every_steps > 0 and self.state.step // every_steps > since // every_steps

    def _report(self, outcome: SaveResult | None) -> None:
        """Say and write down how a save ended."""
        if outcome is None:
            return
        name = outcome.manifest.id.name
        if outcome.problem:
            self._record(Event.SAVE_FAILED, name=name, problem=outcome.problem)
            self.say(f"ALARM: checkpoint {name} is not saved, training goes on: {outcome.problem}")
            return
        self._committed_step = outcome.manifest.step
        if self._committed_step not in outcome.manifest.skipped_steps:
            self._rollbacks = 0
        self._record(Event.CHECKPOINT, name=name, dropped=outcome.dropped, seconds=round(outcome.seconds, 3))
        if outcome.retention_problem:
            self._record(Event.RETENTION_FAILED, name=name, problem=outcome.retention_problem)
            self.say(f"ALARM: old checkpoints stay: {outcome.retention_problem}")

    def _note_skipped(self, step: int, row: StepRow) -> None:
        self.state.skipped = (*self.state.skipped, step)
        positions = self._positions(step - 1, step)
        # the loader of this rank does not know of damage that the others found
        quarantine = Quarantine(len(self._dataset), self.state.quarantined, self.config.data.damaged)
        sample_ids = quarantine.replace(self.loader.sample_ids(step - 1))
        self._record(
            Event.SKIPPED_STEP,
            skipped_step=step,
            **dict(zip(COLUMNS[:-1], map(str, row), strict=False)),
            positions=ranges_of(positions),
            sample_ids=sample_ids.tolist(),
        )
        self.say(
            f"step {step} is skipped: loss {row[0]:g}, gradient norm {row[3]:g}; its samples: events.jsonl"
        )

    def _failures(self) -> int:
        """How many steps in a row were skipped, up to this one."""
        count = 0
        while self.state.step - count in self.state.skipped[-count - 1 :]:
            count += 1
        return count

    def _positions(self, first_step: int, end_step: int) -> np.ndarray:
        """The positions of these steps (counted from 0, the end not among them)."""
        batch = self.config.global_batch
        indices = np.arange(first_step * batch, end_step * batch, dtype=np.int64)
        return positions_of(indices, self.state.excluded)

    def _record(self, event: Event, **details: object) -> None:
        if self._logbook:
            self._logbook.event(event, **details)
