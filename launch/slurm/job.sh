# A job from its start to the decision whether it comes back. The scripts beside this file read it; `steerlm launch` copies it
# into the one script that it submits. It needs bash and SLURM's commands on the node, and no Python outside of the container.
#
# What a run folder gets of a job, in launch/:
#   history/UNIT.jsonl   one line per event: start, end (with exit code, seconds, decision and reason), lost, moved (to another job)
#   alive/UNIT           seconds that the attempt has run so far, written every 20 s
#   exits/UNIT/N/        the exit codes of the ranks of attempt N that did not end with 0
# UNIT is the job's name and, in an array, the task's number. All attempts of one job share it.

say() { echo "steerlm: $*"; }

# note EVENT FIELDS: append one line to the history. FIELDS are JSON.
note() {
  printf '{"event":"%s","time":"%s","launch":"%s","job":"%s","attempt":%d,"nodes":"%s"%s}\n' \
    "$1" "$(date +%Y-%m-%dT%H:%M:%S%z)" "$LAUNCH_ID" "$job" "$attempt" "${SLURM_JOB_NODELIST:-$(uname -n)}" "${2:+,$2}" >>"$history"
}

# Lines of this launch in the history that hold all of the given strings.
events() {
  local found; found=$(grep -sF "\"launch\":\"$LAUNCH_ID\"" "$history")
  for word in "$@"; do found=$(grep -F -- "$word" <<<"$found"); done
  [ -z "$found" ] || printf '%s\n' "$found"
}

# Seconds that the attempts so far have run.
spent() { events '"ran":' | sed 's/.*"ran":\([0-9]*\).*/\1/' | awk '{ s += $1 } END { print s + 0 }'; }

# What a further attempt would go on from, as one word: names and sizes of checkpoints and journals.
progress() {
  find "$run_dir" -maxdepth 4 \( -path '*/checkpoints/*' -o -path '*/journal-*/*' \) -not -path '*/.*' -printf '%P %s\n' 2>/dev/null |
    sort | cksum | cut -d' ' -f1
}

within_hours() { # whether the budget of all attempts together is not used up after $1 more seconds
  [ -z "$MAX_HOURS" ] || awk -v s="$(($(spent) + $1))" -v h="$MAX_HOURS" 'BEGIN { exit !(s < h * 3600) }'
}

# run_dir=… of the arguments; without one it is added to them, so that all attempts work in one folder.
find_run_dir() {
  local argument
  for argument in "${arguments[@]}"; do
    case $argument in run_dir=*) run_dir=${argument#run_dir=} ;; esac
  done
  if [ -z "${run_dir:-}" ]; then
    # Tasks of an array, such as servers, must not share a folder.
    run_dir=${SERVED:-runs/${arguments[0]}}/job-${LAUNCH_ID}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}
    arguments+=("run_dir=$run_dir")
  fi
}

free_port() { # a port of this node that nobody listens on; jobs start looking at different ones
  local port=$((15000 + (${SLURM_JOB_ID:-$$} * 31 + RANDOM % 31) % 15000)) tries
  for ((tries = 0; tries < 200; tries++)); do
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
    port=$((15000 + (port + 1) % 15000))
  done
  echo "$port"
}

# ranks COMMAND…: become srun, which runs the command on all ranks of the job, in the container. Called in the background, so
# that signals to the background process are signals to srun, which passes them on to the ranks.
ranks() {
  local srun=(srun --kill-on-bad-exit=1 "${SRUN_ARGUMENTS[@]}") inside=()
  [ -z "${SLURM_CPUS_PER_TASK:-}" ] || srun+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")
  case $BINDING in
    cores) srun+=(--cpu-bind=cores --mem-bind=local) ;;
    numa) srun+=(--cpu-bind=ldoms --mem-bind=local) ;;
  esac
  if [ "$STARTER" = torchrun ]; then
    srun+=(--ntasks-per-node=1 "--ntasks=${SLURM_JOB_NUM_NODES:-1}")
    export STEERLM_RANKS_PER_NODE=$TASKS_PER_NODE
  fi
  case $CONTAINER in
    pyxis) srun+=("--container-image=$IMAGE" "--container-workdir=$PWD" "--container-mounts=$(IFS=,; echo "${MOUNTS[*]}")") ;;
    apptainer) inside=(apptainer exec --nv --pwd "$PWD" "${MOUNTS[@]/#/--bind=}" "$IMAGE") ;;
  esac
  [ -n "${SLURM_JOB_ID:-}" ] || srun=()
  exec "${srun[@]}" "${inside[@]}" "$@"
}

