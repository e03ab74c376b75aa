#!/usr/bin/env bash
# A Cloud TPU VM slice from the request to the finished run; see docs/tpu.md.
set -eu
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ME=launch/tpu_pod.sh
COMMANDS="create wait install run logs status stop resume delete types"
KNOWN="PROJECT ZONE NAME TYPE RUNTIME_VERSION CAPACITY SLICES BUCKET NFS RUNS REPO REF SERVICE_ACCOUNT WORKER TIMEOUT POLL RESTARTS"
PROJECT=${PROJECT:-}
ZONE=${ZONE:-}
NAME=${NAME:-}
TYPE=${TYPE:-}
RUNTIME_VERSION=${RUNTIME_VERSION:-}
CAPACITY=${CAPACITY:-on-demand}
SLICES=${SLICES:-1}
BUCKET=${BUCKET:-}
NFS=${NFS:-}
RUNS=${RUNS:-/mnt/runs}
REPO=${REPO:-}
REF=${REF:-main}
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-}
WORKER=${WORKER:-}
TIMEOUT=${TIMEOUT:-86400}
POLL=${POLL:-30}
RESTARTS=${RESTARTS:-100}
SOURCE=smart-grpo-jax
# shellcheck source-path=SCRIPTDIR source=settings.sh
. "$HERE/settings.sh"

usage() {
  cat <<'TEXT'
launch/tpu_pod.sh COMMAND [--setting=value …] [--dry-run] [-- ARGUMENTS of smart_grpo_jax.main]

  create      asks for the slice (a queued resource)
  wait        until it is there
  install     this checkout (or REPO at REF), with its dependencies, on every worker
  run -- …    the same command on every worker, in the background, on the mounted bucket
  logs        follows the log: worker 0, or WORKER=all
  status      the slice and every worker
  stop        every worker saves and ends
  resume -- … after a preemption: asks again, installs again, runs again; the run goes on where it stopped
  delete      gives the slice back
  types       the known accelerator types

Settings, as variables or as flags (PROJECT=p or --project=p):
  PROJECT ZONE NAME   where, and what it is called
  TYPE                e.g. v5litepod-16, v6e-8, v5p-16
  RUNTIME_VERSION     of the VM image; known for the known types
  CAPACITY            on-demand (default), spot, reserved
  SLICES              number of slices (1); more make a multislice run
  BUCKET or NFS       gs://bucket/folder or host:/share: what is mounted at RUNS (/mnt/runs) on all workers
  REPO REF            a git URL to clone and its branch or tag (default: copies this checkout)
  SERVICE_ACCOUNT     of the VMs (default: the project's)
  WORKER              0 or all: whose log
  TIMEOUT POLL        of `wait`, in seconds (86400, 30)
  RESTARTS            how often a worker starts the program again by itself (100)
TEXT
}

# generation, runtime version, sizes: chips for v5litepod and v6e, cores (two in a chip) for v4 and v5p.
types() {
  cat <<'TABLE'
v4         tpu-ubuntu2204-base  8,16,32,64,128,256,512,1024,2048,4096
v5litepod  v2-alpha-tpuv5-lite  1,4,8,16,32,64,128,256
v5p        v2-alpha-tpuv5       8,16,32,64,128,256,512,1024,2048,4096,8192,12288
v6e        v2-alpha-tpuv6e      1,4,8,16,32,64,128,256
TABLE
}

# The runtime version of TYPE. A type that the table does not know needs RUNTIME_VERSION.
check_type() {
  need TYPE v5litepod-16
  [ -z "$RUNTIME_VERSION" ] || return 0
  local generation version sizes
  while read -r generation version sizes; do
    [ "$generation" = "${TYPE%-*}" ] || continue
    case ,$sizes, in *",${TYPE##*-},"*)
      RUNTIME_VERSION=$version
      return 0
      ;;
    esac
    refuse "TYPE: got $TYPE, wanted $generation- and one of $sizes (or set RUNTIME_VERSION)"
  done <<EOT
$(types)
EOT
  case $TYPE in
    v5e-*) refuse "TYPE: got $TYPE, wanted v5litepod-${TYPE#v5e-}" ;;
    *) refuse "TYPE: got $TYPE, wanted e.g. v5litepod-16, v6e-8, v5p-16 (or set RUNTIME_VERSION)" ;;
  esac
}

check_place() {
  need PROJECT my-project
  need ZONE us-west4-a
  need NAME my-run
  whole SLICES
}

check_storage() {
  [ -n "$BUCKET$NFS" ] || refuse "BUCKET: is not set, wanted e.g. BUCKET=gs://my-bucket/runs (or NFS=10.0.0.2:/share)"
  [ -z "$BUCKET" ] || split_bucket
}

queued() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$NAME" "--project=$PROJECT" "--zone=$ZONE" "$@"
}

# The TPU VMs of the queued resource.
nodes() {
  if [ "$SLICES" = 1 ]; then
    echo "$NAME"
    return
  fi
  local i
  for ((i = 0; i < SLICES; i++)); do echo "$NAME-$i"; done
}

# on_node NODE WORKER COMMAND
on_node() {
  # Standard input is not the worker's: ssh would eat what a loop reads.
  run gcloud compute tpus tpu-vm ssh "$1" "--project=$PROJECT" "--zone=$ZONE" "--worker=$2" "--command=$3" </dev/null
}

