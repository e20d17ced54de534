"""One exception family for mistakes that people can mend; `assert` is for ours.

Each message says what was got, what was expected and what to do. The command line prints the
message alone and leaves with code 2; anything outside this family is a bug and shows its traceback.
"""


class DitScaleError(Exception):
    """Base of every error that a user can mend."""


class ConfigError(DitScaleError):
    """A configuration that cannot be read, or whose parts do not fit together."""


class DataError(DitScaleError):
    """Images or a latent data set that are missing, unfinished, damaged or of another kind."""


class StorageError(DitScaleError):
    """A folder or bucket that cannot be read or written."""


class WeightsError(DitScaleError):
    """Model or VAE weights that are missing, foreign or of another shape."""


class CheckpointError(DitScaleError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class DeviceError(DitScaleError):
    """A device or backend that was asked for and is not there."""


class SupersededError(CheckpointError):
    """A later attempt of the same run has begun: this one must not change anything any more."""


class TakenError(CheckpointError):
    """A checkpoint's name that holds another checkpoint already: to save it again would fail again."""


class StabilityError(DitScaleError):
    """Losses or gradients that stay wrong, also without the samples that they first went wrong with."""