# While the ranks run: signs of life, and a stop when the hours are used up.
stay_alive() {
  local start=$SECONDS
  while sleep 20; do
    echo "$((SECONDS - start))" >"$alive"
    if ! within_hours "$((SECONDS - start))"; then kill -USR1 $$; break; fi
  done
}

# supervise COMMAND…: run it in the background, pass signals on to it, and set code to its exit code.
supervise() {
  local start=$SECONDS pulse child="" early=""
  stopped=""
  # A signal may come as soon as the command runs, and would end this shell if nothing waited for it yet.
  pass_on() {
    signalled=1 stopped=$1
    if [ -n "$child" ]; then kill "-$1" "$child" 2>/dev/null; else early=$1; fi
  }
  trap 'say "got USR1: the ranks save and stop"; pass_on USR1' USR1
  trap 'say "got TERM: the ranks save and stop"; pass_on TERM' TERM
  "$@" &
  child=$!
  [ -z "$early" ] || kill "-$early" "$child" 2>/dev/null
  stay_alive </dev/null >/dev/null 2>&1 &
  pulse=$!
  while :; do
    signalled=0
    wait "$child"
    code=$?
    [ $signalled = 1 ] || break
  done
  kill "$pulse" 2>/dev/null
  trap '' USR1 TERM # the decision is not cut short
  ran=$((SECONDS - start))
}

# The exit code of all ranks: srun gives the highest one, and ranks that were stopped for the fault of another have 75.
settle_code() {
  local codes; codes=$(cat "$exits"/* 2>/dev/null | sort -u)
  [ "$code" != 0 ] || return 0
  # Ranks that a signal ended before they listened to it had nothing to save: 138 is SIGUSR1, 143 SIGTERM.
  [ -z "$stopped" ] || case $code in 138 | 143) code=75 ;; esac
  if grep -qx 2 <<<"$codes"; then code=2
  elif grep -qxvE '0|75|' <<<"$codes"; then code=$(grep -xvE '0|75|' <<<"$codes" | head -n 1)
  fi
}

# What SLURM has decided about this attempt: nothing yet (RUNNING, or its controller does not answer); AGAIN: it starts the job
# again by itself, or has already, where it took the node for lost; LIMIT: the time is up; ENDING: somebody cancelled the job. A
# job that ends is COMPLETING for every reason, and the number of restarts, which a requeue raises at once, tells which.
job_state() {
  local shown restarts; shown=$(scontrol show job "$self" 2>/dev/null)
  restarts=$(sed -n 's/.*Restarts=\([0-9]*\).*/\1/p' <<<"$shown" | head -n 1)
  if [ "${restarts:-${SLURM_RESTART_COUNT:-0}}" != "${SLURM_RESTART_COUNT:-0}" ]; then echo AGAIN; return; fi
  case $shown in
    *JobState=RUNNING* | '') echo RUNNING ;;
    *JobState=PENDING* | *JobState=REQUEUE*) echo AGAIN ;;
    *Reason=TimeLimit* | *JobState=TIMEOUT*) echo LIMIT ;;
    *) echo ENDING ;;
  esac
}

