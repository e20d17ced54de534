"""Console output of an encoding job: its inputs, progress and result.

A terminal gets a progress bar; elsewhere (a log file, `ray job logs`) each finished shard gets a line.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import dit_scale_pipeline.inputs as inputs
from dit_scale.config import EncodeConfig
from dit_scale.data.shards import DatasetInfo, Quarantined
from dit_scale.errors import DataError
from dit_scale.image_progress import show_cursor
from dit_scale_pipeline.decoder import DecodedBatch
from dit_scale_pipeline.inputs import Listing
from dit_scale_pipeline.inputs.layout import layout_notes
from dit_scale_pipeline.inputs.names import few, printable, to_utf8
from dit_scale_pipeline.metrics import Metrics
from dit_scale_pipeline.shards_writer import ShardRecord, shard_name

FIRST_AND_LAST = 3
"""Number of classes that the summary of a listing shows at each end."""


@contextmanager
def listing_bar(console: Console) -> Iterator[inputs.ListingProgress]:
    """Show a progress bar while the archives of an input are listed; none when images are files."""
    columns = (TextColumn("listing"), BarColumn(), MofNCompleteColumn(), TextColumn("archives, left"))
    hidden = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("listing", visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def report_listing(listing: Listing, console: Console) -> None:
    """Print the images and classes that were found, and what is ignored."""
    inside = f" in {len(listing.archives)} archives" if listing.archives else ""
    console.print(f"{len(listing)} images of {len(listing.class_names)} classes{inside}: {listing.kind}")
    console.print(_classes(listing))
    if listing.ignored:
        console.print(f"ignored files and folders: {len(listing.ignored)} ({few(listing.ignored)})")
    for note in layout_notes(listing):
        console.print(f"note: {note}")


def _classes(listing: Listing) -> str:
    """Describe the first, last, smallest and largest classes with their image counts."""
    counts = np.bincount(listing.labels, minlength=len(listing.class_names))
    labels = [f"{printable(name)} ({count})" for name, count in zip(listing.class_names, counts, strict=True)]
    if len(labels) <= 2 * FIRST_AND_LAST:
        return f"images per class: {', '.join(labels)}"
    first, last = labels[:FIRST_AND_LAST], labels[-FIRST_AND_LAST:]
    extremes = f"; smallest {labels[counts.argmin()]}, largest {labels[counts.argmax()]}"
    return f"images per class: {', '.join(first)}, ... {', '.join(last)}" + (
        extremes if counts.min() < counts.max() else ""
    )


def summary(info: DatasetInfo) -> str:
    """Summarize the finished data set in a few lines."""
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
        lines.append(f"{len(info.quarantined)} inputs quarantined: {few(map(_describe, info.quarantined))}")
    return "\n".join(lines)


class QuarantineLimit:
    """The quarantined inputs of a job, and how many of them its configuration allows."""

    def __init__(self, total: int, config: EncodeConfig) -> None:
        self._total, self._share = total, config.max_quarantined
        self._shard_samples = config.shard_samples
        self._items: dict[int, Quarantined] = {}

    def __len__(self) -> int:
        return len(self._items)

    def add(self, items: Iterable[Quarantined]) -> None:
        """Add inputs; one that is already there counts once."""
        self._items |= {item.key: item for item in items}

    def check(self) -> None:
        """Raise DataError if more inputs are quarantined than allowed."""
        allowed = int(self._share * self._total)
        if len(self) > allowed:
            raise DataError(
                f"{len(self)} of {self._total} inputs are quarantined, max_quarantined="
                f"{self._share:g} allows {allowed}: "
                f"{few(map(_describe, self._items.values()))}. Repair them and delete their shards, if "
                f"they exist ({few(self._shards())}), or raise max_quarantined. Then start again; finished "
                "shards are kept"
            )

    def _shards(self) -> list[str]:
        """Return the files to delete so that quarantined inputs are read again."""
        return sorted({f"shards/{shard_name(key // self._shard_samples)}.*" for key in self._items})


class JobProgress:
    """Progress of a job: bar, rate and remaining time, metrics, and the limit of quarantined inputs."""

    def __init__(
        self,
        total: int,
        config: EncodeConfig,
        done: Iterable[ShardRecord],
        console: Console,
        metrics: Metrics,
    ) -> None:
        self._total, self._console, self._metrics = total, console, metrics
        self._log_every_s = config.log_every_s
        records = list(done)
        self._quarantine = QuarantineLimit(total, config)
        self._quarantine.add(item for record in records for item in record.quarantined)
        self._num_before = sum(record.samples + len(record.quarantined) for record in records)
        self._num_shards = len(records)
        self._num_seen = 0
        self._started_s = time.monotonic()
        self._last_row = (self._started_s, 0)
        self._bar = Progress(
            TextColumn("encoding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.1f} images/s, left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("encoding", total=total, completed=self._num_before, rate=0.0)

    def __enter__(self) -> "JobProgress":
        self._quarantine.check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._bar.stop()
        if kind is None:
            self._log()

    def start(self) -> None:
        """Start the clock and the bar; call it when the encoders are ready."""
        self._started_s = time.monotonic()
        self._last_row = (self._started_s, self._num_seen)
        self._bar.start()
        show_cursor(self._console)

    def batch_done(self, batch: DecodedBatch) -> None:
        """Count a VAE batch that is encoded."""
        self._num_seen += len(batch)
        self._quarantine.add(
            Quarantined(key=entry.key, path=to_utf8(entry.path), reason=reason)
            for entry, reason in batch.rejected
        )
        self._bar.update(self._task, advance=len(batch), rate=self._rate())
        self._quarantine.check()
        if time.monotonic() - self._last_row[0] >= self._log_every_s:
            self._log()

    def shard_done(self, record: ShardRecord) -> None:
        """Count a shard that is committed."""
        self._quarantine.add(record.quarantined)
        self._num_shards += 1
        if not self._console.is_terminal:
            self._console.print(
                f"shard {record.name}: {record.samples} samples; {self._num_seen} of "
                f"{self._total - self._num_before} images, {self._rate():.1f} images/s"
            )
        self._quarantine.check()

    def stalled(self, reason: str) -> None:
        """Report a stall or a retry."""
        self._console.print(f"{reason}; if this repeats, check the nodes with `ray status`")

    def _rate(self) -> float:
        return self._num_seen / max(time.monotonic() - self._started_s, 1e-9)

    def _log(self) -> None:
        now_s = time.monotonic()
        last_s, num_last = self._last_row
        images_per_s = (self._num_seen - num_last) / max(now_s - last_s, 1e-9)
        self._last_row = (now_s, self._num_seen)
        self._metrics.write(
            self._num_before + self._num_seen,
            {
                "of_images": self._total,
                "shards": self._num_shards,
                "quarantined": len(self._quarantine),
                "images_per_s": round(images_per_s, 2),
                "elapsed_s": round(now_s - self._started_s, 2),
            },
        )


def _describe(item: Quarantined) -> str:
    return f"{item.path} ({item.reason})"
