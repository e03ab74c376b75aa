# shellcheck shell=bash disable=SC2153
# Read by the scripts beside it: settings from the environment or from flags, refusals, quoting, dry runs.
# It keeps to bash 3.2, the one that macOS has. A script sets ME, KNOWN and COMMANDS before it calls `parse`.

DRY_RUN=${DRY_RUN:-}
COMMAND=
ARGS=()

# One line and exit code 2: the user's mistake.
refuse() {
  printf '%s: %s\n' "$ME" "$1" >&2
  exit 2
}

# The words as one line that a shell reads back into the same words.
quote() {
  local word line=
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'$(printf %s "$word" | sed "s/'/'\\\\''/g")'" ;;
    esac
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# Runs a command; with --dry-run prints it instead.
run() {
  if [ -n "$DRY_RUN" ]; then quote "$@"; else "$@"; fi
}

# need NAME EXAMPLE: the setting NAME must have a value.
need() {
  [ -n "${!1:-}" ] || refuse "$1: is not set, wanted e.g. $1=$2 (or $(flag "$1")=$2)"
}

# whole NAME: the setting is a whole number of at least 1.
whole() {
  case ${!1} in
    '' | 0* | *[!0-9]*) refuse "$1: got ${!1}, wanted a whole number of at least 1" ;;
  esac
}

# one_of NAME WORDS…: the setting is one of the words.
one_of() {
  local name=$1 word
  shift
  for word in "$@"; do
    [ "${!name}" != "$word" ] || return 0
  done
  refuse "$name: got ${!name}, wanted one of: $*"
}

# The flag of a setting: RUNTIME_VERSION is --runtime-version.
flag() {
  printf -- '--%s' "$(printf %s "$1" | tr 'A-Z_' 'a-z-')"
}

# assign --some-name VALUE: the same as SOME_NAME=VALUE in the environment.
assign() {
  local name
  name=$(printf %s "${1#--}" | tr 'a-z-' 'A-Z_')
  case " $KNOWN " in
    *" $name "*) printf -v "$name" %s "$2" ;;
    *) refuse "$1: no such flag (see $ME --help)" ;;
  esac
}

# Settings, the sub-command in COMMAND, and the words after -- in ARGS.
parse() {
  while [ $# -gt 0 ]; do
    case $1 in
      --)
        shift
        ARGS=("$@")
        break
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --dry-run) DRY_RUN=1 ;;
      --*=*) assign "${1%%=*}" "${1#*=}" ;;
      --*)
        [ $# -ge 2 ] || refuse "$1: has no value, wanted $1=VALUE"
        assign "$1" "$2"
        shift
        ;;
      *)
        [ -z "$COMMAND" ] || refuse "got $1 after $COMMAND, wanted the program's arguments after --"
        COMMAND=$1
        ;;
    esac
    shift
  done
  [ -n "$COMMAND" ] || refuse "no command, wanted one of: $COMMANDS (see $ME --help)"
  case " $COMMANDS " in
    *" $COMMAND "*) ;;
    *) refuse "$COMMAND: no such command, wanted one of: $COMMANDS" ;;
  esac
}

# The program's arguments are there, and the run folder is a path: the run folder is locked, renamed and
# appended to, which object storage alone cannot do.
check_program() {
  local word
  [ ${#ARGS[@]} -gt 0 ] || refuse "nothing after --, wanted the program's arguments (try -- --config=configs/shapes.py)"
  for word in "${ARGS[@]}"; do
    case $word in
      --workdir=gs://* | gs://*) refuse "--workdir: got ${word#--workdir=}, wanted a path such as $RUNS/NAME (BUCKET is mounted at $RUNS)" ;;
    esac
  done
}

# Adds --workdir=$RUNS/$NAME unless the user gave one.
add_workdir() {
  local word
  for word in "${ARGS[@]}"; do
    case $word in --workdir | --workdir=*) return 0 ;; esac
  done
  ARGS=("${ARGS[@]}" "--workdir=$RUNS/$NAME")
}

# BUCKET is gs://name or gs://name/folder: sets BUCKET_NAME and BUCKET_FOLDER.
split_bucket() {
  case $BUCKET in
    gs://?*) ;;
    *) refuse "BUCKET: got $BUCKET, wanted e.g. BUCKET=gs://my-bucket/runs" ;;
  esac
  BUCKET_NAME=${BUCKET#gs://}
  BUCKET_FOLDER=
  case $BUCKET_NAME in
    */*)
      BUCKET_FOLDER=${BUCKET_NAME#*/}
      BUCKET_FOLDER=${BUCKET_FOLDER%/}
      BUCKET_NAME=${BUCKET_NAME%%/*}
      ;;
  esac
}
