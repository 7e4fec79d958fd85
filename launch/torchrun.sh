#!/usr/bin/env bash
# One host, RANKS processes, started by torchrun:   RANKS=2 launch/torchrun.sh train run.yaml train.steps=100
set -euo pipefail
GPUS="${RANKS:-$("${PYTHON:-python}" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
PYTHON="${PYTHON:-python}"
LOGS="${LOGS:-}" # one file per rank; empty: none, all goes to the terminal
INTERFACE="${INTERFACE:-}" # such as eth0 or ib0; empty: NCCL and gloo choose
CACHE="${CACHE:-${TMPDIR:-/tmp}/dualtok-$(id -un)}" # a local disk: on a shared one hosts wait for locks
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$CACHE/torch_extensions}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$CACHE/triton}"
export HF_HOME="${HF_HOME:-$CACHE/huggingface}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks that share cores must not each use all of them
export LOCAL_SIZE="$GPUS"                      # how many devices DeepSpeed sees on a host without accelerators
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
if [ -n "$INTERFACE" ]; then export NCCL_SOCKET_IFNAME="$INTERFACE" GLOO_SOCKET_IFNAME="$INTERFACE"; fi
[ -z "$LOGS" ] || mkdir -p "$LOGS"

logs=()
if [ -n "$LOGS" ]; then logs=(--log-dir "$LOGS" --redirects 3 --tee 3); fi
exec "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" ${logs[@]+"${logs[@]}"} -m dualtok "$@"
