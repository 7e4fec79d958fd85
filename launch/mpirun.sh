#!/usr/bin/env bash
# Open MPI starts the ranks, which ask it through mpi4py who they are.
#   HOSTFILE=hosts NODES=2 GPUS=8 launch/mpirun.sh train run.yaml --auto-resume
# A line of the hostfile is `HOST slots=RANKS`. Without HOSTFILE: this host, or the hosts of a scheduler's job.
set -euo pipefail
HOSTFILE="${HOSTFILE:-}"
NODES="${NODES:-1}"
GPUS="${GPUS:-8}" # ranks per host
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
CARRIED="PATH LD_LIBRARY_PATH PYTHONPATH TORCH_EXTENSIONS_DIR TRITON_CACHE_DIR HF_HOME OMP_NUM_THREADS LOCAL_SIZE TOKENIZERS_PARALLELISM DS_ACCELERATOR NCCL_DEBUG NCCL_SOCKET_IFNAME GLOO_SOCKET_IFNAME"

options=(--map-by "ppr:$GPUS:node" --oversubscribe --bind-to none) # a rank has threads: not one core for each
if [ -n "$HOSTFILE" ]; then options+=(--hostfile "$HOSTFILE"); fi
if [ -n "$INTERFACE" ]; then # Open MPI's own connections
  "$PYTHON" -m dualtok.distributed.network "$INTERFACE" >/dev/null # where there is none: Open MPI's error does not say which there are
  options+=(--mca btl_tcp_if_include "$INTERFACE" --mca oob_tcp_if_include "$INTERFACE")
fi
for name in $CARRIED; do if [ -n "${!name:-}" ]; then options+=(-x "$name"); fi; done
if [ "$(id -u)" = 0 ]; then options+=(--allow-run-as-root); fi # as in containers

start() {
  exec mpirun -n "$((NODES * GPUS))" "${options[@]}" --output-filename "$LOGS/$(date +%Y%m%d-%H%M%S)" \
    "$PYTHON" -m dualtok "$@"
}
stop() { kill -USR1 "$1"; } # mpirun hands it to the ranks; at TERM it would kill them within seconds
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
