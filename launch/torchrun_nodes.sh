#!/usr/bin/env bash
# torchrun on several hosts, which meet at a rendezvous: give the same line on each of them.
#   NODES=2 GPUS=8 MASTER=node0 launch/torchrun_nodes.sh train run.yaml --auto-resume
# A failed rank makes all hosts start their ranks again; --auto-resume goes on from the last checkpoint. A lost host is
# waited for unless MIN_NODES allows fewer; the host of the rendezvous must stay.
set -euo pipefail
NODES="${NODES:-2}"
MIN_NODES="${MIN_NODES:-$NODES}" # a restart goes on with so few when hosts are lost
LAST_CALL="${LAST_CALL:-30}" # seconds that MIN_NODES wait for the others
READ_TIMEOUT="${READ_TIMEOUT:-60}" # seconds to wait for an answer of the rendezvous
GPUS="${GPUS:-8}" # ranks per host
MASTER="${MASTER:-localhost}" # the host of the rendezvous
PORT="${PORT:-29500}"
JOB="${JOB:-dualtok}" # the same on all hosts; another job has another one
RESTARTS="${RESTARTS:-3}"
# For the last step and its checkpoint when the job is asked to end; torchrun's own 30 s are few.
STOP_SECONDS="${STOP_SECONDS:-300}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="$STOP_SECONDS"
PYTHON="${PYTHON:-python}"
LOGS="${LOGS:-logs}" # one file per rank
INTERFACE="${INTERFACE:-}" # such as eth0 or ib0; empty: NCCL and gloo choose
CACHE="${CACHE:-${TMPDIR:-/tmp}/dualtok-$(id -un)}" # a local disk: on a shared one hosts wait for locks
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$CACHE/torch_extensions}"
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$CACHE/triton}"
export HF_HOME="${HF_HOME:-$CACHE/huggingface}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # ranks that share cores must not each use all of them
export LOCAL_SIZE="$GPUS"                      # how many devices DeepSpeed sees on a host without accelerators
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
if [ -n "$INTERFACE" ]; then export NCCL_SOCKET_IFNAME="$INTERFACE" GLOO_SOCKET_IFNAME="$INTERFACE"; fi
mkdir -p "$LOGS"

# Without it torchrun gives the others this host's name, which /etc/hosts may translate to 127.0.1.1.
address=()
if [ -n "$INTERFACE" ]; then address=(--local-addr "$("$PYTHON" -m dualtok.distributed.network "$INTERFACE")"); fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$MIN_NODES:$NODES" --nproc-per-node "$GPUS" \
  --max-restarts "$RESTARTS" --rdzv-backend c10d --rdzv-endpoint "$MASTER:$PORT" --rdzv-id "$JOB" \
  --rdzv-conf "last_call_timeout=$LAST_CALL,read_timeout=$READ_TIMEOUT" ${address[@]+"${address[@]}"} \
  --log-dir "$LOGS/$(hostname)" --redirects 3 --tee 3 -m dualtok "$@"