# come_back [SBATCH OPTIONS…]: requeue this job; a new one takes its place where that is not allowed, or with options.
come_back() {
  [ -n "${SLURM_JOB_ID:-}" ] || return 0 # local.sh starts the next attempt
  case $(job_state) in
    ENDING) reason="the job was cancelled"; decision=stop; return 0 ;;
    AGAIN) reason="$reason; SLURM requeues it"; return 0 ;;
  esac
  if [ "$REQUEUE" = scontrol ] && [ $# = 0 ]; then
    scontrol requeue "$self" && return
    say "scontrol requeue is refused here: a new job takes this job's place"
  fi
  local new array=()
  [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || array=("--array=$SLURM_ARRAY_TASK_ID")
  new=$(LAUNCH_ID=$LAUNCH_ID sbatch --parsable --dependency="afterany:$self" "${array[@]}" "$@" "$SCRIPT" "${by_hand[@]}") || {
    reason="$reason; sbatch refused a new job"; decision=stop; return 0
  }
  new=${new%%;*}
  reason="$reason; job $new goes on"
  note moved "\"reason\":\"job $new goes on\""
  [ -z "$SERVERS_OF_THIS_JOB" ] || echo "$new" >>"$SERVERS_OF_THIS_JOB/clients"
  follow "$new"
}

# follow NEW: jobs that wait for the good end of this one wait for that of the job NEW. What waits for a whole array then waits
# for NEW and for each other task. Tasks that end at once do this one after the other.
follow() {
  local whole="afterok:${SLURM_ARRAY_JOB_ID:-none}" lock=$launch/following tries other dependency word words waits
  for ((tries = 0; tries < 60; tries++)); do
    mkdir "$lock" 2>/dev/null && break
    sleep 1
  done
  squeue -h -u "$(id -un)" -t PD -o '%A %E' 2>/dev/null | while read -r other dependency; do
    IFS=, read -ra words <<<"$dependency"
    words=("${words[@]%%(*}") waits=()
    for word in "${words[@]}"; do
      case $word in
        "$whole" | "${whole}_*") mapfile -t -O "${#waits[@]}" waits < <(other_tasks; echo "afterok:$1") ;;
        "afterok:$job" | "afterok:$self") waits+=("afterok:$1") ;;
        *) waits+=("$word") ;;
      esac
    done
    [ "${words[*]}" = "${waits[*]}" ] || scontrol update "JobId=$other" "Dependency=$(IFS=,; echo "${waits[*]}")"
  done
  rmdir "$lock" 2>/dev/null
}

# Dependencies on the other tasks of this array, but for those that are done and those that a new job has taken the place of: what
# waits for the array waits for that job already.
other_tasks() {
  local number found
  for ((number = ${SLURM_ARRAY_TASK_MIN:-0}; number <= ${SLURM_ARRAY_TASK_MAX:-0}; number++)); do
    [ "$number" != "$SLURM_ARRAY_TASK_ID" ] || continue
    found=$(grep -sF "\"launch\":\"$LAUNCH_ID\"" "$launch/history/${unit%-*}-$number.jsonl")
    grep -qF '"event":"moved"' <<<"$found" || tail -n 1 <<<"$found" | grep -qF '"decision":"done"' ||
      echo "afterok:${SLURM_ARRAY_JOB_ID}_$number"
  done
}

# Whether this attempt comes back, and why: decision is done, requeue or stop.
decide() {
  decision=stop
  local attempts=$((attempt + 1)) fault
  case $code in
    0) decision="done" reason=""; return ;;
    2) reason="an input error is not requeued"; return ;;
    75)
      reason="saved and stopped"
      [ -n "${SLURM_JOB_ID:-}" ] || [ -z "$stopped" ] || { reason="$reason by $stopped"; return; }
      ;;
    *)
      reason="a fault, exit code $code"
      fault=$(progress)
      if events '"fault":' | tail -n 1 | grep -qF "\"fault\":\"$fault\""; then
        reason="the second fault without a new checkpoint between them is not requeued (exit code $code)"
        return
      fi
      ;;
  esac
  if [ "$REQUEUE" = off ]; then reason="$reason; cluster.requeue=off"
  elif [ "$attempts" -gt "$MAX_REQUEUES" ]; then reason="$reason; cluster.max_requeues=$MAX_REQUEUES is reached"
  elif ! within_hours "$ran"; then reason="$reason; cluster.max_hours=$MAX_HOURS are used up"
  else decision=requeue
  fi
}

