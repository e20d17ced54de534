"""Pictures for the page: encoded again as WebP, small enough, and as many as a budget allows."""

import base64
import io
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import unquote

SIDES_PX = (512, 384, 256, 128)
"""Longest sides to try, from the best."""
QUALITY = 80
WANTED = 12
"""A smaller side is taken if fewer pictures than this fit."""
MAX_SOURCE_PX = 64_000_000
"""A larger file is refused: decoding it would take gigabytes."""


@dataclass(frozen=True)
class Picture:
    """A picture inside the page."""

    step: int
    uri: str
    """A data URI."""
    width: int
    height: int


def grids_of(run: Path) -> dict[str, dict[int, Path]]:
    """Return the grids of a run's evaluations by EMA profile and step, both ascending."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted((run / "evaluations").glob("*.png")):
        step, dot, profile = path.stem.partition(".")
        if step.isascii() and step.isdecimal() and dot:
            found.setdefault(unquote(profile), {})[int(step)] = path
    return dict(sorted(found.items()))


def chosen(grids: dict[int, Path], always: Iterable[int], budget_bytes: int) -> list[Picture]:
    """Return pictures of the first step, the newest and those in `always`, and of others between them.

    They are spread evenly, and their data URIs have at most `budget_bytes` together. A file that is no
    picture, for example one that is being written, is left out.
    """
    for side in SIDES_PX:
        pictures = _within(grids, always, budget_bytes, side)
        if len(pictures) >= min(WANTED, len(grids)):
            break
    return pictures


def _within(grids: dict[int, Path], always: Iterable[int], budget_bytes: int, side: int) -> list[Picture]:
    steps = list(grids)
    newest = next((step for step in reversed(steps) if _pictures(grids, [step], side)), None)
    needed = [step for step in dict.fromkeys([newest, *always, *steps[:1]]) if step in grids]
    largest = max((len(picture.uri) for picture in _pictures(grids, needed, side)), default=1)
    count = budget_bytes // largest
    while True:
        pictures = _pictures(grids, {*needed, *spread(steps, count)}, side)
        spent = sum(len(picture.uri) for picture in pictures)
        if spent <= budget_bytes:
            return pictures
        if count:
            count = min(count - 1, count * budget_bytes // spent)
        else:
            needed.pop()


def spread(steps: Sequence[int], count: int) -> list[int]:
    """Return at most `count` of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= count:
        return list(steps)
    if count < 2:
        return list(steps[-1:])[:count]
    return [steps[round(i * (len(steps) - 1) / (count - 1))] for i in range(count)]


def picture_of(path: Path) -> Picture | None:
    """Return one file as a picture of step 0; None if there is no picture."""
    return next(iter(_pictures({0: path}, [0], SIDES_PX[0])), None)


def _pictures(files: dict[int, Path], steps: Iterable[int], side: int) -> list[Picture]:
    """Return those of the files that are pictures, by step."""
    found = []
    for step in sorted(steps):
        with suppress(FileNotFoundError):
            stat = files[step].stat()
            if encoded := _encoded(files[step], stat.st_mtime_ns, stat.st_size, side):
                found.append(Picture(step, *encoded))
    return found


@lru_cache(maxsize=512)
def _encoded(path: Path, mtime_ns: int, size: int, side: int) -> tuple[str, int, int] | None:
    """Return data URI, width and height; None if the file is no picture. Cached until the file changes."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_SOURCE_PX:
                return None
            small = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=QUALITY, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return uri, small.width, small.height
