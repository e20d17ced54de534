"""Mirror in Trackio's database. The only module that imports trackio."""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "TRACKIO_DIR"
"""Environment variable with the folder of Trackio's databases; by default `trackio` in the run folder."""

WRITE_EVERY_S = 5.0
"""Interval at which Trackio's thread writes rows; by default it is 0.5 s, and each time costs 5 ms."""


class Trackio:
    """A run in Trackio, continued by later attempts under the same name.

    Rows of steps that an earlier attempt has logged already, and that are taken again, are not added again.
    """

    def __init__(self, folder: Path, project: str, name: str, config: dict[str, Any]) -> None:
        os.environ.setdefault(FOLDER_VARIABLE, str(folder / "trackio"))  # read when trackio is imported
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        trackio.run.BATCH_SEND_INTERVAL = WRITE_EVERY_S
        with redirect_stdout(io.StringIO()):  # it prints how to show a dashboard
            self._run = trackio.init(project=project, name=name, config=config, resume="allow", embed=False)
        self._logged: dict[int, set[str]] = {}
        """Keys that the run has already, by step."""
        for row in SQLiteStorage.get_logs(project, name, run_id=self._run.id):
            self._logged.setdefault(row["step"], set()).update(row)

    def write(self, step: int, record: dict[str, float | None]) -> None:
        if not record.keys() <= self._logged.get(step, set()):
            self._run.log(record, step=step)
        self._check()

    def picture(self, step: int, name: str, path: Path) -> None:
        import trackio

        if name not in self._logged.get(step, ()):
            self._run.log({name: trackio.Image(str(path))}, step=step)
        self._check()

    def scores(self, step: int, figures: dict[str, float | None]) -> None:
        self.write(step, figures)

    def close(self) -> None:
        import trackio

        with redirect_stdout(io.StringIO()):
            trackio.finish()
        self._check()

    def _check(self) -> None:
        """Raise OSError if Trackio has lost rows: it only warns, once, from a thread of its own."""
        if failures := sorted(self._run._warned_failures):
            raise OSError(f"trackio warned on stderr: {', '.join(failures)}")
