#!/usr/bin/env bash
# Training on a SLURM cluster, on any number of nodes. Submit from the root of the project (or with --chdir=ROOT).
# All nodes must see that folder, `run` and `data.url`.
#
#   sbatch [OPTIONS] cluster/slurm_train.sh CONFIG [key=value ...] [options of dit-scale launch]
#
#   on CPUs       sbatch cluster/slurm_train.sh configs/demo.yaml engine.device=cpu
#   on one GPU    sbatch --gpus-per-node=1 cluster/slurm_train.sh configs/dit_xl2_256.yaml run=/shared/runs/xl2
#   on 32 GPUs    sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --mem=0 cluster/slurm_train.sh CONFIG ...
#
# The options below are defaults; those given to sbatch take precedence. Time limit and partition are the cluster's
# defaults. slurm_xl2_256.sh and slurm_xl2_512.sh request the nodes of the paper's recipes and source this file.
#
# srun starts a supervisor (`dit-scale launch`) on each node; neither ssh nor MPI is needed. Request all GPUs of a
# node, or --exclusive. A job without GPUs trains only with engine.device=cpu. If sbatch reports "Requested node
# configuration is not available", no node of the partition has that many GPUs or CPUs or that much memory:
# `sinfo -o "%P %G %c %m"` shows what the nodes have.
#
# The job runs in the environment of its submission (PATH, AWS_*, WANDB_*, DIT_SCALE_*, NCCL_*). Optional variables:
#
#   DIT_SCALE_ENV=$HOME/env.sh   sourced first, on the first node: `module load`, `conda activate`, a venv
#   SRUN_ARGS="--container-image=IMAGE --container-mounts=..."   for pyxis, or other options of srun
#   MIN_NODES=4                  smallest number of nodes to train on; default: half of the allocated nodes
#   MAX_RESTARTS=50              largest number of restarts after errors
#   LEAVE_S=240                  time for the final save, in seconds; shorter than the time of --signal
#   WATCH_S=30                   seconds between two checks of the allocation
#
# What happens when
#   the time limit is near, or it is preempted   it saves and requeues itself
#   a node is lost          it continues with the others; with fewer than MIN_NODES, or if the lost node ran this
#                           script, it saves and requeues itself
#   ... and still trains    its supervisor exits once the next start is running, and can commit nothing by then
#   an error                it requeues itself, up to MAX_RESTARTS times
#   a mistake (93; 2 for an option), or repeated failures (93)   it fails; the log says why

#SBATCH --job-name=dit-scale
#SBATCH --output=dit-scale-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@300

# Functions are called from traps and from shells on other nodes.
# shellcheck disable=SC2317,SC2329
# shellcheck source=/dev/null
[ -z "${DIT_SCALE_ENV:-}" ] || source "$DIT_SCALE_ENV" || exit
set -euo pipefail

if [ -z "${SLURM_JOB_ID:-}" ]; then
    echo "error: expected to run as a job of SLURM: sbatch $0 $*" >&2
    exit 2
fi
if [ "${BASH_SOURCE[0]}" = "$0" ]; then  # submitted itself
    config=${1:?expected a configuration: sbatch cluster/slurm_train.sh CONFIG [key=value ...]}
    shift
elif [ "${1:-}" = --config ]; then
    config=${2:?--config needs a file}
    shift 2
fi
if ! [ -f "$config" ] || ! [ -f cluster/nccl_env.sh ]; then
    echo "error: no $config, or no cluster/nccl_env.sh, in $PWD; submit from the root of the project" >&2
    exit 2
fi
# shellcheck source=cluster/nccl_env.sh
source cluster/nccl_env.sh

export PYTHONUNBUFFERED=1 MIN_NODES="${MIN_NODES:-$(((SLURM_JOB_NUM_NODES + 1) / 2))}"
export MAX_RESTARTS="${MAX_RESTARTS:-50}" LEAVE_S="${LEAVE_S:-240}" WATCH_S="${WATCH_S:-30}"

