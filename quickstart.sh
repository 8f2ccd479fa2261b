#!/usr/bin/env bash
# Runs the whole pipeline on the bundled sample, from an empty directory to a fine-tuned model that answers questions:
# set-up, vocabulary extension, model initialisation, pre-training data, continual pre-training, conversations,
# fine-tuning, inference, comparison of the models on held-out text.
#
#     bash quickstart.sh [--output_dir DIR] [--device auto|cpu|cuda] [--restart] [--print_commands]
#
# Runs on a GPU if there is one, otherwise on two CPU cores. Started again, it continues with the first step that is not
# finished, or whose code, input or command has changed since; --restart does every step again. The last line is
# `Model: <directory>`.
set -euo pipefail

CLONE=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
NUM_PIECES=500
NUM_QUESTIONS=3
# What each step writes, and its seconds on two CPU cores; with a GPU only the two trainings take another time.
RESULTS=(base_model pieces.jsonl tokenizer model pretrain_data "pretrain pretrain_logs pretrain_config.json"
    sft_data "sft sft_logs sft_config.json" answers/1.txt answers/2.txt answers/3.txt comparison)
EXPECTED_SECONDS=(5 1 1 2 3 45 3 60 4 4 4 10)
GPU_TRAINING_SECONDS=25

usage() { sed -n '/^#     bash/s/^#     //p' "$CLONE/quickstart.sh"; }

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 2
}

