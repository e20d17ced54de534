"""THE loop: one training run from its configuration to its last checkpoint.

    dit-scale train configs/demo.yaml
    deepspeed --num_gpus 8 --no_local_rank --module dit_scale.cli train configs/dit_xl2_256.yaml

Started again with the same command it goes on from the newest committed checkpoint.
"""

from contextlib import ExitStack
from pathlib import Path

import torch

from dit_scale import __version__, dist
from dit_scale.config import TrainConfig
from dit_scale.data.loader import Loader
from dit_scale.data.plan import BatchPlan, batch_plan
from dit_scale.data.shards import LatentDataset
from dit_scale.dist import World
from dit_scale.storage import open_storage
from dit_scale.telemetry.meters import Meters
from dit_scale.telemetry.progress import StatusLine
from dit_scale.telemetry.sinks import Journal, Sink, open_sinks
from dit_scale.train import checkpoint as checkpoints
from dit_scale.train import determinism
from dit_scale.train.ema import ema_kind
from dit_scale.train.engine import MASTER, OPTIMIZER_KINDS
from dit_scale.train.run import (
    RunState,
    begin_attempt,
    check_dataset,
    checkpoints_of,
    data_digest,
    find_checkpoint,
    restored_kinds,
)
from dit_scale.train.signals import REQUEUE_EXIT_CODE, StopRequest
from dit_scale.train.step import TrainingStep


def train(config: TrainConfig) -> int:
    """Run, or resume, to the last step. Returns the exit code: 0 done, 75 stopped on request and saved."""
    stop = StopRequest()
    determinism.pin(config.engine)
    world = dist.start(config.engine)
    with ExitStack() as stack:
        stack.callback(dist.stop)
        plan = batch_plan(config.global_batch, config.engine.micro_batch, world.size)
        dataset = LatentDataset.open(config.data.url, config.data.cache_dir)
        check_dataset(config, dataset)
        run = Run(config, world, plan, dataset, stack)
        loader = Loader(dataset, config.data, plan, world.rank, config.seed, run.state.step)
        stack.callback(loader.close)

        while run.state.step < config.steps:
            vote = world.begin_any(stop.wanted)
            loss_sums = run.step.take(loader, run.state.step)
            run.state.step += 1
            run.meters.add(loss_sums, run.step.engine.grad_norm)
            run.status.advance()

            last = run.state.step == config.steps
            if last or run.state.step % config.log.every_steps == 0:
                run.log()
            stopping = vote.result()
            if last or stopping or run.state.step % config.checkpoint.every_steps == 0:
                run.save()
            if stopping and not last:
                run.say(f"stopped on request at step {run.state.step}; the same command goes on from there")
                return REQUEUE_EXIT_CODE
        run.finish()
    return 0


