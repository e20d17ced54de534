"""What the averages of a run are made of: each keeps its width, and has been tracked since some step.

An average that was added to a run began as the weights of that step, not as an average of those before. What
is left of them in it at a later step is its foreign share: it falls as the average forgets.
"""

from collections.abc import Iterable

from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import EmaProfile, TrainConfig
from dit_scale.errors import ConfigError
from dit_scale.lines import Say
from dit_scale.train.ema import ema_kind, power_gamma

NEGLIGIBLE = 1e-3
"""Foreign share up to which an average counts as one of its whole past."""


def width(profile: EmaProfile) -> str:
    """For people: `sigma_rel 0.05`."""
    return f"decay {profile.decay:g}" if profile.sigma_rel is None else f"sigma_rel {profile.sigma_rel:g}"


def restored_kinds(config: TrainConfig, checkpoint: Checkpoint, say: Say) -> tuple[list[str], list[str]]:
    """EMA kinds to restore, and those that this checkpoint does not hold and that start anew.

    Raises ConfigError where a profile has another width than in the checkpoint: the average would be of none.
    """
    held = checkpoint.kinds()
    saved = {profile.name: profile for profile in checkpoint.config.ema}
    for profile in config.ema:
        was = saved.get(profile.name, profile)
        if ema_kind(profile.name) in held and was != profile:
            raise ConfigError(
                f"the ema profile {profile.name!r} has {width(profile)}, but {checkpoint} holds it with "
                f"{width(was)}: going on would mix the two. Restore {width(was)}, or give the new width a "
                "profile with another name; it starts from the weights of that step"
            )
    wanted = [ema_kind(profile.name) for profile in config.ema]
    old, new = [kind for kind in wanted if kind in held], [kind for kind in wanted if kind not in held]
    if new:
        say(f"{', '.join(new)}: not in the checkpoint, starts from its weights")
    gone = sorted(kind for kind in held if kind.startswith("ema.") and kind not in wanted)
    if gone:
        say(f"{', '.join(gone)}: in the checkpoint and no longer configured, dropped")
    return old, new


def since_steps(profiles: Iterable[EmaProfile], found: Checkpoint | None) -> dict[str, int]:
    """Profile => step since which it is tracked, in a run that goes on from `found`, or begins (None).

    A profile of which the checkpoint does not say it is left out.
    """
    if found is None:
        return {profile.name: 0 for profile in profiles}
    held, known = found.kinds(), found.manifest.ema_since
    new = {one.name: found.manifest.step for one in profiles if ema_kind(one.name) not in held}
    return {one.name: known[one.name] for one in profiles if one.name in known and one.name not in new} | new


def foreign_share(profile: EmaProfile, since_step: int, step: int) -> float:
    """The weight, in the average at a step, of what it began with at `since_step`; 0 for a run's start.

    The product of all decays since then (`ema.decay_at`): (since / step)^(gamma + 1) of a power function, of
    a constant decay its power.
    """
    if not since_step:
        return 0.0
    if profile.decay is not None:
        return float(profile.decay ** (step - since_step))
    assert profile.sigma_rel is not None
    return float((since_step / step) ** (power_gamma(profile.sigma_rel) + 1))


def told_share(since_step: int, share: float) -> str:
    """For people, of an average whose foreign share counts; empty for any other."""
    if share <= NEGLIGIBLE:
        return ""
    return f"tracked only since step {since_step}: {share:.1%} of it is still what it started from"
