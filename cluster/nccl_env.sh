# Settings of NCCL, InfiniBand and torch's process groups for jobs of many nodes. Sourced; a variable that is
# set already stays as it is, so `NCCL_DEBUG=INFO sbatch ...` does what it says.
# shellcheck shell=bash

# A line for what goes wrong; INFO also tells which network was chosen, which is worth one look per cluster.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# How long InfiniBand tries before it gives a connection up: 4.096 us * 2^TIMEOUT (here 17 s) for each of
# RETRY_CNT + 1 tries. A switch that restarts is sat out; NCCL's own 20 is four times shorter.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
export NCCL_IB_RETRY_CNT="${NCCL_IB_RETRY_CNT:-7}"

# A collective that fails or times out ends its process, which the supervisor of the node sees at once.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# The supervisor finds hangs by heartbeats of its own, long before these; they are for what it cannot see.
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC="${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-1800}"

# For a cluster to fill in; NCCL chooses well where each node has one kind of network.
#
# Network of the first contact and of gloo; the interface must be named alike on all nodes.
#   export NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0
# InfiniBand adapters, when some are for storage:
#   export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3
# RoCE v2 instead of InfiniBand: which address of an adapter (`show_gids`), and which priority.
#   export NCCL_IB_GID_INDEX=3 NCCL_IB_TC=106
# No InfiniBand at all:
#   export NCCL_IB_DISABLE=1
#
# NCCL_ALGO is left alone: `engine.determinism: strict` sets it to Ring, so that a sum is the same each time.