class Run:
    """The objects of one attempt, built in order, and the few things that the loop does with them."""

    def __init__(
        self, config: TrainConfig, world: World, plan: BatchPlan, dataset: LatentDataset, stack: ExitStack
    ) -> None:
        self.config, self.world, self.plan = config, world, plan
        self.state = RunState()
        self._data_sha256, self._vae_sha256 = data_digest(dataset), dataset.info.vae.weights_sha256
        self._storage = open_storage(checkpoints_of(config.run))
        self._notes: list[str] = []
        self.step = TrainingStep(config, world, plan, dataset.info.vae.scale)
        # A configuration that this run refuses must not count as an attempt or replace its config.yaml.
        resumed = find_checkpoint(config, self._data_sha256, world, self._fill, self._notes.append)
        if resumed is not None:
            self._go_on_from(resumed)
        self.attempt = world.first_says(lambda: begin_attempt(config))
        self.meters = Meters(world, config.global_batch, self.state.pending)
        self.status = StatusLine(config.steps, self.state.step, shown=world.is_first)
        stack.callback(self.status.close)
        folder = Path(config.run)
        self._sinks: list[Sink] = open_sinks(folder, config, self.state.step) if world.is_first else []
        self._journal = Journal(folder / "events.jsonl") if world.is_first else None
        for sink in self._sinks:
            stack.callback(sink.close)
        if self._journal:
            stack.callback(self._journal.close)
        self._announce(resumed is not None)

    def say(self, message: str) -> None:
        self.status.say(message)

    def log(self) -> None:
        """Close the window of steps since the last log point and write it down."""
        record = {
            "samples": self.state.step * self.config.global_batch,
            **self.meters.take(),
            "lr": self.step.engine.hyper_parameters()[0]["lr"],
        }
        for sink in self._sinks:
            sink.write(self.state.step, record)
        self.status.report(self.state.step, record)

    def save(self) -> None:
        """Commit a checkpoint of this step, then drop what retention does not keep."""
        config, state, world = self.config, self.state, self.world
        state.pending = self.meters.collect()
        name = checkpoints.name_of(state.step, self.attempt)
        file = checkpoints.write_rank_file(self._storage, name, world.rank, self.step.engine.owned)
        files = world.gather(file)
        manifest = checkpoints.Manifest(
            step=state.step,
            samples=state.step * config.global_batch,
            attempt=self.attempt,
            config=config.model_dump(mode="json"),
            data_sha256=self._data_sha256,
            vae_sha256=self._vae_sha256,
            model_shapes=self.step.shapes,
            optimizer_groups=self.step.engine.hyper_parameters(),
            pending_metrics=state.pending,
            versions={"dit_scale": __version__, "torch": torch.__version__},
            written_by={"world": world.size, "zero_stage": config.engine.zero_stage},
            files=tuple(files),
        )
        world.first_says(lambda: checkpoints.commit(self._storage, manifest))
        keep = config.checkpoint
        dropped = world.first_says(
            lambda: checkpoints.prune(self._storage, name, keep.keep, keep.keep_every_steps)
        )
        self._record("checkpoint", name=name, dropped=dropped)

    def finish(self) -> None:
        """The run is done: say where everything is."""
        self._record("done")
        self.say(f"done: {self.state.step} steps in {self.config.run}")

    def _fill(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Read what this rank owns. No collectives: a rank that cannot read must not keep others waiting."""
        old, new = restored_kinds(self.config, checkpoint, self._notes.append)
        owned = self.step.engine.owned
        checkpoints.fill(owned, (*OPTIMIZER_KINDS, *old), checkpoint.read)
        checkpoints.fill(owned, new, lambda _, *extent: checkpoint.read(MASTER, *extent))

    def _go_on_from(self, checkpoint: checkpoints.Checkpoint) -> None:
        self.step.engine.publish_masters()
        self.step.engine.set_optimizer_step(checkpoint.manifest.step)
        self.state = RunState(checkpoint.manifest.step, checkpoint.manifest.pending_metrics)

    def _record(self, event: str, **details: object) -> None:
        if self._journal:
            self._journal.write(event, attempt=self.attempt, step=self.state.step, **details)

    def _announce(self, resumed: bool) -> None:
        plan, config = self.plan, self.config
        for note in self._notes:
            self.say(note)
        self.say(
            f"{config.model.name} at {config.model.image_size} px, {config.engine.precision}, "
            f"ZeRO-{config.engine.zero_stage}, attention {self.step.attention_backend}, on {plan.world} x "
            f"{self.world.device.type}: {plan.global_batch} samples per step in {plan.micro_steps} "
            f"micro-steps of {plan.micro_batch} per process"
        )
        start = f"resumed at step {self.state.step}" if resumed else "a new run"
        self.say(f"{config.run}: {start}, attempt {self.attempt}")
        self._record(
            "start",
            resumed=resumed,
            world=plan.world,
            attention=self.step.attention_backend,
            ema=[ema_kind(profile.name) for profile in config.ema],
            notes=self._notes,
        )
