# shellcheck shell=bash
# Sourced by train.example.sh and train_sft.example.sh and by what users make of them. `launch_training` takes the
# arguments of train.py, and its settings from the variables at the top of those scripts:
#
#     HOSTFILE         hosts, a name a line; empty: this machine alone
#     NPROC_PER_NODE   processes on each host; empty: one a GPU, or two on a machine without
#     MASTER_PORT      port on the first host; empty: 29500, or a free one where there is a single host
#
# It checks first: the settings, the hostfile, then everything that `train.py --dry_run` can check without training.

# What the processes on every host get from this shell's environment; all else is each host's own.
PASSED_ON=(PATH PYTHONPATH LD_LIBRARY_PATH 'NCCL_*' 'GLOO_*' 'CUDA_*' 'OMP_*' 'HF_*' TOKENIZERS_PARALLELISM PYTORCH_CUDA_ALLOC_CONF)

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

read_hostfile() {
    local line number=0 name
    hosts=()
    [[ -n ${HOSTFILE:-} ]] || return 0
    if [[ ! -f $HOSTFILE ]]; then
        problems+=("HOSTFILE $HOSTFILE: no such file; cp hostfile.example $HOSTFILE and list your hosts there")
        return
    fi
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        line=${line%$'\r'}
        [[ $line =~ ^[[:space:]]*$ ]] && continue
        if [[ ! $line =~ ^[[:space:]]*([A-Za-z0-9._:-]+)[[:space:]]*$ ]]; then
            problems+=("$HOSTFILE:$number: \"$line\": one host name or address a line, no comments, no slots")
            continue
        fi
        for name in "${hosts[@]}"; do
            [[ $name != "${BASH_REMATCH[1]}" ]] || problems+=("$HOSTFILE:$number: $name: listed twice")
        done
        hosts+=("${BASH_REMATCH[1]}")
    done <"$HOSTFILE"
    ((${#hosts[@]})) || problems+=("HOSTFILE $HOSTFILE: no host in it")
}

is_single_host() { ((${#hosts[@]} <= 1)); }

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
    elif ((NPROC_PER_NODE > gpus)) && is_single_host; then
        problems+=("NPROC_PER_NODE $NPROC_PER_NODE: there are $gpus GPUs here")
    elif is_single_host && [[ -z ${CUDA_VISIBLE_DEVICES:-} ]]; then
        # The choice is this machine's; other hosts have loads of their own.
        chosen=$(least_used_gpus "$NPROC_PER_NODE")
        [[ -z $chosen ]] || export CUDA_VISIBLE_DEVICES=$chosen
        echo "GPUs: ${CUDA_VISIBLE_DEVICES:-all} (the least used)"
    fi
}

choose_master_port() {
    [[ -z ${MASTER_PORT:-} ]] || return 0
    MASTER_PORT=29500
    if is_single_host; then
        MASTER_PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    fi
}

# `colossalai run` exports its whole environment on every host, values between double quotes and not escaped.
collect_environment() {
    local name pattern
    environment=()
    while IFS= read -r name; do
        for pattern in "${PASSED_ON[@]}"; do
            # shellcheck disable=SC2053  # a pattern is meant
            if [[ $name == $pattern ]]; then
                if [[ ${!name} == *[\"\$\`\\]* || ${!name} == *$'\n'* ]]; then
                    problems+=("$name: its value holds a quote, \$, \`, \\ or a line break, which \`colossalai run\` can't pass on")
                fi
                environment+=("$name=${!name}")
            fi
        done
    done < <(compgen -e)
    # Other hosts have homes of their own; ssh finds this one's keys in the password database.
    ! is_single_host || environment+=("HOME=${HOME:-/}")
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

# SIGTERM for each torchrun below process `$1`: it passes the signal to its workers, which save and exit.
stop_local_launchers() {
    local -a queue=("$1")
    local pid parent command
    while ((${#queue[@]})); do
        parent=${queue[0]}
        queue=("${queue[@]:1}")
        while read -r pid command; do
            queue+=("$pid")
            [[ $command != *torchrun* || $command == *"bash -c"* ]] || kill -TERM "$pid" 2>/dev/null
        done < <(ps -e -o ppid=,pid=,args= | awk -v parent="$parent" '$1 == parent { $1 = ""; print }')
    done
}

stop_training() {
    local signal=$1 host
    echo "$signal: telling every host to save and stop" >&2
    trap '' INT TERM
    stop_local_launchers "$launcher"
    if ! is_single_host; then
        for host in "${hosts[@]}"; do
            # torchrun alone, which tells its workers; known by the directory that only this run writes to.
            ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" \
                "pkill -TERM -f -- '^[^ ]*python[^ ]* [^ ]*torchrun .*--save_dir[ =]$(sed 's/[].[*^$\\/'"'"']/./g' <<<"$SAVE_DIR")'" </dev/null &
        done
    fi
    stopped_by=$signal
}

launch_training() {
    local -a hosts environment words
    local launcher stopped_by='' code word
    read_hostfile
    choose_processes_and_gpus
    collect_environment
    report_problems
    choose_master_port

    echo "Checking with train.py --dry_run"
    env -i "${environment[@]}" python train.py "$@" --dry_run </dev/null || exit

    for word in "$@"; do
        words+=("$(shell_word "$word")")
    done
    local -a command=(colossalai run --nproc_per_node "$NPROC_PER_NODE" --master_port "$MASTER_PORT")
    [[ -z ${HOSTFILE:-} ]] || command+=(--hostfile "$HOSTFILE")
    echo "Starting: ${command[*]} train.py ${words[*]}"
    trap 'stop_training SIGTERM' TERM
    trap 'stop_training Ctrl-C' INT
    # A process group of its own: Ctrl-C reaches this script alone, which passes it on as SIGTERM.
    set -m
    env -i "${environment[@]}" "${command[@]}" train.py "${words[@]}" </dev/null &
    launcher=$!
    set +m
    code=0
    wait "$launcher" || code=$?
    while kill -0 "$launcher" 2>/dev/null; do
        code=0
        wait "$launcher" || code=$?
    done
    case $stopped_by in
        SIGTERM) exit 143 ;;
        Ctrl-C) exit 130 ;;
    esac
    exit "$code"
}
