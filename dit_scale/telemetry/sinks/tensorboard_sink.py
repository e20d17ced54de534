"""Mirror in TensorBoard's event files. The only module that imports TensorBoard."""

from pathlib import Path

import numpy as np
from PIL import Image


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, record: dict[str, float | None]) -> None:
        for name, value in record.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()
