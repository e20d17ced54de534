#!/usr/bin/env bash
# Install the torch build for this machine: with CUDA if there is an NVIDIA GPU, else the CPU build, which
# avoids several gigabytes of CUDA packages.
#
#   PIP_CONSTRAINT=constraints.txt bash demo/install_torch.sh .venv/bin/pip
#
# pip finds the CPU build, 2.13.0+cpu, at TORCH_CPU_INDEX (default: PyTorch's index) and prefers it to the plain
# 2.13.0 of its configured indexes. If that index is unreachable, pip installs what its own indexes offer.
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
    echo "set-up 1/3: torch for the CPU, because there is no NVIDIA GPU (about 200 MB)"
    exec "$pip" install --quiet --extra-index-url "$index" torch
fi
echo "set-up 1/3: torch; $index cannot be reached, so this may be the CUDA build (about 3 GB)"
exec "$pip" install --quiet torch
