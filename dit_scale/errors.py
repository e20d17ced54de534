"""Exceptions for errors that the user can fix; `assert` is for our own mistakes.

A message says what the program got, what it expected and what to do. The command line prints only the
message and exits with code 2. Any other exception is a bug and shows its traceback.
"""


class DitScaleError(Exception):
    """Base class of errors that the user can fix."""


class ConfigError(DitScaleError):
    """The configuration is unreadable, invalid or inconsistent."""


class DataError(DitScaleError):
    """Images or a latent data set are missing, incomplete, damaged or of the wrong kind."""


class StorageError(DitScaleError):
    """A folder or bucket cannot be read or written."""


class WeightsError(DitScaleError):
    """Model or VAE weights are missing, damaged, of an unknown format or of the wrong shape."""


class CheckpointError(DitScaleError):
    """A checkpoint is missing, damaged or belongs to another run."""


class DeviceError(DitScaleError):
    """A requested device or backend is unavailable."""


class SupersededError(CheckpointError):
    """A later attempt superseded this one, which must not change shared state any more."""


class TakenError(CheckpointError):
    """Another checkpoint already has this name, so retrying the save cannot succeed."""


class StabilityError(DitScaleError):
    """Losses or gradients keep failing the guard, even without the samples that first failed."""
