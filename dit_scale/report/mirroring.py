"""The score cards of a run in its mirrors: W&B, TensorBoard and Trackio."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_scale.errors import ConfigError
from dit_scale.lines import Say
from dit_scale.report.page.contents import ScoreCard, cards_of
from dit_scale.report.status import status_of
from dit_scale.telemetry.sinks import check_installed, open_mirrors
from dit_scale.train.run_folder import config_of_folder

Figures = dict[str, float | None]


def mirror_cards(run: str, now_s: float, say: Say) -> int:
    """Send the figures of all score cards of a run to its mirrors, at the steps of the weights.

    Returns the number of mirrors that failed; `say` gets their problems and what was sent. Raises ConfigError
    for a run that is training, whose own process writes to the mirrors, or that has no mirror or no card.
    """
    config, status = config_of_folder(run), status_of(run, now_s, remote=False)
    if status.state in ("running", "waiting"):
        raise ConfigError(
            f"{run} is {status.state}, and its own process writes to the mirrors; try again when it has ended"
        )
    cards = cards_of(Path(run))
    for card in cards:
        if card.problem:
            raise ConfigError(card.problem)
    if not cards:
        raise ConfigError(f"{run} has no score cards yet: `dit-scale evaluate {run} ...` writes one")
    check_installed(config.log)
    problems: list[str] = []
    mirrors = open_mirrors(config, None, problems.append)
    if not mirrors:
        raise ConfigError(
            f"{run}/config.yaml has no mirror: expected log.wandb, log.tensorboard or log.trackio to be on"
        )
    for card in cards:
        step = _step_of(card.tree)
        step = status.step if step is None else step
        for mirror in mirrors:
            mirror.scores(step, {f"{card.where}/step": step, **_figures(card)})
    for mirror in mirrors:
        mirror.close()
    for problem in problems:
        say(problem)
    say(f"sent {len(cards)} score cards of {run} to {len(mirrors) - len(problems)} of {len(mirrors)} mirrors")
    return len(problems)


def _figures(card: ScoreCard) -> Figures:
    """Return the figures of a card by names that no other card has, such as `samples/FID.inception`."""
    results = card.tree["results"]
    return {f"{card.where}/{result['metric']}.{result['network']}": result["value"] for result in results}


def _step_of(tree: Mapping[str, Any]) -> int | None:
    """Return the step of the weights that made the samples; None if the card does not know."""
    protocol = tree["samples"]["protocol"]
    return protocol["weights"]["step"] if protocol else None
