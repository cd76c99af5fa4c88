#!/bin/bash
# Curation as an array of Slurm jobs, each with a GPU and a share of the shards:
#
#   sbatch --array=0-15 examples/launch/curate_slurm.sh curate.yaml output=/shared/runs/curated
#
# Task i of n does shards i, i + n, i + 2n …; tasks need not run at the same time, nor all come to their end. One that is
# killed or preempted is queued again and goes on. For fewer or more tasks than before, wait for these and send the
# whole again: shards that are done are not done twice.
#
#SBATCH --job-name=curate
#SBATCH --array=0-15
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
exec rpo curate "$@" "shards=$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" --resume
