"""Loaded once by the server that test processes are forked from: the modules that each rank would import."""

import gc
import os
from importlib import import_module

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import deepspeed.ops

for name in (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.moe.ep_repack",
    "deepspeed.ops.adam",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "dit_scale.train.loop",
    "rich._emoji_codes",
    "torch._dynamo",
    "torch._subclasses.schema_check_mode",
    "torch.distributed",
    "torch.profiler._cupti_monitor",
):
    import_module(name)
deepspeed.ops.__compatible_ops__  # noqa: B018  its first use starts compilers
gc.collect()
gc.freeze()  # so that the collection before a run's first step looks only at the run's own objects
