#!/bin/bash
# Curation by the processes of torchrun, each with a GPU and a share of the shards:
#
#   bash examples/launch/curate_torchrun.sh 8 curate.yaml output=runs/curated
#
# The first argument is the number of processes on this machine; RANK and WORLD_SIZE say which shards are whose. If one
# dies all are started again, three times at most, and go on.
set -euo pipefail
exec torchrun --standalone --nproc_per_node "$1" --max-restarts 3 -m rpo.cli curate "${@:2}" --resume
