#!/usr/bin/env bash
# Install the torch that this machine can use: with CUDA where there is an NVIDIA GPU, else the CPU build,
# which spares several gigabytes of CUDA packages.
#
#   PIP_CONSTRAINT=constraints.txt bash demo/install_torch.sh .venv/bin/pip
#
# pip finds the CPU build, 2.13.0+cpu, at TORCH_CPU_INDEX (default: PyTorch's own) and takes it before the plain
# 2.13.0 of the places that it is set up for. Where that index cannot be reached, pip takes what it finds.
set -euo pipefail
pip=$1
index=${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}

has_gpu() { [ -e /proc/driver/nvidia/version ] || [ -e /dev/nvidiactl ] || [ -e /dev/dxg ]; }
can_reach() {
    python3 -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=20)' "$1" 2>/dev/null
}

if [ "$(uname -s)" != Linux ] || has_gpu; then
    echo "set-up 1/3: torch"
    exec "$pip" install --quiet torch
elif can_reach "$index/torch/"; then
    echo "set-up 1/3: torch for the CPU, as there is no NVIDIA GPU (about 200 MB)"
    exec "$pip" install --quiet --extra-index-url "$index" torch
fi
echo "set-up 1/3: torch; $index cannot be reached, so it may be the build with CUDA (about 3 GB)"
exec "$pip" install --quiet torch
