"""Sources of images: class folders, ImageNet's tar of class tars, WebDataset tars, Parquet files."""

from dit_scale.data.pixels import InputError
from dit_scale_pipeline.inputs.base import (
    COLUMNS,
    Archive,
    Entry,
    Input,
    Listing,
    ListingProgress,
)
from dit_scale_pipeline.inputs.detect import open_input

__all__ = ["COLUMNS", "Archive", "Entry", "Input", "InputError", "Listing", "ListingProgress", "open_input"]
