"""Loaded once by the server that sampling workers are forked from: the modules that each would import."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

from importlib import import_module

for name in ("diffusers.models.autoencoders.autoencoder_kl", "dit_scale.cli", "dit_scale.inference.bulk"):
    import_module(name)
