"""Mirror in TensorBoard's event files. The only module that imports TensorBoard."""

from pathlib import Path

import numpy as np
from PIL import Image


class TensorBoard:
    """Event files in the run folder. Rows after `resume_step` are dropped; None: none are."""

    def __init__(self, folder: Path, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = None if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, record: dict[str, float | None]) -> None:
        for name, value in record.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def scores(self, step: int, figures: dict[str, float | None]) -> None:
        self.write(step, figures)

    def close(self) -> None:
        self._writer.close()
