"""Loaded once by the server that test processes are forked from: all that a rank would import in its turn."""

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed.module_inject.auto_ep_layer
import deepspeed.moe.ep_repack
import deepspeed.ops.adam
import deepspeed.runtime.superoffload.superoffload_stage3
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import rich._emoji_codes
import torch._dynamo
import torch._subclasses.schema_check_mode
import torch.distributed  # noqa: F401
import torch.profiler._cupti_monitor  # noqa: F401

import dit_scale.train.loop  # noqa: F401

deepspeed.ops.__compatible_ops__  # noqa: B018  looks for compilers
gc.collect()
gc.freeze()  # the collection before a run's first step then looks at what the run has made
