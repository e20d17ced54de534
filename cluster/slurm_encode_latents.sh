#!/usr/bin/env bash
# Images to latents on a SLURM cluster: starts a Ray cluster inside the allocation and runs the encoding job.
#
#   sbatch cluster/slurm_encode_latents.sh source=/data/imagenet/train output=s3://bucket/imagenet256
#   sbatch --nodes=4 --partition=a100 cluster/slurm_encode_latents.sh \
#       --config configs/encode_imagenet_512.yaml source=/data/imagenet/train output=/scratch/imagenet512
#
# Submit from the root of the project (or with --chdir=ROOT). All nodes must see the project, the source and
# the output. The options below are defaults; options of sbatch override them. Arguments: first, optionally,
# --config FILE (default: $CONFIG or configs/encode_imagenet_256.yaml), then key=value overrides
# (`dit-scale config encode` explains the keys).
#
# The job inherits the environment (PATH, AWS_*, HF_*) of the submission. If the cluster needs `module load` or
# an activation inside the job, write it to a file that is sourced first:
# DIT_SCALE_ENV=$HOME/dit_scale_env.sh sbatch ...
#
# Two minutes before the time limit, and on preemption, the job stops and requeues itself; finished shards are
# kept. After any other failure, submit the same command again. The exit code is that of the encoding job: 2
# is an error that the end of the log explains.
#
# RAY_TMPDIR is the folder for Ray's sockets, logs and spilled objects: a short path on a local disk of each
# node (default /tmp). Each attempt creates an access token, so other users cannot use the Ray cluster
# (RAY_AUTH_MODE=disabled turns this off).

#SBATCH --job-name=encode-latents
#SBATCH --output=encode-latents-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --mem=256G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@120

# Traps call the functions below, which the linter does not see.
# shellcheck disable=SC2317,SC2329
# shellcheck source=/dev/null
[ -z "${DIT_SCALE_ENV:-}" ] || source "$DIT_SCALE_ENV" || exit
set -euo pipefail

config=${CONFIG:-configs/encode_imagenet_256.yaml}
if [ "${1:-}" = --config ]; then
    config=${2:?--config needs a file}
    shift 2
fi
if ! [ -f data_pipeline/encode_latents.py ]; then
    echo "error: no data_pipeline/encode_latents.py in $PWD; submit from the root of the project" >&2
    exit 2
fi

export PYTHONUNBUFFERED=1 RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0  # a node that is stopped has no work to drain
RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
export RAY_AUTH_TOKEN

# Run one Ray node in the foreground: ray_node FOLDER OPTION ... The node uses the CPUs and GPUs of the
# allocation and free ports, because several jobs may share a machine. On SIGTERM (from SLURM) or SIGUSR1
# (forwarded by srun) it stops, after 20 s by SIGKILL, and Ray's processes stop with it. Its startup log is
# printed only if it exits on its own. The folder is removed at the end.
ray_node() {
    local folder=$1 stopping='' ray
    shift
    mkdir -p "$folder"
    timeout --foreground --kill-after=20 0 python -m dit_scale_pipeline.ray_start --block \
        --disable-usage-stats --log-style=record --temp-dir="$folder" \
        --num-cpus="$SLURM_CPUS_ON_NODE" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" \
        --dashboard-agent-listen-port=0 "$@" >"$folder/start.log" 2>&1 &
    ray=$!
    trap 'stopping=yes; kill -TERM "$ray" 2>/dev/null' TERM USR1
    # a signal interrupts wait before Ray has stopped
    while kill -0 "$ray" 2>/dev/null; do wait "$ray" || true; done
    if [ -z "$stopping" ]; then
        echo "error: Ray on $SLURMD_NODENAME exited unexpectedly:" >&2
        cat "$folder/start.log" >&2
    fi
    rm -rf "$folder"
}
export -f ray_node

folder=$(mktemp -d "${RAY_TMPDIR:-/tmp}/ds-$SLURM_JOB_ID-XXXXXX")
job='' workers='' head=''

# Stop all processes by id, the encoding job first. SLURM kills the rest after this script.
stop() {
    trap '' TERM USR1
    set +e
    if [ -n "$job" ]; then
        kill -TERM "$job" 2>/dev/null
        wait "$job"
    fi
    [ -z "$workers" ] || kill -USR1 "$workers" 2>/dev/null
    [ -z "$head" ] || kill -TERM "$head" 2>/dev/null
    wait
    rm -rf "$folder"
}
requeue() {
    echo "stopping $(date +%T): time limit or preemption; requeueing" >&2
    stop
    trap - EXIT
    scontrol requeue "$SLURM_JOB_ID"
    exit
}
trap stop EXIT
trap 'exit 143' TERM
trap requeue USR1

# Ray chooses all ports except that of its client server, which gets one below the ephemeral ports.
start_head() {
    ray_node "$folder" --head --port=0 --ray-client-server-port=$((20000 + SLURM_JOB_ID % 10000)) \
        --include-dashboard=false &
    head=$!
}
start_head
tries=3  # on a busy machine Ray's agent may miss its start-up deadline of 15 s, and Ray exits
until [ -s "$folder/ray_current_cluster" ]; do
    if ! kill -0 "$head" 2>/dev/null; then
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || { echo "error: the Ray head did not start" >&2; exit 1; }
        start_head
    fi
    sleep 0.2
done
address=$(cat "$folder/ray_current_cluster")

# All nodes after the first. The job continues when one of them is lost, so srun must not stop the others.
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    others=$((SLURM_JOB_NUM_NODES - 1))
    # shellcheck disable=SC2016
    srun --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --relative=1 --export=ALL \
        --wait=0 --kill-on-bad-exit=0 ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} \
        bash -c 'ray_node "$(mktemp -d "${RAY_TMPDIR:-/tmp}/ds-$SLURM_JOB_ID-XXXXXX")" --address="$0"' \
        "$address" &
    workers=$!
fi

timeout --foreground --kill-after=60 0 python data_pipeline/encode_latents.py --config "$config" \
    ray_address="$address" nodes="$SLURM_JOB_NUM_NODES" "$@" &
job=$!
status=0
wait "$job" || status=$?
job=''
exit "$status"
