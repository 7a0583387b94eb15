#!/usr/bin/env bash
# One run on a Cloud TPU slice of v4, v5e, v5p or v6e, as a queued resource. Google fixes faults of the
# Cloud TPU API but develops it no further, and TPU7x exists on GKE and Compute Engine only: see
# launch/gke for both.
#
#   launch/tpu_pod.sh COMMAND --name=NAME --zone=ZONE --project=PROJECT [--dry-run] [OPTIONS]
#
#   create   asks for the slice      --type=v5litepod-64 --runtime=v2-alpha-tpuv5-lite [--spot]
#            with the data set on a disk that all hosts read      [--data-disk=DISK]
#   wait     returns once it is there; fails if it will not come
#   install  this checkout, its locked packages and the bucket on every host    --bucket=BUCKET
#   run      starts training on every host      -- OPTIONS OF bn_jax.main
#   status   the slice's state, and of each host whether it trains and the last exit code
#   logs     follows host 0's output
#   stop     asks for an orderly stop: the state is saved, exit code 75
#   resume   after a preemption: delete, create, wait, install, run (takes the options of all)
#   delete   gives the slice back: ends all costs but the bucket's
#
# Training is a systemd unit of each host: it outlives the connection, gets SIGTERM when the host is
# taken away, and is started again after a reboot and after exit codes that a restart mends
# (docs/operations.md). The bucket, for runs, is mounted at /mnt/bn_jax, before training starts and
# until it has ended: a host's own disk is gone after a preemption. The data disk is one of the same
# project and zone, with an ext4 file system of the label bn_jax_data (launch/README.md). It is
# mounted at /mnt/bn_jax_data on every host, read-only.
# --dry-run prints every command instead of running it.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "tpu_pod.sh: $*" >&2
  exit 2
}

COMMAND=${1:-}
[[ $COMMAND =~ ^(create|wait|install|run|status|logs|stop|resume|delete)$ ]] ||
  fail "command '$COMMAND' is not one of create, wait, install, run, status, logs, stop, resume, delete"
shift
NAME='' ZONE='' PROJECT='' TYPE='' RUNTIME='' BUCKET='' DATA_DISK='' SPOT=0 DRY_RUN=0
while (($#)); do
  case $1 in
    --name=*) NAME=${1#*=} ;;
    --zone=*) ZONE=${1#*=} ;;
    --project=*) PROJECT=${1#*=} ;;
    --type=*) TYPE=${1#*=} ;;
    --runtime=*) RUNTIME=${1#*=} ;;
    --bucket=*) BUCKET=${1#*=} ;;
    --data-disk=*) DATA_DISK=${1#*=} ;;
    --spot) SPOT=1 ;;
    --dry-run) DRY_RUN=1 ;;
    --)
      shift
      break
      ;;
    *) fail "unknown option '$1': see the first lines of this file; those of bn_jax.main come after --" ;;
  esac
  shift
done
TRAINING=("$@")

need() {
  local option variable
  for option in "$@"; do
    variable=${option^^}
    [[ -n ${!variable} ]] || fail "$COMMAND needs --$option=..."
  done
}

do_it() {
  if ((DRY_RUN)); then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

need name zone project
[[ $TYPE != tpu7x* ]] || fail "--type=$TYPE: the Cloud TPU API has no TPU7x; use launch/gke/tpu7x.yaml"
PLACE=(--zone="$ZONE" --project="$PROJECT")
QUEUED=(gcloud compute tpus queued-resources)

on() { # hosts ("all" or a number), shell line
  do_it gcloud compute tpus tpu-vm ssh "$NAME" "${PLACE[@]}" --worker="$1" --command="$2"
}

create() {
  need type runtime
  local request=("${QUEUED[@]}" create "$NAME" --node-id="$NAME" "${PLACE[@]}")
  request+=(--accelerator-type="$TYPE" --runtime-version="$RUNTIME")
  if [[ -n $DATA_DISK ]]; then
    request+=(--data-disk="source=projects/$PROJECT/zones/$ZONE/disks/$DATA_DISK,mode=read-only")
  fi
  ((SPOT)) && request+=(--spot)
  do_it "${request[@]}"
}

wait_for_it() {
  local describe=("${QUEUED[@]}" describe "$NAME" "${PLACE[@]}" "--format=value(state.state)")
  local state
  if ((DRY_RUN)); then
    do_it "${describe[@]}"
    return
  fi
  while true; do
    state=$("${describe[@]}")
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING)
        echo "tpu_pod.sh: $NAME is $state; see status, then delete or resume" >&2
        exit 1
        ;;
    esac
    echo "$(date +%H:%M:%S) $NAME: $state"
    sleep 30
  done
}

install() {
  need bucket
  do_it mkdir -p build
  do_it git archive --format=tar.gz --output=build/bn_jax.tar.gz HEAD
  do_it gcloud compute tpus tpu-vm scp build/bn_jax.tar.gz "$NAME:" "${PLACE[@]}" --worker=all
  local script=bn_jax/launch/tpu_host.sh
  on all "mkdir -p bn_jax && tar -xzf bn_jax.tar.gz -C bn_jax && bash $script install"
  on all "bash $script mount $(printf %q "$BUCKET")"
  [[ -z $DATA_DISK ]] || on all "bash $script mount-data"
}

run() {
  ((${#TRAINING[@]})) || fail "no options for bn_jax.main: write them after --"
  on all "bash bn_jax/launch/tpu_host.sh start$(printf ' %q' "${TRAINING[@]}")"
}

delete() {
  do_it "${QUEUED[@]}" delete "$NAME" "${PLACE[@]}" --force --quiet
}

case $COMMAND in
  create) create ;;
  wait) wait_for_it ;;
  install) install ;;
  run) run ;;
  status)
    do_it "${QUEUED[@]}" describe "$NAME" "${PLACE[@]}" "--format=value(state.state)"
    on all 'systemctl show bn_jax --property=ActiveState,SubState,ExecMainStatus,NRestarts'
    ;;
  logs) on 0 'journalctl --unit=bn_jax --output=cat --follow --lines=50' ;;
  stop) on all 'sudo systemctl disable --now bn_jax' ;;
  delete) delete ;;
  resume)
    need type runtime bucket
    ((${#TRAINING[@]})) || fail "no options for bn_jax.main: write them after --"
    delete
    create
    wait_for_it
    install
    run
    ;;
esac
