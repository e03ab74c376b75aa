#!/usr/bin/env bash
# What tpu_pod.sh does on every worker of a pod; also good on a single machine.
set -u
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ME=launch/worker.sh
COMMANDS="install mount run again stop status log"
KNOWN="BUCKET NFS RUNS EXTRA PYTHON_VERSION VENV STATE RESTARTS PAUSE GRACE TAIL"
BUCKET=${BUCKET:-}
NFS=${NFS:-}
RUNS=${RUNS:-/mnt/runs}
EXTRA=${EXTRA:-tpu}
PYTHON_VERSION=${PYTHON_VERSION:-3.12}
VENV=${VENV:-$HOME/sgrpo-venv}
STATE=${STATE:-$HOME/sgrpo-state}
RESTARTS=${RESTARTS:-100}
PAUSE=${PAUSE:-10}
GRACE=${GRACE:-120}
TAIL=${TAIL:-100}
# shellcheck source-path=SCRIPTDIR source=settings.sh
. "$HERE/settings.sh"

usage() {
  cat <<'TEXT'
launch/worker.sh COMMAND [--setting=value …] [--dry-run] [-- WORDS]

  install             Python and this repository with its extra, in a virtual environment
  mount               the bucket (gcsfuse) or the NFS share at RUNS, unless it is there
  run -- ARGUMENTS    smart_grpo_jax.main in the background, started again on exit code 75
  again -- COMMAND    any command, started again on exit code 75 or when a signal ended it
  stop                saves and ends
  status              running, or the exit code
  log                 follows the log

Settings, as variables or flags: BUCKET=gs://… or NFS=host:/share, RUNS (/mnt/runs), EXTRA (tpu, cuda),
PYTHON_VERSION (3.12), VENV, STATE (pid and log), RESTARTS (100), PAUSE (10 s), GRACE (120 s), TAIL (100).
TEXT
}

# The Python of the VM images is older than 3.11, so uv brings one.
install() {
  local uv=$HOME/.local/bin/uv
  run env PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv || return
  run "$uv" venv --quiet --allow-existing --python "$PYTHON_VERSION" "$VENV" || return
  run "$uv" pip install --quiet --python "$VENV/bin/python" "$(dirname "$HERE")[$EXTRA]"
}

mount_runs() {
  [ -n "$BUCKET$NFS" ] || refuse "BUCKET: is not set, wanted e.g. BUCKET=gs://my-bucket/runs (or NFS=10.0.0.2:/share)"
  [ -z "$BUCKET" ] || split_bucket
  if [ -z "$DRY_RUN" ] && mountpoint -q "$RUNS"; then return 0; fi
  run sudo mkdir -p "$RUNS" || return
  if [ -n "$NFS" ]; then
    command -v mount.nfs >/dev/null || run sudo apt-get install -y -qq nfs-common || return
    run sudo mount -t nfs -o hard "$NFS" "$RUNS"
    return
  fi
  command -v gcsfuse >/dev/null || install_gcsfuse || return
  run sudo chown "$(id -u):$(id -g)" "$RUNS" || return
  # A checkpoint is committed by renaming its folder, and every host must see at once what another wrote.
  local options=(--implicit-dirs --rename-dir-limit=100000)
  options=("${options[@]}" --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0)
  [ -z "$BUCKET_FOLDER" ] || options=("${options[@]}" "--only-dir=$BUCKET_FOLDER")
  run gcsfuse "${options[@]}" "$BUCKET_NAME" "$RUNS"
}

install_gcsfuse() {
  local key=/usr/share/keyrings/cloud.google.asc site=https://packages.cloud.google.com/apt release list
  release=$(lsb_release -cs 2>/dev/null || echo jammy)
  list="deb [signed-by=$key] $site gcsfuse-$release main"
  run sudo sh -c "curl -fsS $site/doc/apt-key.gpg >$key && echo '$list' >/etc/apt/sources.list.d/gcsfuse.list" || return
  run sudo apt-get update -qq || return
  run sudo apt-get install -y -qq gcsfuse
}

