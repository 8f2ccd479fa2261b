# shellcheck shell=bash
# Sourced by train.example.sh and train_sft.example.sh and by the scripts that users make of them.

problems=()

# Notes each of the named variables that is empty.
require_settings() {
    local name
    for name in "$@"; do
        [[ -n ${!name:-} ]] || problems+=("$name: empty; set it at the top of $0")
    done
}

report_problems() {
    ((${#problems[@]} == 0)) && return
    printf 'error: %s\n' "${problems[@]}" >&2
    exit 2
}

# `supervise colossalai run … train.py …` checks the hosts and `train.py --dry_run`, then runs the command. It chooses
# values for empty options, quotes arguments for the shells of the hosts, and passes SIGTERM, Ctrl-C and the end of the
# terminal on to every host. It takes the place of this shell: nothing after it is run. See colossal_llama/launch/.
supervise() {
    # Seconds that the other hosts get to end by themselves after one host has failed, and then on request.
    export FAILURE_GRACE_SECONDS=${FAILURE_GRACE_SECONDS:-60} STOP_GRACE_SECONDS=${STOP_GRACE_SECONDS:-45}
    exec python -m colossal_llama.launch "$0" < <(printf '%s\0' "$@")
}

# For scripts made from earlier examples: training with these arguments.
launch_training() {
    supervise colossalai run --nproc_per_node "${NPROC_PER_NODE:-}" --hostfile "${HOSTFILE:-}" \
        --master_port "${MASTER_PORT:-}" --ssh-port "${SSH_PORT:-}" train.py "$@"
}
