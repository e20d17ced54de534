#!/usr/bin/env bash
# Training on a SLURM cluster, on any number of nodes. Submit from the root of the project (or with --chdir=ROOT),
# which all nodes must see, as they must see `run` and `data.url`.
#
#   sbatch [OPTIONS] cluster/slurm_train.sh CONFIG [key=value ...] [options of dit-scale launch]
#
#   on CPUs       sbatch cluster/slurm_train.sh configs/demo.yaml engine.device=cpu
#   on one GPU    sbatch --gpus-per-node=1 cluster/slurm_train.sh configs/dit_xl2_256.yaml run=/shared/runs/xl2
#   on 32 GPUs    sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=64 --mem=0 cluster/slurm_train.sh CONFIG ...
#
# The options below are defaults: those given to sbatch win. Time limit and partition are the cluster's defaults.
# slurm_xl2_256.sh and slurm_xl2_512.sh ask for the nodes of the paper's recipes, and source this file.
#
# A supervisor (`dit-scale launch`) runs on each node under srun; no ssh, no MPI. Take whole nodes: --exclusive
# if not all of their GPUs. A job without GPUs trains only with engine.device=cpu. When sbatch says "Requested node
# configuration is not available", no node of the partition has so many GPUs, CPUs or so much memory:
# `sinfo -o "%P %G %c %m"` shows what they have.
#
# The environment (PATH, AWS_*, WANDB_*, NCCL_*) is the one at submission. Set in addition, where needed:
#
#   DIT_SCALE_ENV=$HOME/env.sh   sourced first, on the first node: `module load`, `conda activate`, a venv
#   SRUN_ARGS="--container-image=IMAGE --container-mounts=..."   for pyxis, or anything else for srun
#   MIN_NODES=4                  with fewer nodes than that it does not train; default: half of those it got
#   MAX_RESTARTS=50              no further start after so many when it ends with an error
#   LEAVE_S=240                  time to save in; shorter than the time of --signal
#   WATCH_S=30                   between two looks at what SLURM says of the job
#
# What happens when
#   the time limit is near, or it is preempted   it saves, and queues itself again
#   a node is lost          it goes on with the others; with fewer than MIN_NODES, or when it was the node of
#                           this script, it saves and queues itself again
#   ... and still trains    it leaves as soon as the next start has begun, and can commit nothing by then
#   an error                it queues itself again, MAX_RESTARTS times
#   a mistake (93; 2 for an option), or a run that fails again and again (93)   it fails; the log says why

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

# Functions are called by traps and by the shells of other nodes.
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

# The exit code of a child, also when signals come while it runs.
wait_out() {
    while kill -0 "$1" 2>/dev/null; do wait "$1"; done
    wait "$1"
}

# Wait so many seconds without a process that could outlive this one.
pause() {
    read -rt "$1" <> <(:) || true
}

# A field of a record as SLURM says it: field NAME <<<RECORD
field() {
    sed -n "s/.* $1=\([^ ]*\).*/\1/p"
}

# What SLURM says of the job or of a node: says WHAT NAME FIELD; empty where it says nothing.
says() {
    scontrol --oneliner show "$1" "$2" 2>/dev/null | field "$3"
}

# One of: ok; not_ours, when this node is not of the job any more; no_script, when the node with the batch
# script is lost; too_few.
allocation() {
    local job nodes
    # One question: a controller that answers a part of several would be misunderstood.
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

# Ask a process to save and leave when the allocation is not what it was. SLURM takes a node that died out of
# the allocation, gives none for it, and leaves what still runs there, and this script, to themselves.
watch_allocation() {
    local found
    while pause "$WATCH_S" && kill -0 "$1" 2>/dev/null; do
        found=$(allocation)
        [ "$found" != ok ] || continue
        echo "[$SLURMD_NODENAME] the allocation has changed ($found): saving and leaving" >&2
        kill -USR1 "$1"
        return
    done
}

# The supervisor of this node. srun hands signals to every process of a step.
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

# Queue the job again, or fail when that is of no use, given the exit code of its supervisors. A job that was
# cancelled, or that was queued again already, is left alone.
conclude() {
    case $1 in 0 | 2 | 93) return 1 ;; esac
    [ "$(allocation)" != not_ours ] || return 0
    if [ "$1" != 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        echo "error: exit code $1 after $MAX_RESTARTS restarts; MAX_RESTARTS allows no more" >&2
        return 1
    fi
    case $(says job "$SLURM_JOB_ID" JobState) in
        RUNNING | PREEMPTED)
            echo "exit code $1 $(date +%T): it queues itself again" >&2
            scontrol requeue "$SLURM_JOB_ID"
            ;;
    esac
}
export -f wait_out pause field says allocation watch_allocation supervise conclude

# When it was started, by SLURM's clock: from what an earlier start left running somewhere, this one takes over.
START=$(SLURM_TIME_FORMAT=%s says job "$SLURM_JOB_ID" StartTime) || START=0
export START="${START:-0}"

# SLURM_CPUS_PER_TASK is not for srun by itself; a lost node or a supervisor that failed must not end the others.
# shellcheck disable=SC2086,SC2016
srun --ntasks-per-node=1 --mpi=none --export=ALL --no-kill --wait=0 --kill-on-bad-exit=0 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} ${SRUN_ARGS:-} \
    bash -c 'supervise "$@"' supervise "$config" "$@" --nodes "$MIN_NODES:$SLURM_JOB_NUM_NODES" &
supervisors=$! deadline=''

leave() {
    trap '' USR1 TERM
    echo "asked to stop $(date +%T): saving" >&2
    kill -USR1 "$supervisors" 2>/dev/null || true
    # a time limit does not wait for what hangs
    (pause "$LEAVE_S"; kill -KILL "$supervisors") 2>/dev/null &
    deadline=$!
}
trap leave USR1 TERM

status=0
wait_out "$supervisors" || status=$?
[ -z "$deadline" ] || kill -KILL "$deadline" 2>/dev/null || true
conclude "$status" || exit "$status"
exit 0
