#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster, as a JobSet; see docs/tpu.md.
set -eu
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ME=launch/gke.sh
COMMANDS="render apply status logs delete"
KNOWN="NAME NAMESPACE IMAGE GENERATION TOPOLOGY CHIPS SLICES SPOT BUCKET RUNS RUN_AS SERVICE_ACCOUNT RESTARTS CONTEXT"
NAME=${NAME:-}
NAMESPACE=${NAMESPACE:-default}
IMAGE=${IMAGE:-}
GENERATION=${GENERATION:-}
TOPOLOGY=${TOPOLOGY:-}
CHIPS=${CHIPS:-}
SLICES=${SLICES:-1}
SPOT=${SPOT:-false}
BUCKET=${BUCKET:-}
RUNS=${RUNS:-/mnt/runs}
RUN_AS=${RUN_AS:-0}
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-default}
RESTARTS=${RESTARTS:-100}
CONTEXT=${CONTEXT:-}
# shellcheck source-path=SCRIPTDIR source=settings.sh
. "$HERE/settings.sh"

usage() {
  cat <<'TEXT'
launch/gke.sh COMMAND [--setting=value …] [--dry-run] [-- ARGUMENTS of smart_grpo_jax.main]

  render -- …   prints the manifest (launch/gke/jobset.yaml, filled in)
  apply -- …    starts the run; --dry-run prints the manifest
  status        the JobSet and its Pods
  logs          follows the log of the first host
  delete        ends the run (every host saves) and removes the JobSet

Settings, as variables or as flags (NAME=n or --name=n):
  NAME IMAGE            of the run; the image of launch/docker/tpu.Dockerfile in a registry
  GENERATION TOPOLOGY   v4, v5e, v5p or v6e; e.g. 4x4 (v5e, v6e), 2x2x2 (v4, v5p)
  BUCKET                gs://bucket/folder, mounted at RUNS (/mnt/runs)
  CHIPS                 of one host (4, or fewer where the slice has fewer; 8 for the 8-chip machines)
  SLICES                number of slices (1)
  SPOT                  true or false (false)
  NAMESPACE             default
  SERVICE_ACCOUNT       Kubernetes service account that may write the bucket (default)
  RUN_AS                user id in the container (0: the TPU's device files belong to root)
  RESTARTS              after preemptions and exit code 75 (100)
  CONTEXT               of kubectl (the current one)
TEXT
}

check() {
  need NAME my-run
  case $NAME in
    *[!a-z0-9-]* | -* | *-) refuse "NAME: got $NAME, wanted small letters, digits and -" ;;
  esac
  [ ${#NAME} -le 40 ] || refuse "NAME: got ${#NAME} characters, wanted at most 40"
}

# ACCELERATOR, CHIPS and HOSTS from GENERATION and TOPOLOGY.
check_slice() {
  need IMAGE us-docker.pkg.dev/my-project/images/smart-grpo-jax:1
  need GENERATION v5e
  need TOPOLOGY 4x4
  need BUCKET gs://my-bucket/runs
  split_bucket
  one_of SPOT true false
  whole SLICES
  whole RESTARTS
  case $RUN_AS in '' | *[!0-9]*) refuse "RUN_AS: got $RUN_AS, wanted the number of a user" ;; esac
  local axes=2 rest=$TOPOLOGY axis total=1 count=0
  case $GENERATION in
    v4) ACCELERATOR=tpu-v4-podslice axes=3 ;;
    v5e) ACCELERATOR=tpu-v5-lite-podslice ;;
    v5p) ACCELERATOR=tpu-v5p-slice axes=3 ;;
    v6e) ACCELERATOR=tpu-v6e-slice ;;
    *) refuse "GENERATION: got $GENERATION, wanted one of: v4 v5e v5p v6e" ;;
  esac
  while [ -n "$rest" ]; do
    axis=${rest%%x*}
    case $axis in '' | 0* | *[!0-9]*) refuse "TOPOLOGY: got $TOPOLOGY, wanted e.g. 4x4 or 2x2x2" ;; esac
    total=$((total * axis))
    count=$((count + 1))
    case $rest in *x*) rest=${rest#*x} ;; *) rest= ;; esac
  done
  [ "$count" = "$axes" ] || refuse "TOPOLOGY: got $TOPOLOGY for $GENERATION, wanted $axes numbers joined by x"
  [ -n "$CHIPS" ] || CHIPS=$((total < 4 ? total : 4))
  whole CHIPS
  [ $((total % CHIPS)) = 0 ] || refuse "CHIPS: got $CHIPS, wanted a divisor of the $total chips of $TOPOLOGY"
  HOSTS=$((total / CHIPS))
}

# The words as a JSON list, which is YAML.
json() {
  local word line=
  for word in "$@"; do
    case $word in *[[:cntrl:]]*) refuse "got an argument with a line break or another control character" ;; esac
    word=$(printf %s "$word" | sed 's/[\\"]/\\&/g')
    line="$line${line:+, }\"$word\""
  done
  printf '[%s]\n' "$line"
}

# sub NAME VALUE: the command of sed that fills in one setting.
sub() {
  printf "s|\${%s}|%s|g\n" "$1" "$(printf %s "$2" | sed 's/[\\&|]/\\&/g')"
}

# The arguments come last: they may hold a ${…} of their own.
substitutions() {
  sub NAME "$NAME"
  sub NAMESPACE "$NAMESPACE"
  sub IMAGE "$IMAGE"
  sub ACCELERATOR "$ACCELERATOR"
  sub TOPOLOGY "$TOPOLOGY"
  sub CHIPS "$CHIPS"
  sub HOSTS "$HOSTS"
  sub SLICES "$SLICES"
  sub BUCKET_NAME "$BUCKET_NAME"
  sub ONLY_DIR "${BUCKET_FOLDER:+,only-dir:$BUCKET_FOLDER}"
  sub RUNS "$RUNS"
  sub RUN_AS "$RUN_AS"
  sub SERVICE_ACCOUNT "$SERVICE_ACCOUNT"
  sub RESTARTS "$RESTARTS"
  [ "$SPOT" = true ] || echo '/# spot$/d'
  sub ARGS "$1"
}

# The manifest without the template's comments.
render() {
  check_slice
  check_program
  add_workdir
  local list
  list=$(json "${ARGS[@]}")
  sed -e '/^ *#/d' -e "$(substitutions "$list")" "$HERE/gke/jobset.yaml"
}

kube() {
  if [ -n "$CONTEXT" ]; then set -- "--context=$CONTEXT" "$@"; fi
  run kubectl "--namespace=$NAMESPACE" "$@"
}

parse "$@"
check
POD="jobset.sigs.k8s.io/jobset-name=$NAME"
case $COMMAND in
  render) render ;;
  apply)
    MANIFEST=$(render)
    if [ -n "$DRY_RUN" ]; then
      printf '%s\n' "$MANIFEST"
    else
      printf '%s\n' "$MANIFEST" | kube apply -f -
    fi
    ;;
  status)
    kube get jobset "$NAME"
    kube get pods "--selector=$POD" -o wide
    ;;
  logs) kube logs -f "--selector=$POD,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0" -c train --tail=100 ;;
  delete) kube delete jobset "$NAME" ;;
esac
