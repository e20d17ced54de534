"""Loaded once by the server that test processes are forked from."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed
import deepspeed.ops.adam  # noqa: F401
import torch._dynamo
import torch.distributed  # noqa: F401

import dit_scale.train.loop  # noqa: F401
