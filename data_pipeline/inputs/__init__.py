"""Where images come from: class folders, the tar of ImageNet's class tars, WebDataset tars, Parquet files."""

from data_pipeline.inputs.base import Archive, Entry, Input, InputError, Listing, Progress
from data_pipeline.inputs.folders import ClassFolders
from dit_scale.storage import open_storage

__all__ = ["Archive", "Entry", "Input", "InputError", "Listing", "Progress", "open_input"]


def open_input(source: str) -> Input:
    """The images at a folder, file or s3:// url, of whichever kind lies there."""
    return ClassFolders(open_storage(source))
