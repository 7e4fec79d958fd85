#!/usr/bin/env bash
# DeepSpeed's launcher on every host of the hostfile, started over plain ssh where there is no pdsh.
#   HOSTFILE=hosts NODES=2 GPUS=8 launch/deepspeed_ssh.sh train run.yaml --auto-resume
# A line of the hostfile is `HOST slots=RANKS`; all hosts see the same files under the same paths.
set -euo pipefail
HERE="$(cd "$(dirname "$0")" && pwd)"
HOSTFILE="${HOSTFILE:-hostfile}"
NODES="${NODES:-2}"
MIN_NODES="${MIN_NODES:-$NODES}" # a restart goes on with so few when hosts are lost
GPUS="${GPUS:-8}" # ranks per host
PORT="${PORT:-29500}"
RESTARTS="${RESTARTS:-3}"
SSH_OPTIONS="${SSH_OPTIONS:-}" # such as -p 2222 -i key
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

[ -r "$HOSTFILE" ] || { echo "launch: error: HOSTFILE=$HOSTFILE: no such file; write lines 'HOST slots=RANKS'" >&2; exit 2; }
mapfile -t LISTED < <(sed -e 's/#.*//' "$HOSTFILE" | awk -v n="$NODES" 'NF && seen++ < n { print $1 }')
MASTER="${MASTER:-${LISTED[0]}}" # the host of rank 0, as all others know it

LOGS="$(realpath "$LOGS")"
# Without ServerAlive ssh would wait for ever for a host that is gone. Of two values the first holds.
SSH_OPTIONS="$SSH_OPTIONS -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"

# Sets HOSTS to those that answer, and writes them to $LOGS/hostfile. At the first start all must, later MIN_NODES.
find_hosts() {
  local host needed="$NODES"
  if [ "$attempt" -gt 0 ]; then needed="$MIN_NODES"; fi
  HOSTS=()
  for host in "${LISTED[@]}"; do
    if ssh $SSH_OPTIONS "$host" true </dev/null; then HOSTS+=("$host"); continue; fi
    echo "launch: error: $host cannot be reached by ssh without a password from $(hostname)" >&2
  done
  if [ "${#HOSTS[@]}" -lt "$needed" ] || [ "${HOSTS[0]}" != "${LISTED[0]}" ]; then
    echo "launch: error: ${#HOSTS[@]} hosts answer; $needed are needed, ${LISTED[0]} among them" >&2
    exit 2
  fi
  echo "launch: on ${HOSTS[*]}" >&2
  printf "%s slots=$GPUS\n" "${HOSTS[@]}" >"$LOGS/hostfile"
}

variables=(HOSTFILE="$LOGS/hostfile" GPUS="$GPUS" MASTER="$MASTER" PORT="$PORT" PYTHON="$PYTHON" LOGS="$LOGS"
  INTERFACE="$INTERFACE" CACHE="$CACHE" RESTARTS=0) # hosts are started again together, from here
for name in $CARRIED; do [ -z "${!name:-}" ] || variables+=("$name=${!name}"); done

on_host() { # HOST COMMAND...
  local host="$1"
  shift
  ssh $SSH_OPTIONS "$host" "$(printf '%q ' "$@")" </dev/null
}
stop_hosts() { # a host that has only just been started gets a few seconds to say which process it is
  local rank try='for try in 1 2 3 4 5; do kill -TERM $(cat "$0" 2>/dev/null) 2>/dev/null && break; sleep 1; done'
  for rank in "${!HOSTS[@]}"; do
    on_host "${HOSTS[$rank]}" sh -c "$try" "$LOGS/launcher-$rank.pid" || true &
  done
}
start() {
  local rank code status=0 running=()
  find_hosts
  trap stop_hosts TERM
  for rank in "${!HOSTS[@]}"; do
    {
      code=0
      on_host "${HOSTS[$rank]}" env -C "$PWD" "${variables[@]}" NODES="${#HOSTS[@]}" NODE_RANK="$rank" \
        PID_FILE="$LOGS/launcher-$rank.pid" bash "$HERE/deepspeed_no_ssh.sh" "$@" || code=$?
      if [ "$code" -ne 0 ]; then # the others would wait for this one
        echo "launch: exit status $code on ${HOSTS[$rank]}" >&2
        stop_hosts
        wait
      fi
      exit "$code"
    } &
    running+=("$!")
  done
  for child in "${running[@]}"; do
    code=0
    wait "$child" || code=$?
    while kill -0 "$child" 2>/dev/null; do # a signal ends `wait` before the host
      code=0
      wait "$child" || code=$?
    done
    if [ "$code" -gt "$status" ]; then status="$code"; fi
  done
  exit "$status"
}
stop() { kill -TERM "$1"; }
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