on_all() {
  local node
  for node in $(nodes); do on_node "$node" all "$1"; done
}

# The worker script with its settings, as a line for the worker's shell.
worker() {
  local line
  line=$(quote "BUCKET=$BUCKET" "NFS=$NFS" "RUNS=$RUNS" "RESTARTS=$RESTARTS")
  echo "env $line bash $SOURCE/launch/worker.sh $(quote "$@")"
}

create() {
  check_type
  one_of CAPACITY on-demand spot reserved
  local options=("--accelerator-type=$TYPE" "--runtime-version=$RUNTIME_VERSION")
  if [ "$SLICES" = 1 ]; then
    options=("${options[@]}" "--node-id=$NAME")
  else
    options=("${options[@]}" "--node-count=$SLICES" "--node-prefix=$NAME")
  fi
  [ "$CAPACITY" = on-demand ] || options=("${options[@]}" "--$CAPACITY")
  [ -z "$SERVICE_ACCOUNT" ] || options=("${options[@]}" "--service-account=$SERVICE_ACCOUNT")
  queued create "${options[@]}"
}

state() {
  queued describe "--format=value(state.state)"
}

wait_until_active() {
  whole TIMEOUT
  whole POLL
  if [ -n "$DRY_RUN" ]; then
    state
    return
  fi
  local now last='' left=$TIMEOUT
  while :; do
    now=$(state)
    [ "$now" = "$last" ] || echo "$NAME: $now"
    last=$now
    case $now in
      ACTIVE) return 0 ;;
      FAILED)
        echo "$ME: $NAME: the request failed; $ME status shows why" >&2
        return 1
        ;;
      SUSPENDING | SUSPENDED)
        echo "$ME: $NAME: preempted; $ME resume asks again" >&2
        return 75
        ;;
    esac
    if [ "$left" -le 0 ]; then
      echo "$ME: $NAME: still $now after $TIMEOUT s; the request stays in the queue" >&2
      return 1
    fi
    sleep "$POLL"
    left=$((left - POLL))
  done
}

install() {
  local archive=$SOURCE.tgz node folder
  if [ -n "$REPO" ]; then
    on_all "rm -rf $SOURCE && git clone --quiet --depth 1 --branch $(quote "$REF") $(quote "$REPO") $SOURCE && $(worker install)"
    return
  fi
  folder=/tmp
  # What git knows or does not ignore, as it lies here; a file that was deleted but not committed is left out.
  if [ -z "$DRY_RUN" ]; then
    git -C "$HERE/.." rev-parse --git-dir >/dev/null 2>&1 ||
      refuse "REPO: is not set and this is no git checkout, wanted e.g. REPO=https://host/you/smart-grpo-jax.git"
    folder=$(mktemp -d)
    (set -o pipefail && cd "$HERE/.." && git ls-files -co --exclude-standard -z | while IFS= read -r -d '' file; do
      [ ! -e "$file" ] || printf '%s\0' "$file"
    done | COPYFILE_DISABLE=1 tar --null -czf "$folder/$archive" -T -)
  fi
  for node in $(nodes); do
    run gcloud compute tpus tpu-vm scp "$folder/$archive" "$node:$archive" "--project=$PROJECT" "--zone=$ZONE" --worker=all
  done
  [ -n "$DRY_RUN" ] || rm -rf "$folder"
  on_all "rm -rf $SOURCE && mkdir $SOURCE && tar -xzf $archive -C $SOURCE && $(worker install)"
}

start() {
  check_program
  check_storage
  add_workdir
  on_all "$(worker run -- "${ARGS[@]}")"
}

logs() {
  WORKER=${WORKER:-0}
  case $WORKER in
    all) ;;
    '' | *[!0-9]*) refuse "WORKER: got $WORKER, wanted a number or all" ;;
  esac
  local node
  for node in $(nodes); do
    if [ -n "$DRY_RUN" ] || [ "$WORKER" != all ]; then
      on_node "$node" "$WORKER" "$(worker log)"
    else
      on_node "$node" all "$(worker log)" &
    fi
    [ "$WORKER" = all ] || break
  done
  wait
}

status() {
  queued describe
  on_all "$(worker status)"
}

resume() {
  check_type
  check_program
  check_storage
  whole POLL
  local now=SUSPENDED
  if [ -n "$DRY_RUN" ]; then state; else now=$(state 2>/dev/null) || now=MISSING; fi
  while [ "$now" = SUSPENDING ]; do
    sleep "$POLL"
    now=$(state 2>/dev/null) || now=MISSING
  done
  case $now in
    SUSPENDED | FAILED)
      queued delete --force --quiet
      create
      wait_until_active
      install
      ;;
    MISSING)
      create
      wait_until_active
      install
      ;;
    ACTIVE) ;;
    *)
      wait_until_active
      install
      ;;
  esac
  start
}

parse "$@"
[ "$COMMAND" = types ] || check_place
case $COMMAND in
  create) create ;;
  wait) wait_until_active ;;
  install) install ;;
  run) start ;;
  logs) logs ;;
  status) status ;;
  stop) on_all "$(worker stop)" ;;
  resume) resume ;;
  delete) queued delete --force --quiet ;;
  types) types ;;
esac
