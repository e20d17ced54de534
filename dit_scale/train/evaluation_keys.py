"""Names of the results of an evaluation in the record of a run. No torch."""

from collections.abc import Mapping

from dit_scale.config import TrainConfig

FRECHET = "eval_frechet"
RAW = "raw"
"""The weights without averaging."""


def loss_key(column: str, weights: str) -> str:
    """Return the key of a held-out loss: loss, mse or vb, of the weights `raw` or of a kind of average."""
    return f"eval_{column}_{weights}"


def headline(values: Mapping[str, float | None]) -> str:
    """Return the main results in words."""
    return ", ".join(
        f"{name} {value:.5g}" for name, value in values.items() if is_main(name) and value is not None
    )


def is_main(name: str) -> bool:
    """Whether this is a main result: the Frechet distance or a held-out loss, but not a part of the loss."""
    return name == FRECHET or name.startswith(loss_key("loss", ""))


def deciding_key(config: TrainConfig) -> str:
    """Return the key of the number by which evaluations are compared; smaller is better.

    It is the Frechet distance if there is one, else the held-out loss of the first average; "" without both.
    """
    if config.evaluate.images:
        return FRECHET
    return loss_key("loss", f"ema.{config.ema[0].name}") if config.evaluate.held_out else ""
