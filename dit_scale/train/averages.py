"""Which weights an EMA profile averages: its width, and the step since which it is tracked.

A profile that is added to a run starts as a copy of the weights of that step, not as an average of the steps
before. The weight that this copy still has in the average is its foreign share. It falls as the average
forgets.
"""

from collections.abc import Iterable

from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import EmaProfile, TrainConfig
from dit_scale.errors import ConfigError
from dit_scale.lines import Say
from dit_scale.train.ema import ema_kind, power_gamma

NEGLIGIBLE = 1e-3
"""Largest foreign share at which an average counts as one over its complete past."""


def width(profile: EmaProfile) -> str:
    """Describe the width of a profile, e.g. `sigma_rel 0.05`."""
    return f"decay {profile.decay:g}" if profile.sigma_rel is None else f"sigma_rel {profile.sigma_rel:g}"


def restored_kinds(config: TrainConfig, checkpoint: Checkpoint, say: Say) -> tuple[list[str], list[str]]:
    """EMA kinds to restore from a checkpoint, and those that it lacks and that start from its weights.

    Raises ConfigError when a profile has another width than in the checkpoint: resuming would mix the two.
    """
    held = checkpoint.kinds()
    saved = {profile.name: profile for profile in checkpoint.config.ema}
    for profile in config.ema:
        was = saved.get(profile.name, profile)
        if ema_kind(profile.name) in held and was != profile:
            raise ConfigError(
                f"the ema profile {profile.name!r} has {width(profile)}, but {width(was)} in {checkpoint}: "
                f"resuming would mix the two. Restore {width(was)}, or give the new width a profile of "
                "another name; it starts from the weights of that step"
            )
    wanted = [ema_kind(profile.name) for profile in config.ema]
    old, new = [kind for kind in wanted if kind in held], [kind for kind in wanted if kind not in held]
    if new:
        say(f"{', '.join(new)}: not in the checkpoint, starts from its weights")
    dropped = sorted(kind for kind in held if kind.startswith("ema.") and kind not in wanted)
    if dropped:
        say(f"{', '.join(dropped)}: in the checkpoint but no longer configured, dropped")
    return old, new


def since_steps(profiles: Iterable[EmaProfile], checkpoint: Checkpoint | None) -> dict[str, int]:
    """Profile => step since which it is tracked, in a run that resumes from a checkpoint (None: a new run).

    Omits profiles for which the checkpoint does not record the step.
    """
    if checkpoint is None:
        return {profile.name: 0 for profile in profiles}
    held, known = checkpoint.kinds(), checkpoint.manifest.ema_since
    new = {one.name: checkpoint.manifest.step for one in profiles if ema_kind(one.name) not in held}
    return {one.name: known[one.name] for one in profiles if one.name in known and one.name not in new} | new


def foreign_share(profile: EmaProfile, since_step: int, step: int) -> float:
    """The weight of the starting copy (of `since_step`) in the average at `step`; 0 if tracked from step 0.

    It is the product of all decays since then (`ema.decay_at`): decay^(step - since) for a constant decay,
    (since / step)^(gamma + 1) for a power function.
    """
    if not since_step:
        return 0.0
    if profile.decay is not None:
        return float(profile.decay ** (step - since_step))
    assert profile.sigma_rel is not None
    return float((since_step / step) ** (power_gamma(profile.sigma_rel) + 1))


def describe_share(since_step: int, share: float) -> str:
    """Describe a foreign share; empty when it is negligible."""
    if share <= NEGLIGIBLE:
        return ""
    return f"tracked only since step {since_step}: {share:.1%} of it is still what it started from"
