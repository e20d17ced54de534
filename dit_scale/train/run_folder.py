"""A run's folder: what it is, whether this configuration may go on with it, and from where.

<run>/config.yaml   the resolved configuration      <run>/metrics.jsonl   the record
<run>/events.jsonl  the journal                     <run>/samples/        pictures
<run>/records/      the first two as each attempt has them, see dit_scale.telemetry.record

and below the root of its state, which is the same folder unless checkpoint.url names another:

<root>/attempts/    one file per start              <root>/checkpoints/   committed states
<root>/ema/         stored averages, for `dit-scale ema reconstruct`

Where checkpoint.url names another root, the folder may be one machine's own. So each checkpoint takes the
record and the journal along, and the machine on which the run goes on has them from there.
"""

from pathlib import Path

from dit_scale.config import TrainConfig, load, relocated
from dit_scale.errors import ConfigError
from dit_scale.storage import Storage, open_storage

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


def root_of(config: TrainConfig) -> Storage:
    """Where the run keeps its attempts and checkpoints."""
    return open_storage(config.checkpoint.url or config.run)


def config_of_folder(run: str | Path) -> TrainConfig:
    """The configuration in a run's folder, which may have moved. Raises ConfigError for any other folder."""
    if not (Path(run) / "config.yaml").is_file():
        raise ConfigError(f"{run}: expected a run's folder, with its config.yaml")
    return relocated(load(TrainConfig, Path(run) / "config.yaml"), str(run))


def root_of_folder(run: str | Path) -> Storage:
    """Where the run of this folder keeps its attempts and checkpoints."""
    return root_of(config_of_folder(run))


def carried_files(config: TrainConfig) -> tuple[Path, ...]:
    """What a checkpoint takes along of the run's folder; nothing where it lies in that folder itself."""
    return tuple(Path(config.run) / name for name in (METRICS, EVENTS)) if config.checkpoint.url else ()
