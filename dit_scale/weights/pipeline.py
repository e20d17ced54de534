"""Folders of diffusers' DiTPipeline: a transformer, a scheduler, a VAE and the names of the classes.

    FOLDER/model_index.json                    classes of the parts, id2label
           transformer/config.json             shape of the model
           transformer/diffusion_pytorch_model.safetensors
           scheduler/scheduler_config.json     betas, and a sampler
           vae/                                an AutoencoderKL

DiTPipeline guides with class 1000 as the null class, whatever the model. `write_pipeline` therefore stores
1001 rows: the rows after the model's own classes are copies of its null class.
"""

import importlib.metadata
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dit_scale import vae_files
from dit_scale.config import ModelConfig
from dit_scale.errors import WeightsError
from dit_scale.models.zoo import SIZES, VAE_FACTOR, ModelSize, shape_of
from dit_scale.storage.outputs import new_folder
from dit_scale.vae_files import VaeFiles
from dit_scale.weights import files
from dit_scale.weights.diffusers_names import from_diffusers, to_diffusers
from dit_scale.weights.files import WeightsFile
from dit_scale.weights.wrappers import StateDict

TimestepEmbedding = Literal["paper", "diffusers"]

INDEX = "model_index.json"
TRANSFORMER, SCHEDULER, VAE = "transformer", "scheduler", "vae"
_CONFIG, _SCHEDULER_CONFIG, _WEIGHTS = "config.json", "scheduler_config.json", "diffusion_pytorch_model"
_CLASSES_OF_TRANSFORMER = ("DiTTransformer2DModel", "Transformer2DModel")
_TABLE = "y_embedder.embedding_table.weight"

NULL_CLASS = 1000
"""The null class of DiTPipeline."""

_FIXED = {
    "in_channels": 4,
    "out_channels": 8,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
"""Keys of the transformer's configuration that every DiT shares."""
_DEFAULTS = {
    **_FIXED,
    "out_channels": None,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_eps": 1e-5,
}
"""What diffusers assumes for a missing key."""
_NORM_EPS = (1e-6, 1e-5)
"""Epsilon of the LayerNorms before the MLPs: the paper's, with which all models here compute, and diffusers'
default. docs/formats.md says how little the other one changes."""
_BETAS: dict[str, Any] = {
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
}
"""Keys of the scheduler's configuration that define the diffusion, and their defaults."""


@dataclass(frozen=True)
class Pipeline:
    """The contents of a folder, with the weights under the published names."""

    model: ModelConfig
    state: StateDict
    timesteps: int
    class_names: Mapping[int, str]
    metadata: Mapping[str, str]
    """What `write_pipeline` stored beside the weights; empty in folders of other programs."""


def is_pipeline(folder: str | Path) -> bool:
    """Tell whether a folder holds a pipeline of diffusers."""
    return (Path(folder) / INDEX).is_file()


def read_pipeline(folder: Path, timestep_embedding: TimestepEmbedding = "diffusers") -> Pipeline:
    """Read a DiTPipeline folder, except for its VAE.

    The model computes what diffusers computes; with "paper" it computes what the paper's code does with these
    weights. Raises WeightsError for another pipeline, model or diffusion, and for missing or damaged files.
    """
    index = _read_json(folder / INDEX)
    if index.get("_class_name") != "DiTPipeline":
        raise WeightsError(f"{folder / INDEX}: expected a DiTPipeline, got {index.get('_class_name')!r}")
    model = _model_of(folder / TRANSFORMER / _CONFIG, timestep_embedding)
    timesteps = _timesteps_of(folder / SCHEDULER / _SCHEDULER_CONFIG)
    file = _read_weights(folder / TRANSFORMER)
    state = from_diffusers(file.tensors, shape_of(model))
    if "model" in file.metadata:
        num_classes = ModelConfig.model_validate_json(file.metadata["model"]).num_classes
        model = model.model_copy(update={"num_classes": num_classes})
        state[_TABLE] = torch.cat([state[_TABLE][:num_classes], state[_TABLE][-1:]])
    return Pipeline(model, state, timesteps, _class_names(index, folder / INDEX), file.metadata)


def write_pipeline(pipeline: Pipeline, vae: VaeFiles, folder: Path) -> None:
    """Write a folder that DiTPipeline.from_pretrained loads; it appears complete or not at all.

    The model's own timestep embedding has no place in it: diffusers always computes with "diffusers". Raises
    WeightsError for a model that DiTPipeline cannot sample from, and StorageError if `folder` exists or
    cannot be written.
    """
    shape = shape_of(pipeline.model)
    if shape.num_classes > NULL_CLASS:
        raise WeightsError(
            f"diffusers' DiTPipeline takes class {NULL_CLASS} as the null class; "
            f"expected a model with at most {NULL_CLASS} classes, got {shape.num_classes}"
        )
    table = pipeline.state[_TABLE]
    padding = table[-1:].expand(NULL_CLASS - shape.num_classes, -1)
    state = to_diffusers({**pipeline.state, _TABLE: torch.cat([table, padding])}, shape)
    metadata = {"format": "pt", **pipeline.metadata}
    with new_folder(folder) as out:
        _write_json(out / INDEX, _index(pipeline.class_names))
        files.write(state, out / TRANSFORMER / f"{_WEIGHTS}.safetensors", files.with_digest(state, metadata))
        _write_json(out / TRANSFORMER / _CONFIG, _transformer_config(pipeline.model))
        _write_json(out / SCHEDULER / _SCHEDULER_CONFIG, _scheduler_config(pipeline.timesteps))
        (out / VAE).mkdir()
        for name in (vae_files.CONFIG, vae_files.WEIGHTS):
            shutil.copyfile(vae.folder / name, out / VAE / name)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise WeightsError(f"{path} is missing; expected the files that DiTPipeline.save_pretrained writes")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}; download it again") from None
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _read_weights(folder: Path) -> WeightsFile:
    for suffix in (".safetensors", files.INDEX_SUFFIX, ".bin"):
        if (path := folder / f"{_WEIGHTS}{suffix}").is_file():
            return files.read_file(path)
    raise WeightsError(f"{folder} has no {_WEIGHTS}.safetensors, {files.INDEX_SUFFIX} or .bin")