start() {
  check_program
  if [ -z "$DRY_RUN" ] && alive; then
    echo "$ME: already running as process $(cat "$STATE/pid"); stop it first" >&2
    exit 3
  fi
  mount_runs || exit
  local command=("$VENV/bin/python" -m smart_grpo_jax.main "${ARGS[@]}")
  if [ -n "$DRY_RUN" ]; then
    quote "${command[@]}"
    return
  fi
  mkdir -p "$STATE" && cd "$HERE/.." || exit
  rm -f "$STATE/exit"
  export STATE RESTARTS PAUSE
  setsid nohup bash "$HERE/worker.sh" again -- "${command[@]}" >>"$STATE/log" 2>&1 </dev/null &
  echo $! >"$STATE/pid"
  echo "started as process $!"
}

# Starts the command again while it asks for it (75) or a signal ended it, but not after `stop`.
again() {
  [ ${#ARGS[@]} -gt 0 ] || refuse "nothing after --, wanted a command"
  run_again "${ARGS[@]}"
}

run_again() {
  local tries=0 stopping='' child='' code=0 last=0 left=0
  if [ -n "$DRY_RUN" ]; then
    quote "$@"
    return
  fi
  export SGRPO_SUPERVISED=1 # a run that was stopped before its end asks for a restart with 75
  trap 'stopping=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT
  while :; do
    "$@" &
    child=$!
    # The signal may have come before there was a child to tell.
    [ -z "$stopping" ] || kill -TERM "$child" 2>/dev/null
    code=0
    wait "$child" || code=$?
    # A signal interrupts `wait` before the child has ended, so its code is asked for until it is gone.
    while kill -0 "$child" 2>/dev/null; do
      code=0
      wait "$child" || code=$?
    done
    if [ -n "$stopping" ]; then
      last=0
      wait "$child" 2>/dev/null || last=$?
      [ "$last" = 127 ] || code=$last
    fi
    if [ -n "$stopping" ] || [ "$tries" -ge "$RESTARTS" ] || ! { [ "$code" = 75 ] || [ "$code" -ge 128 ]; }; then
      break
    fi
    tries=$((tries + 1))
    echo "$ME: exit code $code; starting again ($tries of $RESTARTS)" >&2
    child='' left=$PAUSE
    while [ -z "$stopping" ] && [ "$left" -gt 0 ]; do
      sleep 1
      left=$((left - 1))
    done
    [ -z "$stopping" ] || break
  done
  echo "$ME: exit code $code" >&2
  [ ! -d "$STATE" ] || echo "$code" >"$STATE/exit"
  return "$code"
}

alive() {
  [ -f "$STATE/pid" ] && kill -0 "$(cat "$STATE/pid")" 2>/dev/null
}

stop() {
  if [ -n "$DRY_RUN" ]; then
    echo "kill -TERM \"\$(cat $(quote "$STATE/pid"))\""
    return
  fi
  alive || {
    echo "not running"
    return 0
  }
  kill -TERM "$(cat "$STATE/pid")"
  local left=$((GRACE * 5))
  while alive && [ "$left" -gt 0 ]; do
    sleep 0.2
    left=$((left - 1))
  done
  if alive; then
    echo "$ME: process $(cat "$STATE/pid") still saves after $GRACE s" >&2
    return 1
  fi
  echo "stopped"
}

status() {
  if alive; then
    echo "$(hostname): running as process $(cat "$STATE/pid")"
  elif [ -f "$STATE/exit" ]; then
    echo "$(hostname): ended with exit code $(cat "$STATE/exit")"
  else
    echo "$(hostname): not running"
  fi
}

log() {
  if [ -n "$DRY_RUN" ]; then
    quote tail -n "$TAIL" -F "$STATE/log"
    return
  fi
  tail -n "$TAIL" -F "$STATE/log" | sed -u "s/^/[$(hostname)] /"
}

parse "$@"
whole GRACE
case $PAUSE in '' | *[!0-9]*) refuse "PAUSE: got $PAUSE, wanted a whole number of seconds" ;; esac
case $RESTARTS in '' | *[!0-9]*) refuse "RESTARTS: got $RESTARTS, wanted a whole number" ;; esac
case $COMMAND in
  install) install ;;
  mount) mount_runs ;;
  run) start ;;
  again) again ;;
  stop) stop ;;
  status) status ;;
  log) log ;;
esac