# The nodes are checked by all ranks; $launch/preflight/UNIT.bad then names those that fail.
preflight() {
  local bad=$launch/preflight/$unit.bad names
  mkdir -p "$launch/preflight" && rm -f "$bad"
  supervise ranks "$PYTHON" -u -m steerlm_megatron.launch.preflight "$bad" "${PREFLIGHT[@]}"
  [ -z "$stopped" ] || code=75
  [ "$code" != 0 ] || return 0
  names=$([ -f "$bad" ] && paste -sd, "$bad")
  if [ "$code" = 75 ]; then decide; return 1; fi
  decision=stop reason="the check of the nodes failed${names:+: $names}; see $launch/preflight"
  if [ -n "$names" ] && [ "$EXCLUDE_BAD_NODES" = true ] && [ "$attempt" -lt "$MAX_REQUEUES" ]; then
    decision=requeue exclude=("--exclude=${SLURM_EXCLUDED:+$SLURM_EXCLUDED,}$names")
  fi
  return 1
}

# Bootstrap waits for servers, and servers for its end: a file in the run folder says so.
end_servers() { [ -z "$SERVERS_OF_THIS_JOB" ] || touch "$SERVERS_OF_THIS_JOB/done"; }

# Whether a job that draws from this server runs or waits, as far as SLURM can be asked. It is asked every 30 s.
clients_left() {
  local there
  [ -e "$SERVED/clients" ] && [ $((SECONDS % 30)) -lt 2 ] || return 0
  there=$(squeue -h -u "$(id -un)" -o %A 2>/dev/null) || return 0
  grep -qxFf "$SERVED/clients" <<<"$there"
}

until_done() { # the ranks of a server end when the job that draws from them does
  local server="" early=""
  trap 'if [ -n "$server" ]; then kill -TERM "$server"; else early=1; fi' TERM USR1
  ranks "$PYTHON" -u -m steerlm_megatron "$@" &
  server=$!
  [ -z "$early" ] || kill -TERM "$server"
  while kill -0 $server 2>/dev/null; do
    if [ -e "$SERVED/done" ] || ! clients_left; then kill -TERM $server; wait $server; return 0; fi
    sleep 2
  done
  wait $server
}

