#!/usr/bin/env bash
# What tpu_pod.sh does on each host of a slice, from the unpacked checkout in ~/bn_jax:
#
#   tpu_host.sh [--dry-run] install          Python 3.12, the locked packages, jax for TPUs
#   tpu_host.sh [--dry-run] mount BUCKET     the bucket at /mnt/bn_jax, through gcsfuse
#   tpu_host.sh [--dry-run] mount-data       the disk with the label bn_jax_data at /mnt/bn_jax_data
#   tpu_host.sh [--dry-run] start OPTIONS    bn_jax.main as the systemd unit bn_jax, after reboots too
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
  # The host's own Python may be older than 3.12: uv brings one. The lock pins every package by hash;
  # jax[tpu] adds the libtpu that this jax names.
  do_it python3 -m pip install --quiet --user uv
  do_it uv venv --quiet --clear --python 3.12 .venv
  do_it uv pip install --quiet --require-hashes -r requirements.lock
  do_it uv pip install --quiet --no-deps --no-build-isolation -e .
  do_it uv pip install --quiet 'jax[tpu]'
}

write() { # file; its content from standard input
  if ((DRY_RUN)); then
    echo "sudo tee $1 <<'END'"
    cat
    echo END
  else
    sudo tee "$1" >/dev/null
  fi
}

mount_bucket() { # bucket
  local key=/usr/share/keyrings/cloud.google.asc url=https://packages.cloud.google.com/apt release
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
  # A flat bucket needs leave to rename folders; one with hierarchical namespace does it in one piece.
  # Cached metadata (60 s, of what is absent 5 s) would hide the heartbeat by which a host sees that a
  # workdir is in use. Files of the data set are read a thousand times; they are on a disk of their own.
  write /etc/bn_jax.gcsfuse.yaml <<END
implicit-dirs: true
file-system:
  rename-dir-limit: 100000
metadata-cache:
  ttl-secs: 0
  negative-ttl-secs: 0
END
  local owner
  owner="uid=$(id -u),gid=$(id -g)"
  ((DRY_RUN)) && owner=uid=UID,gid=GID
  # A unit, so that the bucket is back after a reboot, and is unmounted only after training, which
  # needs it (RequiresMountsFor), has saved and ended.
  write /etc/systemd/system/mnt-bn_jax.mount <<END
[Unit]
Description=bucket of bn_jax
Wants=network-online.target
After=network-online.target

[Mount]
What=$1
Where=/mnt/bn_jax
Type=gcsfuse
Options=_netdev,allow_other,$owner,config_file=/etc/bn_jax.gcsfuse.yaml

[Install]
WantedBy=multi-user.target
END
  do_it sudo systemctl daemon-reload
  do_it sudo systemctl enable --now mnt-bn_jax.mount
}

mount_data() {
  do_it sudo mkdir -p /mnt/bn_jax_data
  # noload: the disk cannot be written, so a journal that was left open is not replayed.
  write /etc/systemd/system/mnt-bn_jax_data.mount <<END
[Unit]
Description=data set of bn_jax

[Mount]
What=/dev/disk/by-label/bn_jax_data
Where=/mnt/bn_jax_data
Type=ext4
Options=ro,noload

[Install]
WantedBy=multi-user.target
END
  do_it sudo systemctl daemon-reload
  do_it sudo systemctl enable --now mnt-bn_jax_data.mount
}

quoted() { # words, as ExecStart= reads them
  local word
  for word in "$@"; do
    word=${word//\\/\\\\} word=${word//\"/\\\"} word=${word//%/%%} word=${word//\$/\$\$}
    printf ' "%s"' "$word"
  done
}

start() { # options of bn_jax.main
  # A TPU host's environment does not show the others: BN_JAX_CLUSTER lets jax ask the metadata
  # server. The exit codes are those that a restart does not mend (docs/operations.md). The driver
  # locks memory through which it talks to the chips. Compiled programs are kept in the bucket: with
  # folders of their own, hosts that have to compile again would keep the others waiting.
  write /etc/systemd/system/bn_jax.service <<END
[Unit]
Description=bn_jax
Wants=network-online.target
After=network-online.target
RequiresMountsFor=/mnt/bn_jax /mnt/bn_jax_data
StartLimitIntervalSec=0

[Service]
User=$USER
WorkingDirectory=$PWD
Environment=BN_JAX_CLUSTER=1 JAX_PLATFORMS=tpu BN_JAX_STEP_TIMEOUT=300
Environment=JAX_COMPILATION_CACHE_DIR=/mnt/bn_jax/.compiled
LimitMEMLOCK=infinity
ExecStart="$PWD/.venv/bin/python" -m bn_jax.main$(quoted "$@")
KillSignal=SIGTERM
TimeoutStopSec=120
Restart=on-failure
RestartSec=15
RestartPreventExitStatus=2 3 4 5 7 8

[Install]
WantedBy=multi-user.target
END
  do_it sudo systemctl daemon-reload
  do_it sudo systemctl enable bn_jax
  do_it sudo systemctl restart bn_jax
}

USER=${USER:-$(id -un)}
case $COMMAND in
  install) install ;;
  mount) mount_bucket "${1:?the name of a bucket}" ;;
  mount-data) mount_data ;;
  start) start "$@" ;;
  *)
    echo "tpu_host.sh: command '$COMMAND' is not one of install, mount, mount-data, start" >&2
    exit 2
    ;;
esac
