"""Estimated memory of a process, alone and at each ZeRO stage, and the largest micro-batch that fits.

A training step has three moments of high memory: the start of the backward pass, when all activations are
live; the one when there is room for all gradients, at the end or, with buckets, after the first; and the
update. An evaluation during training is a fourth. The estimate is the highest of them, plus what lives
always.

Not included: what the allocator holds without using it.
"""

from dataclasses import dataclass

from dit_scale.config import TrainConfig
from dit_scale.data.batch_plan import BatchPlan, batch_plan
from dit_scale.errors import ConfigError
from dit_scale.models.zoo import Shape, num_parameters, shape_of
from dit_scale.train.activations import backward_bytes, element_bytes, forward_bytes, kept_bytes, loss_bytes

GIB = 2**30

CONTEXT_BYTES = GIB
"""Assumed size of the CUDA context, the workspaces of cuBLAS and the buffers of NCCL; not counted."""
AUTOENCODER_BYTES = 4 * 83_653_863
"""The weights of SD-VAE in fp32, which evaluations with images keep."""
DECODING_BYTES = 3_240_000_000
"""Peak of decoding a slice of 2^20 pixels, counted (docs/performance.md)."""
DECODED_PIXELS = 2**20


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of one process, on its device unless stated otherwise."""

    weights: int
    """The weights of the forward pass; at ZeRO-3 its own share."""
    optimizer: int
    """fp32 masters and both moments."""
    ema: int
    gradients: int
    """Gradients that are live at the highest moment."""
    activations: int
    """What the forward pass kept and the backward pass has not freed at the highest moment."""
    backward: int
    """What the backward pass of a block needs on top."""
    communication: int
    """Buckets of the reduction, and weights gathered by ZeRO-3."""
    evaluation: int
    """A second model, the autoencoder, and the activations of an evaluation at the highest moment."""
    context: int
    """CUDA context and libraries, assumed; 0 on a CPU."""
    snapshot: int
    """On the host: a copy of the masters, moments and averages that the process owns."""

    @property
    def total(self) -> int:
        """Bytes of all tensors on the device at the highest moment."""
        return (
            self.weights
            + self.optimizer
            + self.ema
            + self.gradients
            + self.activations
            + self.backward
            + self.communication
            + self.evaluation
        )

    @property
    def on_device(self) -> int:
        """All bytes that the process needs on its device."""
        return self.total + self.context


@dataclass(frozen=True)
class _State:
    """Bytes that depend on how the model is shared, besides masters, moments and averages."""

    weights: int
    """Live always, as are `always_gradients` and `always_buckets`."""
    always_gradients: int = 0
    always_buckets: int = 0
    carried: int = 0
    """Gradients of earlier micro-steps at the start of a backward pass."""
    buckets: int = 0
    """Communication during the backward pass."""
    gathered: int = 0
    """Weights that ZeRO-3 has gathered during the backward pass, and what gathering needs on top."""
    end: int = 0
    """Gradients as soon as there is room for all of them."""
    cast: int = 0
    """What the reduction of a full bucket needs on top at that moment."""
    left: float = 0.0
    """Share of the activations that is live at that moment."""
    update: int = 0
    """Gradients during the update."""


def estimate(config: TrainConfig, shape: Shape, plan: BatchPlan) -> Memory:
    """The memory of the largest process of a run.

    Assumes fp32 for precision `auto`, and attention that keeps no matrix of scores.
    """
    engine = config.engine
    state = _state(config, num_parameters(shape), plan)
    owned = -(-num_parameters(shape) // plan.world)
    activations = kept_bytes(shape, engine, plan.micro_batch)
    backward = backward_bytes(shape, engine, plan.micro_batch)
    kept_model, evaluating = _evaluation(config, shape)
    reducing, left = state.buckets + state.gathered, int(state.left * activations)
    # Gradients, activations, backward, communication and evaluation at each moment.
    moments = (
        (state.carried, activations, backward, reducing, kept_model),
        (state.end, left, backward, reducing + state.cast, kept_model),
        (state.update, 0, 0, 0, kept_model),
        (0, 0, 0, 0, kept_model + evaluating),
    )
    gradients, activations, backward, communication, evaluation = max(moments, key=sum)
    # In one process in fp32, the masters are the weights.
    masters = 12 if state.weights else 8
    return Memory(
        weights=state.weights or 4 * owned,
        optimizer=masters * owned,
        ema=4 * owned * len(config.ema),
        gradients=state.always_gradients + gradients,
        activations=activations,
        backward=backward,
        communication=state.always_buckets + communication,
        evaluation=evaluation,
        context=0 if engine.device == "cpu" else CONTEXT_BYTES,
        snapshot=4 * owned * (3 + len(config.ema)),
    )


def _state(config: TrainConfig, total: int, plan: BatchPlan) -> _State:
    """What each way of sharing a model keeps, counted for DeepSpeed 0.19.8."""
    engine = config.engine
    element, owned, again = element_bytes(engine), -(-total // plan.world), int(plan.micro_steps > 1)
    # DeepSpeed allocates complete buckets, and fills them as far as the model goes.
    bucket = engine.reduce_bucket_elements
    filled = min(bucket, total)
    buffers = 2 if engine.overlap_comm and engine.device != "cpu" else 1
    if plan.world == 1:
        # bf16: sums in fp32 beside the gradients of the micro-step.
        if element == 4:
            return _State(0, carried=again * 4 * total, end=4 * total, update=4 * total)
        return _State(2 * total, carried=again * 4 * total, end=6 * total, update=4 * total)
    if engine.zero_stage == 1 and element == 2:
        # fp32 sums are kept between steps; the gradients of a micro-step stay until the next one.
        return _State(
            2 * total,
            always_gradients=4 * total,
            carried=again * 2 * total,
            end=2 * total,
            update=2 * total,
        )
    # When the first bucket is full, ZeRO-2 makes room for all gradients that the process owns.
    own, left = 4 * owned, 1 - filled / total
    if engine.zero_stage == 3:
        # A bucket is cast to fp32 and rearranged for its reduction. All weights stay gathered between forward
        # and backward pass, up to DeepSpeed's limit of 1e9 elements. Those that arrive together are copied.
        return _State(
            element * owned,
            always_gradients=own,
            always_buckets=4 * bucket,
            gathered=element * (min(total, 10**9) + filled),
            cast=(8 - element) * filled,
            left=left,
            update=own,
        )
    # Stages 1 and 2 reduce from a bucket of the gradients' type, which bf16 casts to fp32.
    buckets = element * bucket * buffers
    if engine.zero_stage == 1:
        return _State(
            4 * total,
            carried=again * 4 * total,
            end=4 * (total - filled) + own,
            buckets=buckets,
            update=2 * own,
        )
    carried, cast = again * own, 4 * filled
    if element == 2:
        return _State(2 * total, carried=carried, buckets=buckets, cast=cast, end=own, left=left, update=own)
    # Own gradients of the micro-step beside the sums; the update copies them into one buffer.
    return _State(4 * total, carried=carried, buckets=buckets, end=carried + own, left=left, update=2 * own)


def _evaluation(config: TrainConfig, shape: Shape) -> tuple[int, int]:
    """Bytes that evaluations keep during training, and those that they need while they run."""
    evaluate = config.evaluate
    if not evaluate.every_steps:
        return 0, 0
    model = element_bytes(config.engine) * num_parameters(shape)
    guided = evaluate.guidance != 1 and (evaluate.grid_images or evaluate.images)
    forward = forward_bytes(shape, config.engine, evaluate.tile * (2 if guided else 1))
    forward += evaluate.tile * loss_bytes(shape)
    # The second model is made in fp32, and then cast.
    made = 4 * num_parameters(shape)
    if not (evaluate.grid_images or evaluate.images):
        return 0, max(made, model + forward)
    # A slice has at least 3 images (`dit_scale.vae.images_per_pass`).
    pixels = min(evaluate.tile, max(DECODED_PIXELS // shape.image_size**2, 3)) * shape.image_size**2
    decoding = DECODING_BYTES * pixels // DECODED_PIXELS
    return AUTOENCODER_BYTES, max(made, model + max(forward, decoding))


def sharding(stage: int, world: int) -> str:
    """How a model is shared by this many processes, in words."""
    return f"at ZeRO-{stage}" if world > 1 else "in one process"


def plan_of(config: TrainConfig, world: int) -> BatchPlan:
    """Everything that depends on the world size. Raises ConfigError when no such run is possible."""
    micro_batch = micro_batch_for(config, shape_of(config.model), world)
    return batch_plan(config.global_batch, micro_batch, world)


def micro_batch_for(config: TrainConfig, shape: Shape, world: int) -> int:
    """The largest micro-batch up to `engine.micro_batch` that fits into `engine.memory_gib`.

    Raises ConfigError when even a micro-batch of 1 does not fit.
    """
    engine = config.engine
    if not engine.memory_gib:
        return engine.micro_batch
    for micro_batch in range(engine.micro_batch, 0, -1):
        plan = batch_plan(config.global_batch, micro_batch, world)
        needed_gib = estimate(config, shape, plan).on_device / GIB
        if needed_gib <= engine.memory_gib:
            return micro_batch
    remedy = "" if engine.zero_stage == 3 else "engine.zero_stage=3, "
    raise ConfigError(
        f"{shape.name} at {shape.image_size} px needs about {needed_gib:.2f} GiB per process with a "
        f"micro-batch of 1 on {world} processes at ZeRO-{engine.zero_stage}, but engine.memory_gib is "
        f"{engine.memory_gib:g}: use {remedy}more processes, or devices with more memory"
    )
