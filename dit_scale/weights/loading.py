"""Load weights into a model; names and shapes must match exactly."""

from collections.abc import Mapping

from torch import Tensor, nn

from dit_scale.errors import WeightsError

_NUM_NAMED = 3
"""Maximum number of tensors that an error names per problem; a wrong model has hundreds."""


def load_into(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load `state` into `model`; names and shapes must match exactly.

    A model on the meta device adopts the tensors; any other model copies them and keeps its type and device.
    Raises WeightsError that names missing and unexpected tensors and those with another shape.
    """
    own = model.state_dict()
    shapes = [
        f"{name} (got {tuple(state[name].shape)}, expected {tuple(tensor.shape)})"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:_NUM_NAMED])}{', ...' if len(names) > _NUM_NAMED else ''}"
        for kind, names in (
            ("missing", [name for name in own if name not in state]),
            ("unexpected", [name for name in state if name not in own]),
            ("with another shape", shapes),
        )
        if names
    ]
    if problems:
        raise WeightsError(
            f"weights do not match the model; {'; '.join(problems)}; "
            "model name, image size, conditioning and number of classes must be those of the training run"
        )
    model.load_state_dict(state, strict=True, assign=any(tensor.is_meta for tensor in own.values()))