# Wait for a child and return its exit code, even if signals arrive meanwhile.
wait_out() {
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# Wait for a number of seconds without a child process that could outlive this shell.
pause() {
    read -rt "$1" <> <(:) || true
}

# Print a field of a record of SLURM: field NAME <<<RECORD
field() {
    sed -n "s/.* $1=\([^ ]*\).*/\1/p"
}

# Print a field of a job or a node: says WHAT NAME FIELD; empty if SLURM does not know it.
says() {
    scontrol --oneliner show "$1" "$2" 2>/dev/null | field "$3"
}

# Print the state of the allocation: ok; not_ours, if this node does not belong to the job any more; no_script,
# if the node with the batch script is lost; too_few, if fewer than MIN_NODES are left.
allocation() {
    local job nodes
    # One query: a controller might answer only some of several.
    job=$(scontrol --oneliner show job "$SLURM_JOB_ID" 2>/dev/null) || true
    nodes=$(field NodeList <<<"$job")
    [ -n "$nodes" ] || { echo ok; return; }  # no answer, or no scontrol inside a container
    nodes=$(scontrol show hostnames "$nodes")
    if [ "$(field Restarts <<<"$job")" != "${SLURM_RESTART_COUNT:-0}" ]; then echo not_ours
    elif ! grep -qx "$SLURMD_NODENAME" <<<"$nodes"; then echo not_ours
    elif ! grep -qx "$(field BatchHost <<<"$job")" <<<"$nodes"; then echo no_script
    elif [ "$(wc -l <<<"$nodes")" -lt "$MIN_NODES" ]; then echo too_few
    else echo ok; fi
}

# Ask a process to save and exit when the allocation has changed. SLURM removes a dead node from the allocation
# without a replacement, and neither stops what is still running there nor this script.
watch_allocation() {
    local found
    while pause "$WATCH_S" && kill -0 "$1" 2>/dev/null; do
        found=$(allocation)
        [ "$found" != ok ] || continue
        echo "[$SLURMD_NODENAME] the allocation has changed ($found): saving and exiting" >&2
        kill -USR1 "$1"
        return
    done
}

# Run the supervisor of this node. srun forwards signals to every process of a step.
supervise() {
    local supervisor watcher code=0 address
    address=$(says node "$SLURMD_NODENAME" NodeAddr)
    dit-scale launch "$@" --node "$SLURMD_NODENAME" --address "${address:-$SLURMD_NODENAME}" --start "$START" &
    supervisor=$!
    trap : USR1 TERM
    (trap '' USR1 TERM; watch_allocation "$supervisor") &
    watcher=$!
    wait_out "$supervisor" || code=$?
    kill -KILL "$watcher" 2>/dev/null
    [ "$(allocation)" != no_script ] || conclude "$code" || scancel "$SLURM_JOB_ID"
    return "$code"
}

# Requeue the job, or fail if a restart cannot help, given the exit code of its supervisors. A job that was
# cancelled, or requeued already, is left alone.
conclude() {
    case $1 in 0 | 2 | 93) return 1 ;; esac
    [ "$(allocation)" != not_ours ] || return 0
    if [ "$1" != 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        echo "error: exit code $1 after $MAX_RESTARTS restarts; MAX_RESTARTS allows no more" >&2
        return 1
    fi
    case $(says job "$SLURM_JOB_ID" JobState) in
        RUNNING | PREEMPTED)
            echo "exit code $1 $(date +%T): requeueing the job" >&2
            scontrol requeue "$SLURM_JOB_ID"
            ;;
    esac
}
export -f wait_out pause field says allocation watch_allocation supervise conclude

# Time of this start by SLURM's clock. It supersedes what earlier starts have left running.
START=$(SLURM_TIME_FORMAT=%s says job "$SLURM_JOB_ID" StartTime) || START=0
export START="${START:-0}"

# srun does not read SLURM_CPUS_PER_TASK. A lost node or a failed supervisor must not end the others.
# shellcheck disable=SC2086,SC2016
srun --ntasks-per-node=1 --mpi=none --export=ALL --no-kill --wait=0 --kill-on-bad-exit=0 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} ${SRUN_ARGS:-} \
    bash -c 'supervise "$@"' supervise "$config" "$@" --nodes "$MIN_NODES:$SLURM_JOB_NUM_NODES" &
supervisors=$! deadline=''

leave() {
    trap '' USR1 TERM
    echo "asked to stop $(date +%T): saving" >&2
    kill -USR1 "$supervisors" 2>/dev/null || true
    # SLURM kills the job at its time limit even if a save hangs: exit before
    (pause "$LEAVE_S"; kill -KILL "$supervisors") 2>/dev/null &
    deadline=$!
}
trap leave USR1 TERM

status=0
wait_out "$supervisors" || status=$?
[ -z "$deadline" ] || kill -KILL "$deadline" 2>/dev/null || true
conclude "$status" || exit "$status"
exit 0
