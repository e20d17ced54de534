"""Write weights for other programs, and for this one.

The forms are a safetensors file, the published .pt layout and a folder of diffusers' DiTPipeline. All hold
fp32 weights, bit for bit those of the source.
"""

import json
from dataclasses import replace
from pathlib import Path

from dit_scale import weights
from dit_scale.data.shards import read_info
from dit_scale.errors import DataError, StorageError, WeightsError
from dit_scale.inference.sources import WeightsSource
from dit_scale.lines import Say
from dit_scale.storage import open_storage
from dit_scale.vae_files import find_vae, require_weights
from dit_scale.weights.pipeline import Pipeline, write_pipeline


def export(source: WeightsSource, path: Path) -> None:
    """Write the weights to one fp32 safetensors file, with all metadata that `open_source` needs."""
    state = {name: tensor.float() for name, tensor in source.state.items()}
    metadata = {**_metadata(source), **({"vae": source.vae} if source.vae else {}), **source.details}
    weights.write(state, path, weights.with_digest(state, metadata))


def export_pt(source: WeightsSource, path: Path) -> None:
    """Write the weights as a flat fp32 state dict.

    It says nothing of the model, so its readers assume the paper's. Raises WeightsError for a model with
    another conditioning than adaLN-Zero or with another number of diffusion steps than 1000.
    """
    if source.model.conditioning != "adaln_zero" or source.timesteps != 1000:
        raise WeightsError(
            "programs that read the published .pt layout assume conditioning adaln_zero and 1000 diffusion "
            f"steps, got {source.model.conditioning} and {source.timesteps}; export to safetensors"
        )
    weights.write_pt(source.state, path)


def export_pipeline(source: WeightsSource, folder: Path, vae: str | None = None) -> None:
    """Write a folder that diffusers' DiTPipeline loads; `vae` replaces the source's VAE.

    Raises WeightsError for a model or VAE that does not fit.
    """
    name = vae or source.vae
    if name is None:
        raise WeightsError(f"{source.description} does not name its VAE; pass --vae FOLDER_OR_HUB_NAME")
    found = find_vae(name)
    require_weights(found.identity, source.vae_sha256)
    # The VAE is in the folder, so its name is not.
    pipeline = Pipeline(source.model, source.state, source.timesteps, source.class_names, _metadata(source))
    write_pipeline(pipeline, found, folder)


def with_class_names(source: WeightsSource, say: Say) -> WeightsSource:
    """Add the names of the classes from the run's data set; report to `say` if it cannot be read."""
    if source.class_names or source.data is None:
        return source
    try:
        names = read_info(open_storage(source.data)).class_names
    except (DataError, StorageError) as error:
        say(f"the names of the classes are unknown: {error}")
        return source
    return replace(source, class_names=dict(enumerate(names)))


def _metadata(source: WeightsSource) -> dict[str, str]:
    optional = {
        "model": source.model.model_dump_json(),
        "source": source.description,
        "timesteps": str(source.timesteps),
        "vae_sha256": source.vae_sha256,
        "class_names": json.dumps(dict(source.class_names)) if source.class_names else None,
    }
    return {key: value for key, value in optional.items() if value is not None}
