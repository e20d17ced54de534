# Settings of NCCL, InfiniBand and torch's process groups for multi-node jobs. Source this file. Variables that are
# already set keep their values, so `NCCL_DEBUG=INFO sbatch ...` works.
# shellcheck shell=bash

# WARN logs errors. INFO also logs the chosen network; check it once per cluster.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"

# How long InfiniBand retries before it gives up a connection: 4.096 us * 2^TIMEOUT (here 17 s) for each of
# RETRY_CNT + 1 tries. This survives the restart of a switch; NCCL's default of 20 is four times shorter.
export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
export NCCL_IB_RETRY_CNT="${NCCL_IB_RETRY_CNT:-7}"

# A collective that fails or times out aborts its process, and the node's supervisor notices immediately.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# The supervisor detects hangs by its own heartbeats, long before this timeout, which covers the rest.
export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC="${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-1800}"

# Cluster-specific settings. NCCL chooses well where each node has one kind of network.
#
# Interface for the rendezvous and for gloo; it must have the same name on all nodes.
#   export NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0
# InfiniBand adapters, if some are reserved for storage:
#   export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3
# RoCE v2 instead of InfiniBand: the GID index of an adapter (`show_gids`) and the traffic class.
#   export NCCL_IB_GID_INDEX=3 NCCL_IB_TC=106
# No InfiniBand at all:
#   export NCCL_IB_DISABLE=1
#
# NCCL_ALGO is not set here: `engine.determinism: strict` sets it to Ring, which makes sums reproducible.
