# shellcheck shell=bash
# Sourced by train.example.sh and train_sft.example.sh and by what users make of them. `launch_training` takes the
# arguments of train.py, and its settings from the variables at the top of those scripts:
#
#     HOSTFILE         hosts, a name a line; empty: this machine alone
#     NPROC_PER_NODE   processes on each host; empty: one a GPU, or two on a machine without
#     MASTER_PORT      port on the first host; empty: 29500, or a free one on this machine alone
#     SSH_PORT         port of ssh on the hosts; empty: as ssh is configured
#
# It checks first: the settings, the hosts (colossal_llama/launch/preflight.py), then everything that
# `train.py --dry_run` can check without training. SIGTERM, Ctrl-C and the end of the terminal are passed on to every
# host.

# When the processes of one host have failed, those of the others get this long to end by themselves, and then
# as long as torchrun gives its workers, and some more, to end on request.
: "${FAILURE_GRACE_SECONDS:=60}" "${STOP_GRACE_SECONDS:=45}"

problems=()

report_problems() {
    ((${#problems[@]} == 0)) && return
    printf 'error: %s\n' "${problems[@]}" >&2
    exit 2
}

# Every empty variable of those named is a problem.
require_settings() {
    local name
    for name in "$@"; do
        [[ -n ${!name:-} ]] || problems+=("$name: empty; set it at the top of $0")
    done
}

has_hostfile() { [[ -n ${HOSTFILE:-} ]]; }

# The names in the hostfile; the pre-flight check judges them.
read_hosts() {
    hosts=()
    if has_hostfile && [[ -r $HOSTFILE ]]; then
        mapfile -t hosts < <(awk 'NF { print $1 }' "$HOSTFILE")
    fi
}

# Prints the indices of the `$1` GPUs with the least memory in use, comma-separated; nothing where there are too few.
least_used_gpus() {
    nvidia-smi --query-gpu=memory.used,index --format=csv,noheader,nounits 2>/dev/null |
        sort -n | head -n "$1" | awk -F', *' -v wanted="$1" '
            { indices = indices (NR > 1 ? "," : "") $2 } END { if (NR == wanted) print indices }'
}

count_gpus() { nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -c . || true; }

choose_processes_and_gpus() {
    local gpus chosen
    gpus=$(count_gpus)
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)
    fi
    : "${NPROC_PER_NODE:=$((gpus > 0 ? gpus : 2))}"
    if [[ ! $NPROC_PER_NODE =~ ^[1-9][0-9]*$ ]]; then
        problems+=("NPROC_PER_NODE $NPROC_PER_NODE: is not a number of processes")
        return
    fi
    if ((gpus == 0)); then
        echo "No GPU: $NPROC_PER_NODE processes on the CPU of each host"
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    elif ((NPROC_PER_NODE > gpus)) && ! has_hostfile; then
        problems+=("NPROC_PER_NODE $NPROC_PER_NODE: there are $gpus GPUs here")
    elif ! has_hostfile && [[ -z ${CUDA_VISIBLE_DEVICES:-} ]]; then
        # The choice is this machine's; other hosts have loads of their own.
        chosen=$(least_used_gpus "$NPROC_PER_NODE")
        [[ -z $chosen ]] || export CUDA_VISIBLE_DEVICES=$chosen
        echo "GPUs: ${CUDA_VISIBLE_DEVICES:-all} (the least used)"
    fi
}

choose_master_port() {
    [[ -z ${MASTER_PORT:-} ]] || return 0
    MASTER_PORT=29500
    if ! has_hostfile; then
        MASTER_PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    fi
}

# What belongs to the run; every host keeps the rest of its own.
collect_environment() {
    mapfile -d '' -t environment < <(python -m colossal_llama.launch.environment)
    wait $! || exit
    # Other hosts have homes of their own; ssh finds this one's keys in the password database.
    has_hostfile || environment+=("HOME=${HOME:-/}")
    [[ -z ${SSH_AUTH_SOCK:-} ]] || environment+=("SSH_AUTH_SOCK=$SSH_AUTH_SOCK")
}

# A word as a shell reads it back: `colossalai run` joins what it gets with spaces and hands that to a shell.
shell_word() {
    if [[ $1 =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
        printf '%s\n' "$1"
    else
        printf "'%s'\n" "${1//\'/\'\\\'\'}"
    fi
}

# The value of --save_dir among train.py's arguments: it tells this run's processes from all others.
find_save_dir() {
    local word previous=
    save_dir=checkpoint_dir
    for word in "$@"; do
        [[ $previous != --save_dir ]] || save_dir=$word
        [[ $word != --save_dir=* ]] || save_dir=${word#--save_dir=}
        previous=$word
    done
}

# Runs "$@" in the background in a process group of its own, which `end_helpers` ends.
start_helper() {
    set -m
    "$@" &
    helpers+=("$!")
    set +m
}

end_helpers() {
    local helper
    for helper in "${helpers[@]}"; do
        kill -KILL -- "-$helper" 2>/dev/null || true
        wait "$helper" 2>/dev/null || true
    done
}

# A pattern for the command lines of this run's processes that have $1 before `train.py`. Directories may have spaces in
# their names; other letters are matched byte by byte, since hosts may have another locale than this script.
process_pattern() {
    printf '^([^ ]*|/.*/)python[^ ]* %strain[.]py .*--save_dir[ =]%s( |$)' "$1" \
        "$(LC_ALL=C sed 's/[^A-Za-z0-9_/-]/./g' <<<"$save_dir")"
}

# Runs the shell command $2 on every host until it succeeds there, $1 times at most, two seconds apart.
on_every_host() {
    local host
    if has_hostfile; then
        for host in "${hosts[@]}"; do
            start_helper until_success "$1" \
                ssh -o BatchMode=yes -o ConnectTimeout=10 ${SSH_PORT:+-p "$SSH_PORT"} "$host" "$2"
        done
    else
        start_helper until_success "$1" bash -c "$2"
    fi
}

until_success() {
    local attempts=$1
    shift
    until "$@" </dev/null; do
        attempts=$((attempts - 1))
        ((attempts)) || return
        sleep 2
    done
}

signal_command() { printf "env LC_ALL=C pkill -%s -f -- '%s'" "$1" "$(process_pattern "$2")"; }

# The workers themselves are told, not torchrun, which would leave them 30 s to save. Where there are none yet,
# torchrun is; where there is neither, they may be about to start.
ask_hosts_to_stop() { on_every_host 15 "$(signal_command TERM '-u ') || $(signal_command TERM '([^ ]*|/.*/)torchrun .*')"; }

# torchrun passes SIGTERM on, and kills what has not ended after 30 s.
end_launchers() { on_every_host 1 "$(signal_command TERM '([^ ]*|/.*/)torchrun .*')"; }

kill_hosts() { on_every_host 1 "$(signal_command KILL '(([^ ]*|/.*/)torchrun .*|-u )')"; }

# NOTE: in a trap, a bare `return` has the status of what the signal interrupted, and `set -e` ends the script.
on_stop_signal() {
    if [[ $1 == SIGHUP ]]; then
        exec >/dev/null 2>&1 # the terminal is gone
        [[ $stopped_by != SIGHUP ]] || return 0 # its shell and the kernel say so, each for itself
    fi
    if [[ -n $stopped_by ]]; then
        echo "$1 again: killing the processes of every host" >&2
        kill_hosts
    else
        stopped_by=$1
        echo "$1: telling every host to save and stop; a second signal kills" >&2
        ask_hosts_to_stop
    fi
}

on_failed_host() {
    [[ -z $failed_host ]] || return 0
    failed_host=$(head -n 1 "$run_state/failed")
    [[ -n $stopped_by ]] ||
        echo "error: $failed_host: its processes have ended with an error; what they said is above" >&2
    start_helper enforce_end
}

# Ends what goes on after one host has ended: processes that wait for it, and `colossalai run`, which waits for all.
enforce_end() {
    local -a helpers=()
    sleep "$FAILURE_GRACE_SECONDS"
    echo "error: not all hosts have ended $FAILURE_GRACE_SECONDS s after $failed_host: stopping them" >&2
    end_launchers
    sleep "$STOP_GRACE_SECONDS"
    echo "error: not all hosts have ended $STOP_GRACE_SECONDS s after that: killing what is left" >&2
    kill_hosts
    sleep 3
    kill -KILL -- "-$launcher"
    end_helpers
}

# Copies what `colossalai run` prints and notes what the script has to know. It prints what the hosts say in
# pieces of up to 1000 bytes, so what one says may begin, or go on, within a line of another.
relay_output() {
    local line
    trap '' INT TERM HUP
    while IFS= read -r line || [[ -n $line ]]; do
        printf '%s\n' "$line" 2>/dev/null || true # the terminal may be gone
        if [[ $line =~ 'Error: failed to run '.*' on '([^ ]+)', is localhost: ' ]]; then
            echo "${BASH_REMATCH[1]}" >>"$run_state/failed"
            kill -USR1 $$
        elif [[ $line == *'Stopped by '* || $line == *' after step '*'; continue with '* ]]; then
            echo "$line" >"$run_state/stopped"
        fi
    done
}

# The complete checkpoint with the highest step, if any.
newest_checkpoint() {
    [[ -d $save_dir ]] || return 0
    find "$save_dir" -mindepth 2 -maxdepth 2 -path '*/epoch-*_step-*/COMPLETE' -printf '%h\n' 2>/dev/null |
        awk -F_step- '$NF + 0 >= step { step = $NF + 0; name = $0 } END { print name }'
}

report_checkpoint() {
    local newest
    newest=$(newest_checkpoint)
    echo "Last complete checkpoint: ${newest:-none yet}; the same command goes on from there" >&2
}

report_stop() {
    if [[ -s $run_state/stopped ]]; then
        echo "$stopped_by: every process has saved and exited with code 143" >&2
    else
        echo "$stopped_by: training has ended without saving: it had not begun, or was killed" >&2
    fi
    report_checkpoint
}

launch_training() {
    local -a hosts environment words command helpers=()
    local launcher relay failed_host='' stopped_by='' code word save_dir run_state output
    read_hosts
    choose_processes_and_gpus
    report_problems
    collect_environment
    choose_master_port
    find_save_dir "$@"

    echo "Checking the hosts"
    command=(--nproc_per_node "$NPROC_PER_NODE" --master_port "$MASTER_PORT")
    ! has_hostfile || command+=(--hostfile "$HOSTFILE")
    env -i "${environment[@]}" python -m colossal_llama.launch.preflight "${command[@]}" \
        ${SSH_PORT:+--ssh_port "$SSH_PORT"} train.py "$@" </dev/null || exit
    local world_size=$((NPROC_PER_NODE * (${#hosts[@]} > 0 ? ${#hosts[@]} : 1)))
    echo "Checking with train.py --dry_run"
    env -i "${environment[@]}" WORLD_SIZE=$world_size python train.py "$@" --dry_run </dev/null || exit

    for word in "$@"; do
        words+=("$(shell_word "$word")")
    done
    command=(colossalai run "${command[@]}")
    [[ -z ${SSH_PORT:-} ]] || command+=(--ssh-port "$SSH_PORT")
    echo "Starting: ${command[*]} train.py ${words[*]}"
    run_state=$(mktemp -d)
    # shellcheck disable=SC2064  # the directory of now is meant
    trap "rm -rf -- '$run_state'" EXIT
    trap 'on_stop_signal SIGTERM' TERM
    trap 'on_stop_signal Ctrl-C' INT
    trap 'on_stop_signal SIGHUP' HUP
    trap on_failed_host USR1
    # Process groups of their own: Ctrl-C reaches this script alone, which passes it on as SIGTERM.
    set -m
    exec {output}> >(relay_output)
    relay=$!
    {
        code=0
        env -i "${environment[@]}" "${command[@]}" train.py "${words[@]}" </dev/null >&"$output" || code=$?
        echo "$code" >"$run_state/code"
    } &
    launcher=$!
    set +m
    exec {output}>&-
    while kill -0 "$launcher" 2>/dev/null; do
        wait "$launcher" 2>/dev/null || true # a signal to this script ends the wait, not the launcher
    done
    trap '' USR1
    kill -KILL -- "-$launcher" 2>/dev/null || true
    end_helpers
    wait "$relay" || true
    code=$(cat "$run_state/code" 2>/dev/null || echo 1)
    if [[ -n $stopped_by && $code != 0 ]]; then
        report_stop
        case $stopped_by in
        SIGTERM) exit 143 ;;
        SIGHUP) exit 129 ;;
        *) exit 130 ;;
        esac
    fi
    [[ -z $failed_host ]] || report_checkpoint
    exit "$code"
}
