"""What an encoding job tells a person: its inputs, its progress and rate, its result.

On a terminal a bar; elsewhere (a log file, `ray job logs`) one line per finished shard.
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
from dit_scale_pipeline.decoder import DecodedBatch
from dit_scale_pipeline.inputs import Listing
from dit_scale_pipeline.inputs.layout import remarks
from dit_scale_pipeline.inputs.names import as_text, few, shown
from dit_scale_pipeline.metrics import Metrics
from dit_scale_pipeline.shards_writer import ShardRecord, shard_name

FIRST_AND_LAST = 3
"""Classes that the summary of a listing names at either end."""


@contextmanager
def listing_bar(console: Console) -> Iterator[inputs.Progress]:
    """A bar over the archives of an input while they are listed; none where images are files."""
    columns = (TextColumn("listing"), BarColumn(), MofNCompleteColumn(), TextColumn("archives, left"))
    hidden = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("listing", visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def report_listing(listing: Listing, console: Console) -> None:
    """Say what was found, and what is left out."""
    inside = f" in {len(listing.archives)} archives" if listing.archives else ""
    console.print(f"{len(listing)} images of {len(listing.class_names)} classes{inside}: {listing.kind}")
    console.print(_classes(listing))
    if listing.ignored:
        console.print(f"ignored, not images of a class: {len(listing.ignored)} ({few(listing.ignored)})")
    for remark in remarks(listing):
        console.print(f"note: {remark}")


def _classes(listing: Listing) -> str:
    """The first and last classes by label, and the extremes, with their numbers of images."""
    counts = np.bincount(listing.labels, minlength=len(listing.class_names))
    told = [f"{shown(name)} ({count})" for name, count in zip(listing.class_names, counts, strict=True)]
    if len(told) <= 2 * FIRST_AND_LAST:
        return f"classes, with numbers of images: {', '.join(told)}"
    first, last = told[:FIRST_AND_LAST], told[-FIRST_AND_LAST:]
    extremes = f"; smallest {told[counts.argmin()]}, largest {told[counts.argmax()]}"
    return f"classes, with numbers of images: {', '.join(first)}, ... {', '.join(last)}" + (
        extremes if counts.min() < counts.max() else ""
    )


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
            f"{len(info.quarantined)} inputs gave no sample: {few(map(_describe, info.quarantined))}"
        )
    return "\n".join(lines)


class JobProgress:
    """Follows a job: a bar with images per second and the time left, rows of metrics, bad inputs."""

    def __init__(
        self,
        total: int,
        config: EncodeConfig,
        done: Iterable[ShardRecord],
        console: Console,
        metrics: Metrics,
    ) -> None:
        self._total, self._console, self._metrics = total, console, metrics
        self._max_quarantined, self._shard_samples = config.max_quarantined, config.shard_samples
        self._log_every_s = config.log_every_s
        records = list(done)
        self._bad = {item.key: item for record in records for item in record.quarantined}
        self._num_before = sum(record.samples + len(record.quarantined) for record in records)
        self._num_shards = len(records)
        self._num_seen = 0
        self._started_s = self._logged_s = time.monotonic()
        self._num_logged = 0
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
        self._check()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._bar.stop()
        if kind is None:
            self._log()

    def start(self) -> None:
        """All is ready: the clock runs from here."""
        self._started_s = self._logged_s = time.monotonic()
        self._bar.start()

    def batch_done(self, account: DecodedBatch) -> None:
        """A VAE batch is through."""
        self._num_seen += len(account)
        for entry, reason in account.rejected:
            self._bad[entry.key] = Quarantined(key=entry.key, path=as_text(entry.path), reason=reason)
        self._bar.update(self._task, advance=len(account), rate=self._rate())
        self._check()
        if time.monotonic() - self._logged_s >= self._log_every_s:
            self._log()

    def shard_done(self, record: ShardRecord) -> None:
        """A shard is committed."""
        self._bad |= {item.key: item for item in record.quarantined}
        self._num_shards += 1
        if not self._console.is_terminal:
            self._console.print(
                f"shard {record.name}: {record.samples} samples; {self._num_seen} of "
                f"{self._total - self._num_before} images, {self._rate():.1f} images/s"
            )
        self._check()

    def stalled(self, waits_for: str) -> None:
        """Nothing has come for a while."""
        self._console.print(f"{waits_for}; are all nodes up? `ray status` on the cluster tells")

    def _rate(self) -> float:
        return self._num_seen / max(time.monotonic() - self._started_s, 1e-9)

    def _log(self) -> None:
        now_s = time.monotonic()
        images_per_s = (self._num_seen - self._num_logged) / max(now_s - self._logged_s, 1e-9)
        self._logged_s, self._num_logged = now_s, self._num_seen
        self._metrics.write(
            self._num_before + self._num_seen,
            {
                "of_images": self._total,
                "shards": self._num_shards,
                "quarantined": len(self._bad),
                "images_per_s": round(images_per_s, 2),
                "elapsed_s": round(now_s - self._started_s, 2),
            },
        )

    def _shards(self) -> list[str]:
        """What a person deletes to have bad inputs read again."""
        return sorted({f"shards/{shard_name(key // self._shard_samples)}.*" for key in self._bad})

    def _check(self) -> None:
        allowed = int(self._max_quarantined * self._total)
        if len(self._bad) > allowed:
            raise DataError(
                f"{len(self._bad)} of {self._total} inputs gave no sample, max_quarantined="
                f"{self._max_quarantined:g} allows {allowed}: {few(map(_describe, self._bad.values()))}. "
                f"Mend them and delete their shards as far as they are there ({few(self._shards())}), or "
                "raise max_quarantined; then start again, finished shards are kept"
            )


def _describe(item: Quarantined) -> str:
    return f"{item.path} ({item.reason})"
