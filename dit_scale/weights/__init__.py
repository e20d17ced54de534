"""Read, check and write weights files: names of tensors, wrappers around them, formats of other programs.

`read` returns tensors by the published names, as in `dit_scale.models.dit.DiT`; no function executes code
from a file. `to_diffusers` and `from_diffusers` convert names; `pipeline` reads and writes folders of
diffusers.
"""

from dit_scale.weights.diffusers_names import from_diffusers, to_diffusers
from dit_scale.weights.files import (
    StateDict,
    WeightsFile,
    digest,
    read,
    read_file,
    read_metadata,
    with_digest,
    write,
    write_pt,
)
from dit_scale.weights.loading import load_into

__all__ = [
    "StateDict",
    "WeightsFile",
    "digest",
    "from_diffusers",
    "load_into",
    "read",
    "read_file",
    "read_metadata",
    "to_diffusers",
    "with_digest",
    "write",
    "write_pt",
]