# steerlm_job COMMAND OVERRIDES…: one attempt. Everything that is not set by the script has a default here.
steerlm_job() {
  : "${LAUNCH_ID:=${SLURM_ARRAY_JOB_ID:-${SLURM_JOB_ID:-$$}}}" "${PYTHON:=.venv/bin/python}" "${STARTER:=srun}"
  : "${REQUEUE:=scontrol}" "${MAX_REQUEUES:=10}" "${MAX_HOURS:=}" "${BINDING:=none}" "${CONTAINER:=none}" "${IMAGE:=}"
  : "${TASKS_PER_NODE:=${SLURM_NTASKS_PER_NODE:-1}}" "${RUN_PREFLIGHT:=false}" "${EXCLUDE_BAD_NODES:=false}" "${ARRAY:=}"
  : "${SERVERS_OF_THIS_JOB:=}" "${SERVED:=}" "${SCRIPT:=$0}"
  [ -n "${SRUN_ARGUMENTS+set}" ] || SRUN_ARGUMENTS=()
  [ -n "${MOUNTS+set}" ] || MOUNTS=("$PWD")
  [ -n "${PREFLIGHT+set}" ] || PREFLIGHT=()
  [ -n "${by_hand+set}" ] || by_hand=("$@")
  arguments=("$@") run_dir="" exclude=() reason="" ran=0 code=0 stopped=""
  job=${SLURM_JOB_ID:-$$}
  # The number of an array is also that of its last task, so that tasks are called by their own names.
  self=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  self=${self:-$job}
  case $ARRAY in
    records) arguments+=("array.task=$SLURM_ARRAY_TASK_ID") ;;
    sweep) mapfile -t more <"$ARGUMENTS/$SLURM_ARRAY_TASK_ID"; arguments+=("${more[@]}") ;;
  esac
  find_run_dir
  launch=${LAUNCH_DIR:-$run_dir/launch}
  unit=${SLURM_JOB_NAME:-local}${SLURM_ARRAY_TASK_ID:+-$SLURM_ARRAY_TASK_ID}
  unit=${unit//[!A-Za-z0-9_.-]/_}
  history=$launch/history/$unit.jsonl alive=$launch/alive/$unit
  mkdir -p "$launch/history" "$launch/alive" || exit 2
  attempt=$(events '"event":"start"' | wc -l)
  if [ "$attempt" -gt 0 ] && ! tail -n 1 "$history" | grep -qE '"event":"(end|lost|moved)"'; then
    attempt=$((attempt - 1)) note lost "\"ran\":$(cat "$alive" 2>/dev/null || echo 0),\"reason\":\"the attempt before ended without a word: a lost node, or killed\""
    attempt=$(events '"event":"start"' | wc -l)
  fi
  if [ "$attempt" -gt "$MAX_REQUEUES" ]; then
    reason="cluster.max_requeues=$MAX_REQUEUES is reached"
  elif ! within_hours 0; then
    reason="cluster.max_hours=$MAX_HOURS are used up"
  fi
  if [ -n "$reason" ]; then
    note end "\"code\":1,\"ran\":0,\"decision\":\"stop\",\"reason\":\"$reason\""
    say "job $job does not start again: $reason"
    end_servers
    return 1
  fi
  exits=$launch/exits/$unit/$attempt
  rm -rf "$exits" && mkdir -p "$exits" && echo 0 >"$alive"
  export STEERLM_EXITS=$exits
  [ -z "${SLURM_JOB_ID:-}" ] || { MASTER_PORT=$(free_port); export MASTER_PORT; }
  note start
  say "attempt $((attempt + 1)) of job $job on ${SLURM_JOB_NODELIST:-$(uname -n)}: ${arguments[*]}"
  if [ -n "$SERVED" ]; then
    until_done "${arguments[@]}"
    code=$? decision="done"
    note end "\"code\":$code,\"ran\":$SECONDS,\"decision\":\"done\",\"reason\":\"\""
    return $code
  fi
  if [ "$RUN_PREFLIGHT" != true ] || preflight; then
    supervise ranks "$PYTHON" -u -m steerlm_megatron "${arguments[@]}"
    settle_code
    decide
  fi
  local fault=""
  case $code in 0 | 2 | 75) ;; *) fault=",\"fault\":\"$(progress)\"" ;; esac
  if [ "$decision" = requeue ]; then
    # The line is written first, since SLURM ends this script when it requeues the job.
    note end "\"code\":$code,\"ran\":$ran,\"decision\":\"requeue\",\"reason\":\"$reason\"$fault"
    come_back "${exclude[@]}"
    [ "$decision" = requeue ] || note end "\"code\":$code,\"ran\":0,\"decision\":\"stop\",\"reason\":\"$reason\""
  else
    note end "\"code\":$code,\"ran\":$ran,\"decision\":\"$decision\",\"reason\":\"$reason\"$fault"
  fi
  case $decision in
    requeue) say "job $job comes back: $reason" ;;
    stop) say "job $job ends with exit code $code: $reason"; end_servers ;;
    done) end_servers ;;
  esac
  return "$code"
}
