#!/usr/bin/env bash
# DiT-XL/2 at 256 px on a SLURM cluster: configs/dit_xl2_256.yaml.
#
#   sbatch cluster/slurm_xl2_256.sh data.url=s3://bucket/imagenet256 run=/shared/runs/xl2_256
#   sbatch --nodes=2-2 --partition=h200 --time=2-0 cluster/slurm_xl2_256.sh run=/shared/runs/xl2_256 optimizer.lr=2e-4
#
# The options below are defaults; options of sbatch override them. cluster/slurm_train.sh describes the rest:
# modules, containers, the time limit, and lost nodes. The job requeues itself until the run is done.

#SBATCH --job-name=dit-xl2-256
#SBATCH --output=dit-xl2-256-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=B:USR1@300

config=${CONFIG:-configs/dit_xl2_256.yaml}
if ! [ -f cluster/slurm_train.sh ]; then
    echo "error: no cluster/slurm_train.sh in $PWD; submit from the root of the project" >&2
    exit 2
fi
# shellcheck source=cluster/slurm_train.sh
source cluster/slurm_train.sh