def _model_of(path: Path, timestep_embedding: TimestepEmbedding) -> ModelConfig:
    config = {**_DEFAULTS, **_read_json(path)}
    _require(config["_class_name"] in _CLASSES_OF_TRANSFORMER, path, config, "_class_name", "a DiT")
    for key, expected in _FIXED.items():
        _require(config[key] == expected, path, config, key, repr(expected))
    _require(config["norm_eps"] in _NORM_EPS, path, config, "norm_eps", " or ".join(map(str, _NORM_EPS)))
    numbers = ("num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "sample_size")
    for key in (*numbers, "num_embeds_ada_norm"):
        _require(type(config[key]) is int and config[key] > 0, path, config, key, "a number above 0")
    depth, heads, head_dim, patch, latent_size = (config[key] for key in numbers)
    size = ModelSize(depth, heads * head_dim, heads)
    names = [name for name, known in SIZES.items() if known == size]
    if not names:
        raise WeightsError(
            f"{path}: no DiT has {depth} layers of width {size.width} with {heads} heads; "
            "`dit-scale models` lists the models"
        )
    return ModelConfig(
        name=f"DiT-{names[0]}/{patch}",
        image_size=VAE_FACTOR * latent_size,
        num_classes=config["num_embeds_ada_norm"],
        timestep_embedding=timestep_embedding,
    )


def _timesteps_of(path: Path) -> int:
    """Return the number of diffusion steps; only the linear betas of `diffusion.schedule` are accepted."""
    defaults = {**_BETAS, "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 2e-2}
    config: dict[str, Any] = {**defaults, **_read_json(path)}
    for key, expected in _BETAS.items():
        _require(config[key] == expected, path, config, key, repr(expected))
    timesteps = config["num_train_timesteps"]
    _require(type(timesteps) is int and timesteps > 20, path, config, "num_train_timesteps", "21 or more")
    for key, expected in _beta_range(timesteps).items():
        same = isinstance(config[key], float | int) and math.isclose(config[key], expected, rel_tol=1e-6)
        _require(same, path, config, key, f"{expected:g} at {timesteps} steps")
    return timesteps


def _require(holds: bool, path: Path, config: Mapping[str, Any], key: str, expected: str) -> None:
    if not holds:
        raise WeightsError(f"{path}: {key} is {config[key]!r}, expected {expected}")


def _beta_range(timesteps: int) -> dict[str, float]:
    return {"beta_start": 1e-4 * 1000 / timesteps, "beta_end": 2e-2 * 1000 / timesteps}


def _class_names(index: Mapping[str, Any], path: Path) -> dict[int, str]:
    names = index.get("id2label") or {}
    if not isinstance(names, dict) or not all(
        key.isdecimal() and isinstance(names[key], str) for key in names
    ):
        raise WeightsError(f"{path}: expected id2label to map class numbers to names")
    return {int(key): name for key, name in names.items()}


def _index(class_names: Mapping[int, str]) -> dict[str, Any]:
    return {
        "_class_name": "DiTPipeline",
        "_diffusers_version": _diffusers_version(),
        **(
            {"id2label": {str(label): class_names[label] for label in sorted(class_names)}}
            if class_names
            else {}
        ),
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _transformer_config(model: ModelConfig) -> dict[str, Any]:
    shape = shape_of(model)
    return {
        "_class_name": "DiTTransformer2DModel",
        "_diffusers_version": _diffusers_version(),
        **_FIXED,
        "num_attention_heads": shape.heads,
        "attention_head_dim": shape.width // shape.heads,
        "num_layers": shape.depth,
        "patch_size": shape.patch,
        "sample_size": shape.latent_size,
        "num_embeds_ada_norm": NULL_CLASS,
        "norm_eps": _NORM_EPS[0],
    }


def _scheduler_config(timesteps: int) -> dict[str, Any]:
    return {
        "_class_name": "DDIMScheduler",
        "_diffusers_version": _diffusers_version(),
        "num_train_timesteps": timesteps,
        **_beta_range(timesteps),
        **_BETAS,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "timestep_spacing": "leading",
    }


def _diffusers_version() -> str:
    return importlib.metadata.version("diffusers")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
