#!/usr/bin/env bash
# Installs bn_jax and the packages of a lock into a virtual environment, made if it is not there:
#
#   launch/install.sh PYTHON ENVIRONMENT LOCK
#
# Every package is checked by its hash. uv installs where it is on the PATH, pip elsewhere. A line
# says how far it is.
set -euo pipefail

PYTHON=$1
ENVIRONMENT=$2
LOCK=$3

# --no-deps: the lock names all that is needed, and the demo's leaves out what it never imports.
TOTAL=$(grep -c '==' "$LOCK")
echo "installing up to $TOTAL packages of $LOCK into $ENVIRONMENT with $("$PYTHON" -V)"
[[ -x $ENVIRONMENT/bin/python ]] || "$PYTHON" -m venv "$ENVIRONMENT"

if command -v uv >/dev/null; then
  export VIRTUAL_ENV=$ENVIRONMENT
  uv pip install --no-deps --require-hashes -r "$LOCK"
  uv pip install --quiet --no-deps --no-build-isolation -e .
  exit
fi

pip=("$ENVIRONMENT/bin/python" -m pip)
progress() {
  local end=$'\n'
  [[ ! -t 1 ]] || end=$'\r'
  awk -v total="$TOTAL" -v end="$end" '
    /^Collecting|^Requirement already/ { n++ }
    /^Collecting/ && (end == "\r" || n % 20 == 0) { printf "  %d of %d: %-40s%s", n, total, $2, end; fflush() }
    /^Installing/ { printf "  unpacking%-45s%s", "", "\n"; fflush() }
    /^ERROR/ { print; fflush() }'
}
"${pip[@]}" install --disable-pip-version-check --progress-bar=off --no-deps --require-hashes \
  -r "$LOCK" 2>&1 | progress
"${pip[@]}" install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
