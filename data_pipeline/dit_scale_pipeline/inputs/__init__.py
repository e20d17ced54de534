"""Where images come from: class folders, the tar of ImageNet's class tars, WebDataset tars, Parquet files."""

from dit_scale_pipeline.inputs.base import COLUMNS, Archive, Entry, Input, InputError, Listing, Progress
from dit_scale_pipeline.inputs.detect import open_input

__all__ = ["COLUMNS", "Archive", "Entry", "Input", "InputError", "Listing", "Progress", "open_input"]
