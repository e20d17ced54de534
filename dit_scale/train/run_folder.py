"""The layout of a run folder and of the state root.

<run>/config.yaml   the resolved configuration      <run>/metrics.jsonl   the record
<run>/events.jsonl  the journal                     <run>/samples/        pictures
<run>/records/      configuration and record of each attempt, see dit_scale.telemetry.record
<run>/evaluations/  a grid of samples per evaluation and EMA profile
<run>/targets/      where Prometheus finds the metrics of each node, see dit_scale.monitoring

The state root is the run folder, unless checkpoint.url names another place:

<root>/attempts/    one file per attempt            <root>/checkpoints/   committed checkpoints
<root>/ema/         stored averages, for `dit-scale ema reconstruct`
<root>/notices/     marks of messages that the webhook has sent, see dit_scale.telemetry.webhook

With checkpoint.url, the run folder may be local to one machine. Each checkpoint therefore carries a copy of
the record and the journal, from which the run resumes on another machine.
"""

from pathlib import Path
from urllib.parse import quote

from dit_scale.config import TrainConfig, load, relocated
from dit_scale.errors import ConfigError
from dit_scale.storage import Storage, open_storage

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"


def evaluation_grid(config: TrainConfig, step: int, profile: str) -> Path:
    """The file of the grid of an evaluation: samples of an EMA profile, which may have any name."""
    return Path(config.run) / "evaluations" / f"{step:010d}.{quote(profile, safe=' ')}.png"


def root_of(config: TrainConfig) -> Storage:
    """The state root of a run: the storage of its attempts and checkpoints."""
    return open_storage(config.checkpoint.url or config.run)


def config_of_folder(run: str | Path) -> TrainConfig:
    """The configuration in a run folder, which may have moved. Raises ConfigError for any other folder."""
    if not (Path(run) / "config.yaml").is_file():
        raise ConfigError(f"{run}: expected a run folder, with its config.yaml")
    return relocated(load(TrainConfig, Path(run) / "config.yaml"), str(run))


def root_of_folder(run: str | Path) -> Storage:
    """The state root of the run in this folder."""
    return root_of(config_of_folder(run))


def carried_files(config: TrainConfig) -> tuple[Path, ...]:
    """Files that each checkpoint carries; none when the checkpoints are in the run folder themselves."""
    return tuple(Path(config.run) / name for name in (METRICS, EVENTS)) if config.checkpoint.url else ()
