#!/usr/bin/env bash
# One run as N processes on this machine:
#
#   launch/local.sh N [--platform=cpu|gpu] [--port=P] [--dry-run] -- OPTIONS OF bn_jax.main
#   launch/local.sh 2 -- --config=bn_x30:digits --workdir=runs/two
#
# BN_JAX_MODULE=bn_jax.evaluate evaluates instead (options of bn_jax.evaluate).
# The processes find each other by jax's own variables. On GPUs each process gets one, by number.
# Exits with the code of the first process that failed, 0 if none did. SIGTERM and Ctrl-C are passed
# on: the run saves its state and ends with 75. Once one process has failed, the others get
# BN_JAX_GRACE seconds (60) to end by themselves before they are ended.
set -euo pipefail

fail() {
  echo "local.sh: $*" >&2
  exit 2
}

N=${1:-}
[[ $N =~ ^[1-9][0-9]*$ ]] || fail "N='$N': the first argument is the number of processes, from 1"
shift
PLATFORM=cpu
PORT=$((20000 + RANDOM % 10000)) # below the range that the kernel hands out itself
DRY_RUN=0
while (($#)); do
  case $1 in
    --platform=cpu | --platform=gpu) PLATFORM=${1#*=} ;;
    --port=*) PORT=${1#*=} ;;
    --dry-run) DRY_RUN=1 ;;
    --)
      shift
      break
      ;;
    *) fail "option '$1' is not one of --platform=cpu|gpu, --port=P, --dry-run; those of bn_jax.main come after --" ;;
  esac
  shift
done
[[ $PORT =~ ^[0-9]{4,5}$ ]] || fail "--port='$PORT' is not a port from 1024 to 65535"
(($#)) || fail "no options for bn_jax.main: write them after --, such as -- --config=bn_x30:digits"

PIDS=()
for ((i = 0; i < N; i++)); do
  variables=(JAX_COORDINATOR_ADDRESS="127.0.0.1:$PORT" JAX_NUM_PROCESSES="$N" JAX_PROCESS_ID="$i")
  if [[ $PLATFORM == gpu ]]; then
    variables+=(CUDA_VISIBLE_DEVICES="$i" JAX_PLATFORMS=cuda)
  else
    variables+=(JAX_PLATFORMS=cpu)
  fi
  variables+=(BN_JAX_STEP_TIMEOUT="${BN_JAX_STEP_TIMEOUT:-300}") # seconds that slow storage may take
  command=(env "${variables[@]}" "${PYTHON:-python}" -m "${BN_JAX_MODULE:-bn_jax.main}" "$@")
  if ((DRY_RUN)); then
    printf '%q ' "${command[@]}"
    echo "&"
    continue
  fi
  "${command[@]}" &
  PIDS+=($!)
done
((DRY_RUN)) && exit 0

STOPPED=0
# shellcheck disable=SC2317,SC2329  # the trap calls it
pass_on() {
  STOPPED=1
  kill -TERM "${PIDS[@]}" 2>/dev/null || true
}
trap pass_on TERM INT

alive() {
  local pid
  for pid in "${PIDS[@]}"; do
    kill -0 "$pid" 2>/dev/null && return 0
  done
  return 1
}

FIRST=0
DEADLINE=0
declare -A SEEN=()
while alive; do
  sleep 0.2 & wait $! || true # a signal interrupts this wait, not a foreground sleep
  for pid in "${PIDS[@]}"; do
    if [[ -z ${SEEN[$pid]:-} ]] && ! kill -0 "$pid" 2>/dev/null; then
      code=0
      wait "$pid" || code=$?
      SEEN[$pid]=1
      if ((code && !FIRST)); then
        FIRST=$code
        DEADLINE=$((SECONDS + ${BN_JAX_GRACE:-60}))
        ((STOPPED)) || echo "local.sh: process $pid ended with $code; waiting for the others" >&2
      fi
    fi
  done
  if ((DEADLINE && SECONDS > DEADLINE)); then
    kill -KILL "${PIDS[@]}" 2>/dev/null || true
  fi
done
for pid in "${PIDS[@]}"; do
  code=0
  [[ -n ${SEEN[$pid]:-} ]] || wait "$pid" || code=$?
  ((FIRST)) || FIRST=$code
done
exit "$FIRST"
