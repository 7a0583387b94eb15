#!/usr/bin/env bash
# What tpu_pod.sh does on each host of a slice, from the unpacked checkout in ~/bn_jax:
#
#   tpu_host.sh [--dry-run] install          Python 3.11, the locked packages, jax for TPUs
#   tpu_host.sh [--dry-run] mount BUCKET     the bucket at /mnt/bn_jax, through gcsfuse
#   tpu_host.sh [--dry-run] start OPTIONS    bn_jax.main as the systemd unit bn_jax
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$HOME/.local/bin:$PATH

DRY_RUN=0
if [[ ${1:-} == --dry-run ]]; then
  DRY_RUN=1
  shift
fi
COMMAND=${1:-}
shift || true

do_it() {
  if ((DRY_RUN)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

install() {
  # The host's own Python may be older than 3.11: uv brings one. The lock pins every package by hash;
  # jax[tpu] adds the libtpu that this jax names.
  do_it python3 -m pip install --quiet --user uv
  do_it uv venv --quiet --clear --python 3.11 .venv
  do_it uv pip install --quiet --require-hashes -r requirements.lock
  do_it uv pip install --quiet --no-deps --no-build-isolation -e .
  do_it uv pip install --quiet 'jax[tpu]'
}

mount_bucket() { # bucket
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt release
  if mountpoint -q /mnt/bn_jax; then
    return
  fi
  if ((DRY_RUN)) || ! command -v gcsfuse >/dev/null; then # by gcsfuse's own instructions
    release=$(lsb_release --codename --short 2>/dev/null) || ((DRY_RUN))
    ((DRY_RUN)) && release=CODENAME
    do_it sudo curl -fsS -o "$key" "$url/doc/apt-key.gpg"
    do_it sudo sh -c "echo 'deb [signed-by=$key] $url gcsfuse-$release main' \
>/etc/apt/sources.list.d/gcsfuse.list"
    do_it sudo apt-get -qq update
    do_it sudo apt-get -qq install -y gcsfuse
  fi
  do_it sudo mkdir -p /mnt/bn_jax
  do_it sudo chown "$USER" /mnt/bn_jax
  # A flat bucket needs leave to rename folders; one with hierarchical namespace does it in one piece.
  # Cached metadata (60 s) would hide the heartbeat by which a host sees that a workdir is in use.
  do_it gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --rename-dir-limit=100000 "$1" /mnt/bn_jax
}

start() { # options of bn_jax.main
  local unit=(sudo systemd-run --quiet --unit=bn_jax --uid="$USER" --working-directory="$PWD")
  # A TPU host's environment does not show the others: jax asks the metadata server for them.
  unit+=(--setenv=HOME="$HOME" --setenv=BN_JAX_CLUSTER=1)
  unit+=(-p KillSignal=SIGTERM -p TimeoutStopSec=120)
  # Codes that a restart does not mend (docs/operations.md).
  unit+=(-p Restart=on-failure -p "RestartPreventExitStatus=2 3 4 5 7 8")
  unit+=(-p RestartSec=15 -p StartLimitIntervalSec=0)
  if ((!DRY_RUN)); then
    sudo systemctl stop bn_jax 2>/dev/null || true
    sudo systemctl reset-failed bn_jax 2>/dev/null || true
  fi
  do_it "${unit[@]}" "$PWD/.venv/bin/python" -m bn_jax.main "$@"
}

USER=${USER:-$(id -un)}
case $COMMAND in
  install) install ;;
  mount) mount_bucket "${1:?the name of a bucket}" ;;
  start) start "$@" ;;
  *)
    echo "tpu_host.sh: command '$COMMAND' is none of install, mount, start" >&2
    exit 2
    ;;
esac
