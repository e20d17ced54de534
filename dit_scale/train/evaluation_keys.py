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
    """Return the main results in words: Frechet distance and held-out losses, without their parts."""
    names = [name for name in values if name == FRECHET or name.startswith(loss_key("loss", ""))]
    return ", ".join(f"{name} {values[name]:.5g}" for name in names if values[name] is not None)


def deciding_key(config: TrainConfig) -> str:
    """Return the key of the number by which evaluations are compared; smaller is better.

    It is the Frechet distance if there is one, else the held-out loss of the first average; "" without both.
    """
    if config.evaluate.images:
        return FRECHET
    return loss_key("loss", f"ema.{config.ema[0].name}") if config.evaluate.held_out else ""
