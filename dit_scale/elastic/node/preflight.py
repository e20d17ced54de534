"""Checks of a node before it takes part in a round: an unfit node reports why and stays out.

GPUs as listed by nvidia-smi, free disk space, the data set, the run folder, the clock, a sum over the GPUs.
Each check returns problems: what it got, what it expected, what to do. What is merely unusual, or cannot be
checked, is logged.
"""

import secrets
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from dit_scale.config import TrainConfig
from dit_scale.data.shards import read_info
from dit_scale.elastic.node.collective import collective_problems
from dit_scale.elastic.node.gpus import Query, gpu_problems, run_command
from dit_scale.errors import DitScaleError
from dit_scale.lines import Say
from dit_scale.models.zoo import num_parameters, shape_of
from dit_scale.storage import Storage, open_storage

SPARE_BYTES = 2**30
"""Free space for small files: metrics, journals, temporary files, the start of a cache."""
CLOCK_S = 5.0
"""Largest difference between the clocks of this node and of the run folder without a warning."""
LOCAL_FILE_SYSTEMS = ("btrfs", "ext2/ext3", "overlayfs", "tmpfs", "xfs", "zfs")
"""File systems of a single node, named as by `stat -f`."""


class Preflight:
    """The checks of a node: all of them at the start, and the quick ones before every further round."""

    def __init__(self, config: TrainConfig, slots: int, say: Say) -> None:
        self._config, self._slots, self._say = config, slots, say
        self._is_first = True

    def __call__(self) -> list[str]:
        """Return what makes the node unfit."""
        if not self._is_first:
            return preflight(self._config, self._slots, lambda text: None)
        self._is_first = False
        problems = preflight(self._config, self._slots, self._say)
        return problems or collective_problems(self._config.engine.device, self._slots)


def preflight(config: TrainConfig, slots: int, say: Say) -> list[str]:
    """Return the problems of this node, which is to run `slots` ranks; empty if it is fit.

    `say` receives what is unusual but no reason to stay out, and which checks were skipped.
    """
    return [
        *gpu_problems(config.engine.device, slots, say, run_command),
        *space_problems(config),
        *data_problems(config),
        *folder_problems(config, say),
    ]


def space_problems(config: TrainConfig) -> list[str]:
    """Check for free space for a checkpoint and small files."""
    kinds = 3 + len(config.ema)  # masters, two moments, averages, all fp32
    checkpoint_bytes = 4 * kinds * num_parameters(shape_of(config.model))
    required = {
        Path(tempfile.gettempdir()): ("TMPDIR", SPARE_BYTES),
        Path(config.run): ("run", SPARE_BYTES),
    }
    root = open_storage(config.checkpoint.url or config.run).local_path("checkpoints")
    if root:
        name = "checkpoint.url" if config.checkpoint.url else "run"
        required[root.parent] = (name, SPARE_BYTES + checkpoint_bytes)
    if open_storage(config.data.url).local_path("dataset.json") is None:
        required[Path(config.data.cache_dir)] = ("data.cache_dir", SPARE_BYTES)
    problems = []
    for folder, (name, required_bytes) in required.items():
        free_bytes = shutil.disk_usage(_existing(folder)).free
        if free_bytes < required_bytes:
            problems.append(
                f"{folder} has {free_bytes / 1e9:.2f} GB of free space, expected at least "
                f"{required_bytes / 1e9:.2f}; delete files there or choose another folder ({name})"
            )
    return problems


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return folder


def data_problems(config: TrainConfig) -> list[str]:
    """Check that this node can read the data set. Its shards are checked when they are read."""
    try:
        read_info(open_storage(config.data.url))
    except DitScaleError as error:
        return [f"cannot read the data set: {error}"]
    return []


def say_unless_shared(root: Storage, most_nodes: int, say: Say, query: Query = run_command) -> None:
    """Warn if several nodes are to meet in a folder that seems to be local to this node.

    This node may export it, so it is not a problem. If it does not, each node trains alone.
    """
    folder = root.local_path("elastic")
    if most_nodes == 1 or folder is None:
        return
    kind = (query(("stat", "-f", "-c", "%T", str(_existing(folder)))) or "").strip()
    if kind in LOCAL_FILE_SYSTEMS:
        say(
            f"{root.url} is on a disk of this node ({kind}), but up to {most_nodes} nodes are to meet there: "
            "all of them must see the same folder, or each will train alone"
        )


def folder_problems(config: TrainConfig, say: Say) -> list[str]:
    """Check that the run folder and the state root are writable. A clock that differs is only logged."""
    root = open_storage(config.checkpoint.url or config.run)
    key = f"elastic/preflight/{secrets.token_hex(8)}"
    try:
        root.write(key, b"1")
        root.delete(key)
    except DitScaleError as error:
        return [f"cannot write the root of the checkpoints: {error}"]
    probe = Path(config.run) / f".preflight-{secrets.token_hex(8)}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        offset_s = time.time() - probe.stat().st_mtime
    except OSError as error:
        return [f"cannot write run={config.run}: {error}; it must be the same folder on all nodes"]
    finally:
        with suppress(OSError):
            probe.unlink()
    if abs(offset_s) > CLOCK_S:
        say(
            f"the clock of this node differs by {offset_s:+.0f} s from that of {config.run}: times in the "
            "journals will not match; check that it is synchronised"
        )
    return []
