#!/usr/bin/env bash
# DeepSpeed's launcher without ssh: give the line on every host, each with its own NODE_RANK.
#   HOSTFILE=hosts NODES=2 GPUS=8 MASTER=node0 NODE_RANK=1 launch/deepspeed_no_ssh.sh train run.yaml --auto-resume
set -euo pipefail
HOSTFILE="${HOSTFILE:-hostfile}" # names need not resolve: only their order and slots count
NODES="${NODES:-2}"
GPUS="${GPUS:-8}" # ranks per host
MASTER="${MASTER:-localhost}" # the host with NODE_RANK=0
PORT="${PORT:-29500}"
NODE_RANK="${NODE_RANK:-0}"
RESTARTS="${RESTARTS:-3}"
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

[ -r "$HOSTFILE" ] || { echo "launch: error: HOSTFILE=$HOSTFILE: no such file; write lines 'HOST slots=RANKS'" >&2; exit 2; }
if [ -n "${PID_FILE:-}" ]; then # for who has to stop this launcher
  echo $$ >"$PID_FILE"
  trap 'rm -f "$PID_FILE"' EXIT
fi

start() {
  exec "$PYTHON" -m deepspeed.launcher.runner --no_ssh --node_rank "$NODE_RANK" --hostfile "$HOSTFILE" \
    --num_nodes "$NODES" --num_gpus "$GPUS" --master_addr "$MASTER" --master_port "$PORT" \
    --enable_each_rank_log "$LOGS" --module dualtok "$@"
}
# To the launcher's child, when there is one: the launcher itself would end and leave the ranks behind. They have 30 s.
stop() { (while kill -0 "$1" 2>/dev/null && ! pkill -TERM -P "$1"; do sleep 1; done) & }
asked=
trap 'asked=yes; stop "$child"' TERM INT
attempt=0
while :; do
  start "$@" &
  child=$!
  status=0
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the job
    status=0
    wait "$child" || status=$?
  done
  case "$status" in
    0 | 75) exit "$status" ;; # done; or asked to end, with a checkpoint written
    2) exit "$status" ;;      # an error that starting again does not mend: it names what to change
  esac
  echo "launch: exit status $status on $(hostname); logs of the ranks are in $LOGS" >&2
  if [ -n "$asked" ] || [ "$attempt" -ge "$RESTARTS" ]; then exit "$status"; fi
  attempt=$((attempt + 1))
  echo "launch: restart $attempt of $RESTARTS" >&2
done