parse_arguments() {
    output=quickstart_output device=auto only_print='' restart=''
    local -a problems=()
    while (($#)); do
        case $1 in
            --output_dir=* | --device=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
            --output_dir | --device)
                if (($# < 2)) || [[ -z $2 ]]; then
                    problems+=("$1: give a value") && shift && continue
                fi
                [[ $1 == --output_dir ]] && output=$2 || device=$2
                shift 2
                ;;
            --print_commands) only_print=yes && shift ;;
            --restart) restart=yes && shift ;;
            -h | --help) usage && exit ;;
            *) problems+=("$1: unknown argument (usage: $(usage))") && shift ;;
        esac
    done
    [[ $device == auto || $device == cpu || $device == cuda ]] ||
        problems+=("--device $device: choose from auto, cpu, cuda")
    ((${#problems[@]} == 0)) || fail "${problems[@]}"
    # Commands run in the clone. A path inside it is shown relative to it, as in the README.
    [[ $output == /* || $output == quickstart_output ]] || output=$PWD/$output
    output=${output%/}
    output=${output#"$CLONE/"}
}

# Reads which steps an earlier run has finished. Refuses a directory that this script did not create.
prepare_output_directory() {
    state=$output/.made_by_quickstart
    if [[ -e $output && ! -f $state && -n $(ls -A -- "$output" 2>&1) ]]; then
        fail "--output_dir $output: not empty and not made by quickstart.sh; choose another directory"
    fi
    mkdir -p -- "$output"
    finished=() started='' number=0
    if [[ -f $state && -z $restart ]]; then
        mapfile -t finished <"$state"
    fi
    if ((${#finished[@]})) && [[ ${finished[-1]} == "started: "* ]]; then
        started=${finished[-1]#started: }
        unset 'finished[-1]'
    fi
    write_state
}

# One line for each finished step: what it depended on. The last line may be a step that was started.
write_state() {
    {
        ((${#finished[@]} == 0)) || printf '%s\n' "${finished[@]}"
        (($# == 0)) || printf 'started: %s\n' "$1"
    } >"$state.new"
    mv -f -- "$state.new" "$state"
}

# All that a result depends on beside its command: the code, the sample, the installed packages, the device.
fingerprint_of_code() {
    python - "$gpus GPUs, $num_processes processes" <<'PYTHON'
import hashlib
import sys
from importlib.metadata import distributions
from pathlib import Path

files = [*Path().glob("*.py"), Path("quickstart.sh"), *Path("colossal_llama").rglob("*.py"), *Path("examples").glob("*.py")]
files += [path for path in Path("examples/data").rglob("*") if path.is_file()]
digest = hashlib.sha256(sys.version.encode() + sys.argv[1].encode())
for path in sorted(files):
    digest.update(f"{path} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
for package in sorted({f"{each.name} {each.version}" for each in distributions()}):
    digest.update(package.encode())
print(digest.hexdigest())
PYTHON
}

results_exist() {
    local result
    for result in ${RESULTS[$1]}; do
        [[ -e $output/$result ]] || return 1
    done
}

# From the first step that has to be done, all results are made anew, so that none is older than the code or than the
# results that it was made from. Only a training that was stopped keeps its checkpoint, and continues from it.
remove_results_from() {
    local step result
    for ((step = $1; step < ${#RESULTS[@]}; step++)); do
        for result in ${RESULTS[step]}; do
            [[ -e $output/$result ]] || continue
            echo "Replacing $output/$result"
            rm -rf -- "${output:?}/$result"
        done
    done
}

# `step TITLE COMMAND…` does one step, unless an earlier run has done the same and every step before it.
step() {
    local title=$1 identity from
    shift
    if [[ -n $only_print ]]; then
        "$@"
        return
    fi
    identity="$fingerprint $(printf '%q ' "$@")"
    number=$((number + 1))
    if [[ -z $doing && ${finished[number - 1]:-} == "$identity" ]] && results_exist $((number - 1)); then
        echo "[$number of $num_steps] $title: finished by an earlier run"
        return
    fi
    if [[ -z $doing ]]; then
        doing=yes
        finished=("${finished[@]:0:number-1}")
        from=$((number - 1))
        if [[ $1 == run_distributed && $started == "$identity" ]]; then
            from=$number
        fi
        remove_results_from "$from"
    fi
    printf '\n[%d of %d] %s (%s)\n' "$number" "$num_steps" "$title" "$(time_left)"
    write_state "$identity"
    "$@"
    done_seconds=$((done_seconds + EXPECTED_SECONDS[number - 1]))
    finished+=("$identity")
    write_state
}

# Prints how long this step and those after it will take, going by how long the steps of this run took so far.
time_left() {
    local step seconds=0
    for ((step = number - 1; step < num_steps; step++)); do
        seconds=$((seconds + EXPECTED_SECONDS[step]))
    done
    # The first steps say little about the machine: a minute as expected goes in.
    seconds=$((seconds * (SECONDS + 60) / (done_seconds + 60)))
    if ((seconds < 100)); then
        echo "about $(((seconds + 9) / 10 * 10)) seconds left"
    else
        echo "about $(((seconds + 30) / 60)) minutes left"
    fi
}

# Quotes a word so that a shell reads it back unchanged.
quoted() {
    if [[ $1 =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
        printf '%s' "$1"
    elif [[ $1 == *\'* && $1 != *[\"\\\$\`!]* ]]; then
        printf '"%s"' "$1"
    else
        printf "'%s'" "${1//\'/\'\\\'\'}"
    fi
}

# Prints a command with one flag per line, as in the README.
show() {
    local word line=
    for word in "$@"; do
        [[ $word != --* ]] || line+=$' \\\n   '
        line+=${line:+ }$(quoted "$word")
    done
    printf '\n$ %s\n' "$line"
}

# Prints a command, then runs it; with --print_commands it only prints.
run() {
    show "$@"
    [[ -n $only_print ]] || execute "$@"
}

# Runs a command in a process group of its own, so that Ctrl-C reaches this script alone, which stops the command in the
# way that is right for it (`stop`).
execute() {
    local code=0
    set -m
    env -i "${environment[@]}" "$@" </dev/null &
    child=$!
    set +m
    [[ -z $stopped_by ]] || stop "$stopped_by"
    # A trap ends the wait early.
    while kill -0 "$child" 2>/dev/null; do
        code=0
        wait "$child" || code=$?
    done
    child=
    [[ -z $stopped_by ]] || stopped
    return "$code"
}

# On a stop signal. A training gets it in its workers, which save and end, and the launchers after them: a launcher that
# gets it too may wait for ever. What has not ended after a minute is killed.
stop() {
    stopped_by=$1
    [[ -n $child ]] || stopped
    echo "Stopping; a training saves first" >&2
    # torchrun gives each worker a session of its own, but stays in the group.
    local launchers
    launchers=$(pgrep -d , -g "$child" -f 'torchrun' 2>/dev/null) || launchers=
    [[ -n $launchers ]] && pkill -TERM -P "$launchers" -f -- '-u train[.]py' ||
        kill -INT -- "-$child" 2>/dev/null || true
    if [[ -z $killer ]]; then
        (sleep 60 && kill -KILL -- "-$child") >/dev/null 2>&1 &
        killer=$!
    fi
}

stopped() {
    [[ -z $killer ]] || kill "$killer" 2>/dev/null || true
    local -a again=(bash quickstart.sh)
    [[ $output == quickstart_output ]] || again+=(--output_dir "$output")
    [[ $device == auto ]] || again+=(--device "$device")
    echo
    echo "Stopped in step $number of $num_steps. To continue there:$(printf ' %q' "${again[@]}")" >&2
    exit "$stopped_by"
}

# `colossalai run` joins its arguments with spaces and passes them to a shell, so arguments with special characters are
# quoted here. The shell also changes to the current directory, and for its name `colossalai run` escapes only spaces.
run_distributed() {
    local -a words=()
    local word
    if [[ $PWD == *[\'\"\\\$\`\(\)\&\;\|\<\>*?[:cntrl:]]* || $PWD == *[][#~!{}]* ]]; then
        echo "(colossalai run can't work in $PWD: torchrun takes its place)"
        run torchrun --nproc_per_node "$num_processes" --master_port "$master_port" "$@"
        return
    fi
    for word in "$@"; do
        words+=("$(quoted "$word")")
    done
    local -a port=()
    [[ $master_port == 29500 ]] || port=(--master_port "$master_port")
    run colossalai run --nproc_per_node "$num_processes" "${port[@]}" "${words[@]}"
}

choose_device() {
    gpus=0
    num_processes=2 precision=fp32 master_port=29500
    if [[ $device != cpu ]]; then
        gpus=$(python -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
        [[ $device != cuda || $gpus != 0 ]] || fail "--device cuda: PyTorch finds no GPU here"
    fi
    environment=("PATH=$PATH" "HOME=${HOME:-/}" "LANG=${LANG:-C.UTF-8}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1)
    local name
    while IFS= read -r name; do
        case $name in
            CUDA_* | NCCL_* | LD_LIBRARY_PATH | TMPDIR | VIRTUAL_ENV) environment+=("$name=${!name}") ;;
        esac
    done < <(compgen -e)
    if ((gpus)); then
        ((gpus >= num_processes)) || num_processes=$gpus
        precision=bf16
        EXPECTED_SECONDS[5]=$GPU_TRAINING_SECONDS EXPECTED_SECONDS[7]=$GPU_TRAINING_SECONDS
        echo "Device: $num_processes of $gpus GPUs, $precision"
    else
        echo "Device: CPU, $num_processes processes, $precision"
        # One thread per process, since two processes share two cores. Both run on this machine, so they use the loopback
        # interface, whatever network the machine has.
        environment+=(CUDA_VISIBLE_DEVICES=-1 OMP_NUM_THREADS=1)
        [[ ! -e /sys/class/net/lo ]] || environment+=(GLOO_SOCKET_IFNAME=lo)
    fi
    if ! python -c 'import socket; socket.socket().bind(("127.0.0.1", 29500))' 2>/dev/null; then
        master_port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    fi
}

make_model() {
    step "A small base model, in place of LLaMA" run python examples/make_base_model.py \
        --data_input_dirs examples/data/pretrain --output_dir "$output/base_model"
    step "New pieces for the vocabulary" run python colossal_llama/tokenizer/learn_pieces.py \
        --data_input_dirs examples/data/pretrain --source_tokenizer_dir "$output/base_model" \
        --output_file "$output/pieces.jsonl" --num_tokens "$NUM_PIECES"
    step "The extended tokenizer" run python colossal_llama/tokenizer/init_tokenizer.py \
        --source_tokenizer_dir "$output/base_model" --target_tokenizer_dir "$output/tokenizer" \
        --expand_tokens_file "$output/pieces.jsonl"
    step "The extended model" run python colossal_llama/model/init_model.py \
        --source_model_and_tokenizer_path "$output/base_model" --target_tokenizer_path "$output/tokenizer" \
        --target_model_path "$output/model"
}

pretrain() {
    step "Pre-training data" run python prepare_pretrain_dataset.py \
        --data_input_dirs examples/data/pretrain --tokenizer_dir "$output/model" \
        --data_output_dirs "$output/pretrain_data" --max_length 512 --num_spliced_dataset_bins 4 --held_out_share 0.1
    step "Continual pre-training" run_distributed train.py \
        --pretrained "$output/model" --dataset "$output/pretrain_data/arrow" \
        --eval_dataset "$output/pretrain_data/held_out/arrow" --eval_at_start \
        --plugin zero2 --mixed_precision "$precision" --load_checkpoint latest \
        --num_epochs 4 --batch_size 1 --accumulation_steps 1 --max_length 512 --lr 2e-3 \
        --save_interval 0 --skip_save_each_epoch --save_dir "$output/pretrain" \
        --tensorboard_dir "$output/pretrain_logs" --config_file "$output/pretrain_config.json"
}

fine_tune() {
    step "Conversations" run python prepare_sft_dataset.py \
        --data_input_dirs examples/data/sft --tokenizer_dir "$output/model" \
        --data_output_dirs "$output/sft_data" --max_length 512 --num_spliced_dataset_bins 4 --template llama2
    step "Fine-tuning" run_distributed train.py \
        --pretrained "$output/pretrain/modeling" --dataset "$output/sft_data/arrow" \
        --plugin zero2 --mixed_precision "$precision" --load_checkpoint latest \
        --num_epochs 28 --batch_size 4 --accumulation_steps 1 --max_length 512 --padding_mode longest --lr 2e-3 \
        --save_interval 0 --skip_save_each_epoch --save_dir "$output/sft" \
        --tensorboard_dir "$output/sft_logs" --config_file "$output/sft_config.json"
}

# Prints the question and the answer of the first single-turn conversations of the sample, one per line.
sample_questions() {
    python - examples/data/sft/conversations.jsonl "$NUM_QUESTIONS" <<'PYTHON'
import json
import sys

with open(sys.argv[1], encoding="utf-8") as file:
    conversations = [json.loads(line)["messages"] for line in file]
single_turns = [c for c in conversations if [m["from"] for m in c] == ["human", "assistant"]]
for question, answer in single_turns[: int(sys.argv[2])]:
    sys.stdout.buffer.write(f"{question['content']}\n{answer['content']}\n".encode())
PYTHON
}

# Asks the fine-tuned model questions that it was trained on.
ask_questions() {
    local question expected asked=0
    while IFS= read -r question && IFS= read -r expected; do
        asked=$((asked + 1))
        step "Question $asked" ask "answers/$asked.txt" "$expected" python inference_example.py \
            --model_path "$output/sft/modeling" --do_sample False --max_new_tokens 96 --input_txt "$question"
    done < <(sample_questions)
}

# `ask FILE EXPECTED COMMAND…` writes the answer to FILE, and says whether it is the expected one.
ask() {
    local file=$output/$1 expected=$2
    shift 2
    show "$@"
    [[ -z $only_print ]] || return 0
    mkdir -p -- "$output/answers"
    execute "$@" >"$file"
    cat -- "$file"
    local answer
    answer=$(<"$file")
    # The template of LLaMA-2 has a space before the end of a turn.
    if [[ ${answer%" "} == "$expected" ]]; then
        echo "(as in the sample)"
    else
        printf 'error: the sample answers: %s\n' "$expected" >&2
    fi
}

# Scores the text that was held out of pre-training with the base model, the extended model and the trained one.
compare_models() {
    if [[ $output == *,* ]]; then
        echo "(no comparison: compare_models.py takes lists with commas, and $output has one)"
        return
    fi
    step "Comparison on held-out text" run python colossal_llama/evaluation/compare_models.py \
        --models "$output/base_model,$output/model,$output/pretrain/modeling" \
        --data_input_dirs "$output/pretrain_data/held_out" --output_dir "$output/comparison" --dtype "$precision"
}

main() {
    parse_arguments "$@"
    cd -- "$CLONE"
    doing='' stopped_by='' child='' killer='' done_seconds=0 fingerprint=''
    num_steps=${#RESULTS[@]}
    [[ $output != *,* ]] || num_steps=$((num_steps - 1))
    if [[ -n $only_print ]]; then
        num_processes=2 precision=fp32 master_port=29500
    else
        local python_before
        python_before=$(command -v python || true)
        # shellcheck source=examples/setup_environment.sh
        source examples/setup_environment.sh
        set_up_environment "$CLONE"
        SECONDS=0
        choose_device
        prepare_output_directory
        fingerprint=$(fingerprint_of_code)
        trap 'stop 130' INT
        trap 'stop 143' TERM
        trap 'stop 129' HUP
    fi
    make_model
    pretrain
    fine_tune
    ask_questions
    compare_models
    [[ -z $only_print ]] || exit 0
    local -a report=(python examples/report_quickstart.py --output_dir "$output" --seconds "$SECONDS")
    [[ $(command -v python) == "$python_before" ]] || report+=(--activate "$(dirname -- "$(command -v python)")/activate")
    sample_questions | "${report[@]}"
    echo "Model: $output/sft/modeling"
}

main "$@"
