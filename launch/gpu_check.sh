#!/usr/bin/env bash
# The check of one GPU, in two calls of a few minutes, without a network:
#
#   launch/gpu_check.sh --pack=DIR [--images=TAR]       before, here: wheels and pictures
#   launch/gpu_check.sh 1 --pack=DIR --out=OUT          correctness and speed, at most 290 s
#   launch/gpu_check.sh 2 --pack=DIR --out=OUT          BN against no BN, at most 470 s
#   launch/gpu_check.sh --smoke [--out=OUT]             both calls, tiny, on any machine
#
# --budget=SECONDS drops what does not fit. --counted=FILE is what `python -m benchmarks.cuda
# --batch=256 --json=FILE` wrote, the bytes that the step was compiled to move (by default those of
# results/bench/cuda.json). --dry-run prints the commands. DIR must be ignored by git, and fits into 64 MiB together with the checkout. Each part
# of a call writes its results to OUT when it ends: call_1.md and call_1.json, step_gpu.json,
# call_2.md and call_2.json, science.json, runs.tar.gz.
# PYTHON names the interpreter (python3); without a network it has jax, flax, optax, orbax, pytest
# and PyTorch, and the pack the rest.
set -euo pipefail

fail() {
  echo "gpu_check.sh: $*" >&2
  exit 2
}

CALL=
PACK=
OUT=
BUDGET=
SMOKE=0
DRY_RUN=0
IMAGES=()
COUNTED=()
for option; do
  case $option in
    1 | 2) CALL=$option ;;
    --pack=?*) PACK=${option#*=} ;;
    --out=?*) OUT=${option#*=} ;;
    --budget=*) BUDGET=${option#*=} ;;
    --images=?*) IMAGES=("$option") ;;
    --counted=?*) COUNTED=("$option") ;;
    --smoke) SMOKE=1 ;;
    --dry-run) DRY_RUN=1 ;;
    *) fail "option '$option' is none of 1, 2, --pack=DIR, --out=DIR, --budget=SECONDS," \
      "--images=TAR, --counted=FILE, --smoke, --dry-run" ;;
  esac
done
[[ -z $BUDGET || $BUDGET =~ ^[1-9][0-9]*$ ]] || fail "--budget='$BUDGET' is not a number of seconds"
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-python3}

run() {
  if ((DRY_RUN)); then
    printf '%q ' "$@"
    echo
    return
  fi
  "$@"
}

# One call: Python keeps its own time, and is ended where it does not.
call() {
  local number=$1 seconds=$2 out=$3
  shift 3
  local command=("$PYTHON" -m benchmarks.gpu_check "$number" "--out=$out" "--budget=$seconds" "$@")
  if ((DRY_RUN)); then
    run timeout --kill-after=5 "$seconds" "${command[@]}"
    return
  fi
  mkdir -p "$out"
  timeout --kill-after=5 "$seconds" "${command[@]}" 2>&1 | tee "$out/call_$number.log"
}

install_pack() {
  [[ -d $PACK/wheels ]] || fail "no wheels in $PACK: make it with launch/gpu_check.sh --pack=$PACK"
  SITE=$(mktemp -d)
  trap 'rm -rf "$SITE"' EXIT
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$SITE" "$PACK"/wheels/*.whl || fail "the wheels in $PACK do not fit $PYTHON"
  export PYTHONPATH="$SITE:$PYTHONPATH"
}

export PYTHONUNBUFFERED=1
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
if ((SMOKE)); then
  OUT=${OUT:-$(mktemp -d)}
  for number in ${CALL:-1 2}; do
    call "$number" "${BUDGET:-900}" "$OUT" --smoke "${COUNTED[@]}"
  done
  echo "results: $OUT"
elif [[ -z $CALL ]]; then
  [[ -n $PACK ]] || fail "name a call, 1 or 2, or --pack=DIR to make the pack, or --smoke"
  run "$PYTHON" -m benchmarks.gpu_check.pack "$PACK" "${IMAGES[@]}"
else
  [[ -n $PACK && -n $OUT ]] || fail "call $CALL needs --pack=DIR and --out=DIR"
  LONGEST=290
  ((CALL == 1)) || LONGEST=470
  BUDGET=${BUDGET:-$LONGEST}
  ((BUDGET <= LONGEST)) || fail "--budget=$BUDGET: call $CALL has at most $LONGEST seconds"
  SECONDS=0 # bash counts on from here: installing is part of the call
  ((DRY_RUN)) || install_pack
  call "$CALL" "$((BUDGET - SECONDS))" "$OUT" "--pack=$PACK" "${COUNTED[@]}"
fi
