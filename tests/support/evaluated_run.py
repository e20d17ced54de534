"""A tiny data set with its autoencoder and a reference, for runs that evaluate their weights."""

from pathlib import Path

import numpy as np

from dit_scale import vae_files
from tests.support.latents import edit_info, write_latents
from tests.support.tiny_vae import save_tiny_vae

CLASSIFIER = Path(__file__).parents[2] / "demo" / "classifier.safetensors"
NUM_FEATURES = 64


def write_ground(folder: Path, num: int = 40) -> dict[str, str]:
    """Write all three; return the configuration keys that lead to them."""
    vae = save_tiny_vae(folder / "vae")
    write_latents(folder / "data", num=num)
    edit_info(folder / "data", vae=vae_files.find_vae(vae).identity.model_dump(mode="json"))
    reference = folder / "reference.npz"
    np.savez(reference, mu=np.zeros(NUM_FEATURES), sigma=np.eye(NUM_FEATURES))
    return {"url": str(folder / "data"), "vae": vae, "reference": str(reference)}
