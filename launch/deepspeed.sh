#!/usr/bin/env bash
# One host, RANKS processes, started by DeepSpeed's launcher:   RANKS=2 launch/deepspeed.sh train run.yaml
set -euo pipefail
RANKS="${RANKS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks that share cores must not each use all of them
export LOCAL_SIZE="$RANKS"                     # how many devices DeepSpeed sees on a host without accelerators
exec deepspeed --num_gpus "$RANKS" --module dualtok "$@"
