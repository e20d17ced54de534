#!/usr/bin/env bash
# Sampling in bulk on a SLURM cluster, on any number of nodes. Submit from the root of the project (or with
# --chdir=ROOT). All nodes must see that folder, the weights and --out.
#
#   sbatch [OPTIONS] cluster/slurm_sample.sh SOURCE --out FOLDER [options of dit-scale sample]
#
#   on CPUs       sbatch cluster/slurm_sample.sh runs/demo/run --out samples/demo --images 500
#   on 32 GPUs    sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 cluster/slurm_sample.sh \
#                     runs/xl2 --out samples/xl2 --images 50000
#
# The options below are defaults; those given to sbatch take precedence. Each node starts one process per GPU
# (PROCESSES=N overrides this; without GPUs it starts one). The processes share only the folder --out: whatever one
# of them commits stays, and a job with other nodes, GPUs or processes continues with what is missing.
#
# The job runs in the environment of its submission. Optional variables:
#
#   DIT_SCALE_ENV=$HOME/env.sh   sourced first, on the first node: `module load`, `conda activate`, a venv
#   SRUN_ARGS="--container-image=IMAGE --container-mounts=..."   for pyxis, or other options of srun
#   MAX_RESTARTS=50              largest number of restarts after errors
#
# Two minutes before the time limit, and on preemption, it stops and requeues itself. If a process or a node fails,
# the others finish their shares, then it requeues itself. It fails with 2 for a mistake that the log explains, such
# as a folder of another protocol.

#SBATCH --job-name=dit-scale-sample
#SBATCH --output=dit-scale-sample-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@120

# The trap calls a function, which the linter does not see.
# shellcheck disable=SC2317,SC2329
# shellcheck source=/dev/null
[ -z "${DIT_SCALE_ENV:-}" ] || source "$DIT_SCALE_ENV" || exit
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: expected to run as a job of SLURM: sbatch $0 $*" >&2
    exit 2
fi
: "${1:?expected weights to sample: sbatch cluster/slurm_sample.sh SOURCE --out FOLDER [options]}"

export PYTHONUNBUFFERED=1
PROCESSES=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}

# srun does not read SLURM_CPUS_PER_TASK. A lost node or a failed process must not end the others.
# shellcheck disable=SC2086,SC2016
srun --ntasks-per-node=1 --mpi=none --export=ALL --no-kill --wait=0 --kill-on-bad-exit=0 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} ${SRUN_ARGS:-} \
    bash -c 'exec deepspeed -q --num_gpus "$0" --no_local_rank --module dit_scale.cli sample "$@" \
        --nodes "$SLURM_JOB_NUM_NODES" --node "$SLURM_NODEID"' "$PROCESSES" "$@" &
processes=$!

stopping=''
stop() {
    stopping=yes
    kill -TERM "$processes" 2>/dev/null || true  # srun forwards it to all nodes
}
trap stop USR1 TERM

status=0
# a signal interrupts wait before srun has ended
while kill -0 "$processes" 2>/dev/null; do status=0; wait "$processes" || status=$?; done

case $status in 0 | 2) exit "$status" ;; esac
if [ -z "$stopping" ] && [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-50}" ]; then
    echo "error: exit code $status after ${MAX_RESTARTS:-50} restarts; MAX_RESTARTS allows no more" >&2
    exit "$status"
fi
state=$(scontrol --oneliner show job "$SLURM_JOB_ID" | sed -n 's/.* JobState=\([^ ]*\).*/\1/p')
case $state in
    RUNNING | PREEMPTED)  # neither cancelled nor requeued by SLURM
        echo "exit code $status $(date +%T): requeueing the job" >&2
        scontrol requeue "$SLURM_JOB_ID"
        ;;
esac
exit "$status"
