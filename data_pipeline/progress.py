"""What an encoding job tells a person: its inputs, its progress and rate, its result.

On a terminal a bar; elsewhere (a log file, `ray job logs`) one line per finished shard.
"""

import time
from collections.abc import Iterable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.images import DecodedBatch, Listing
from data_pipeline.shards_writer import ShardRecord
from dit_scale.data.shards import DatasetInfo, Quarantined
from dit_scale.errors import DataError

SHOWN = 5
"""Names of inputs that a message shows before it says how many more there are."""


def report_listing(listing: Listing, console: Console) -> None:
    """Say what was found, and what will give no samples."""
    console.print(f"{len(listing.entries)} files in {len(listing.class_names)} class folders")
    if listing.empty_classes:
        console.print(f"empty class folders, which keep their labels: {_few(listing.empty_classes)}")
    if listing.outside:
        console.print(f"not in a class folder, left out: {_few(listing.outside)}")


def summary(info: DatasetInfo) -> str:
    """The finished data set in a few lines."""
    size_bytes = sum(shard.bytes for shard in info.shards)
    lines = [
        f"{info.samples} samples of {info.num_classes} classes in {len(info.shards)} shards, "
        f"{size_bytes / 1e9:.3f} GB; each {list(info.latent_shape)} {info.latent_dtype}",
        "latent mean "
        + " ".join(f"{value:.4f}" for value in info.channel_mean)
        + "; std "
        + " ".join(f"{value:.4f}" for value in info.channel_std),
    ]
    if info.quarantined:
        lines.append(
            f"{len(info.quarantined)} inputs gave no sample: {_few(map(_describe, info.quarantined))}"
        )
    return "\n".join(lines)


class Watch:
    """Follows a job: a bar with images per second and the time left, and the count of quarantined inputs."""

    def __init__(
        self, total: int, max_quarantined: float, done: Iterable[ShardRecord], console: Console
    ) -> None:
        self._total, self._max_quarantined, self._console = total, max_quarantined, console
        self._bad = {item.key: item for record in done for item in record.quarantined}
        finished = sum(record.samples + len(record.quarantined) for record in done)
        self._left = total - finished
        self._num_seen = 0
        self._started = time.monotonic()
        self._bar = Progress(
            TextColumn("encoding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} images/s, left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("encoding", total=total, completed=finished, rate=0.0)

    def __enter__(self) -> "Watch":
        self._check()
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._bar.stop()

    def batch(self, account: DecodedBatch) -> None:
        """A VAE batch is through."""
        num_images = len(account.good) + len(account.bad)
        self._num_seen += num_images
        for entry, reason in account.bad:
            self._bad[entry.key] = Quarantined(key=entry.key, path=entry.path, reason=reason)
        self._bar.update(self._task, advance=num_images, rate=self._rate())
        self._check()

    def shard(self, record: ShardRecord) -> None:
        """A shard is committed."""
        self._bad |= {item.key: item for item in record.quarantined}
        if not self._console.is_terminal:
            self._console.print(
                f"shard {record.name}: {record.samples} samples; {self._num_seen} of {self._left} images, "
                f"{self._rate():.1f} images/s"
            )
        self._check()

    def _rate(self) -> float:
        return self._num_seen / max(time.monotonic() - self._started, 1e-9)

    def _check(self) -> None:
        allowed = int(self._max_quarantined * self._total)
        if len(self._bad) > allowed:
            raise DataError(
                f"{len(self._bad)} of {self._total} inputs gave no sample, max_quarantined="
                f"{self._max_quarantined:g} allows {allowed}: {_few(map(_describe, self._bad.values()))}. "
                "Mend them, or raise max_quarantined and start again; finished shards are kept"
            )


def _describe(item: Quarantined) -> str:
    return f"{item.path} ({item.reason})"


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more
