#!/usr/bin/env bash
# Install the torch that this machine can use: with CUDA where there is an NVIDIA GPU, else the CPU build,
# which spares several gigabytes of CUDA packages.
#
#   PIP_CONSTRAINT=constraints.txt bash demo/install_torch.sh .venv/bin/pip
#
# The CPU build comes from TORCH_CPU_INDEX (default: PyTorch's own), or from wherever pip is set up to look.
set -euo pipefail
pip=$1
index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

has_gpu() { [ -e /proc/driver/nvidia/version ] || [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; }

if [ "$(uname -s)" != Linux ] || has_gpu; then
    echo "set-up: torch"
    exec "$pip" install --quiet torch
fi
echo "set-up: torch for the CPU, as there is no NVIDIA GPU (about 200 MB)"
if ! "$pip" install --quiet --retries 1 --timeout 15 --index-url "$index" torch 2> >(grep -v '^WARNING' >&2); then
    echo "set-up: no CPU build of torch at $index; installing the default build, which may bring CUDA (3 GB)"
    exec "$pip" install --quiet torch
fi
