"""One run in this process: what outlives a rollback, and the current attempt."""

import time
from contextlib import ExitStack

from dit_scale.checkpoint.saver import Saver
from dit_scale.config import TrainConfig
from dit_scale.dist import World
from dit_scale.errors import StabilityError
from dit_scale.heartbeat import Heart, Phase
from dit_scale.journal import Event
from dit_scale.signals import StopRequest
from dit_scale.telemetry.webhook import Notice
from dit_scale.train.attempt import Attempt
from dit_scale.train.context import RunContext
from dit_scale.train.evaluation import Evaluation
from dit_scale.train.restore import restore
from dit_scale.train.rollback import Rollback, plan_rollback
from dit_scale.train.run_folder import carried_files
from dit_scale.train.run_state import RunState
from dit_scale.train.saving import Saves
from dit_scale.train.trainer import Trainer


class Session:
    """Trainer, saver and evaluation, which live as long as the process, and the current attempt.

    Creating it starts an attempt from the newest checkpoint. A rollback replaces `attempt` and `saves`.
    All ranks create it together and call the same public methods in the same order.
    """

    def __init__(self, config: TrainConfig, world: World, heart: Heart, stack: ExitStack) -> None:
        """`heart` gets a beat whenever a long read or wait makes progress; `stack` closes the session."""
        self._context = RunContext.open(config, world, heart)
        self.config = config = self._context.config
        plan, scale = self._context.plan, self._context.dataset.info.vae.scale
        self.trainer = Trainer(config, world, plan, scale)
        self.saver = Saver(
            world,
            self._context.root.url,
            self.trainer.engine.owned,
            config.checkpoint,
            carried_files(config),
        )
        stack.callback(self.saver.close)
        self._evaluation = Evaluation(self._context, self.trainer)
        self._rollbacks = 0
        """Rollbacks in a row, without progress between them."""
        self.attempt, self.saves = self._start_attempt()
        stack.callback(lambda: self.attempt.close())

    @property
    def state(self) -> RunState:
        """The state of the current attempt."""
        return self.attempt.state

    def evaluation_is_due(self) -> bool:
        """Whether the current step calls for an evaluation that has not been made yet."""
        return self._evaluation.is_due(self.attempt)

    def evaluate(self, stop: StopRequest) -> bool:
        """Evaluate the weights if that is due. Returns whether a request to stop prevented it."""
        return self.evaluation_is_due() and self._evaluation.run(self.attempt, stop)

    def roll_back(self) -> None:
        """Return to a checkpoint before the failed steps, and exclude their positions from now on.

        Raises StabilityError when `guard.max_rollbacks` in a row did not help.
        """
        attempt, guard = self.attempt, self.config.guard
        rollback = plan_rollback(
            attempt.failures(), self.state.step, self.config.global_batch, self.state.excluded
        )
        if self._rollbacks_in_a_row() == guard.max_rollbacks:
            raise StabilityError(
                f"{self.config.run}: {rollback.reason}, after {guard.max_rollbacks} rollbacks; lower "
                "optimizer.lr, or look at one of the steps with `dit-scale replay`"
            )
        self.saves.wait()
        attempt.write(
            Event.ROLLBACK,
            failed_steps=[rollback.first_failed_step, rollback.last_failed_step],
            excluded_positions=rollback.excluded,
        )
        attempt.say(f"{rollback.reason}: rolling back to a checkpoint before it and excluding its samples")
        # The message, or the last rows of a mirror, may take a while.
        self._context.heart.beat(Phase.WAIT_SAVE, self.state.step)
        attempt.notify(Notice.ROLLED_BACK, rollback.reason)
        attempt.close()
        self._rollbacks = self._rollbacks_in_a_row() + 1
        self.attempt, self.saves = self._start_attempt(rollback, attempt)

    def _rollbacks_in_a_row(self) -> int:
        return 0 if self.saves.has_progress else self._rollbacks

    def _start_attempt(
        self, rollback: Rollback | None = None, previous: Attempt | None = None
    ) -> tuple[Attempt, Saves]:
        """Restore the newest checkpoint, or one before the failed steps, and claim the next attempt.

        The order matters: a configuration that the run refuses must not count as an attempt.
        """
        start_s, notes = time.monotonic(), list[str]()
        checkpoint = restore(
            self._context,
            self.trainer,
            notes.append,
            step=previous.state.step if previous else 0,
            at_most_step=rollback.at_most_step if rollback else None,
        )
        attempt = Attempt(
            self._context,
            self.trainer,
            checkpoint,
            notes=notes,
            start_s=start_s,
            previous=previous,
            excluded=rollback.excluded if rollback else (),
        )
        return attempt, Saves(self._context, self.trainer, self.saver, attempt)
