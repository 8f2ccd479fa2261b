#!/usr/bin/env bash
# Runs the whole pipeline on the bundled sample, from an empty directory to a fine-tuned model that answers questions:
# set-up, vocabulary extension, model initialisation, pre-training data, continual pre-training, conversations,
# fine-tuning, inference, comparison of the models on held-out text.
#
#     bash quickstart.sh [--output_dir DIR] [--device auto|cpu|cuda] [--print_commands]
#
# Runs on a GPU if there is one, otherwise on two CPU cores. The last line is `Model: <directory>`.
set -euo pipefail

CLONE=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
NUM_PIECES=500
NUM_QUESTIONS=3
STEPS=(base_model pieces.jsonl tokenizer model pretrain_data pretrain pretrain_logs pretrain_config.json
    sft_data sft sft_logs sft_config.json comparison)

usage() { sed -n '/^#     bash/s/^#     //p' "$CLONE/quickstart.sh"; }

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 2
}

parse_arguments() {
    output=quickstart_output device=auto only_print=
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

# Removes the results of an earlier run, so that no result is older than the code. Refuses a directory that this script
# did not create.
prepare_output_directory() {
    local marker=$output/.made_by_quickstart step
    if [[ -e $output && ! -f $marker && -n $(ls -A -- "$output" 2>&1) ]]; then
        fail "--output_dir $output: not empty and not made by quickstart.sh; choose another directory"
    fi
    mkdir -p -- "$output"
    : >"$marker"
    for step in "${STEPS[@]}"; do
        if [[ -e $output/$step ]]; then
            echo "Replacing $output/$step"
            rm -rf -- "${output:?}/$step"
        fi
    done
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
    [[ -n $only_print ]] || env -i "${environment[@]}" "$@" </dev/null
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
    local gpus=0
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
    run python examples/make_base_model.py \
        --data_input_dirs examples/data/pretrain --output_dir "$output/base_model"
    run python colossal_llama/tokenizer/learn_pieces.py \
        --data_input_dirs examples/data/pretrain --source_tokenizer_dir "$output/base_model" \
        --output_file "$output/pieces.jsonl" --num_tokens "$NUM_PIECES"
    run python colossal_llama/tokenizer/init_tokenizer.py \
        --source_tokenizer_dir "$output/base_model" --target_tokenizer_dir "$output/tokenizer" \
        --expand_tokens_file "$output/pieces.jsonl"
    run python colossal_llama/model/init_model.py \
        --source_model_and_tokenizer_path "$output/base_model" --target_tokenizer_path "$output/tokenizer" \
        --target_model_path "$output/model"
}

pretrain() {
    run python prepare_pretrain_dataset.py \
        --data_input_dirs examples/data/pretrain --tokenizer_dir "$output/model" \
        --data_output_dirs "$output/pretrain_data" --max_length 512 --num_spliced_dataset_bins 4 --held_out_share 0.1
    run_distributed train.py \
        --pretrained "$output/model" --dataset "$output/pretrain_data/arrow" \
        --eval_dataset "$output/pretrain_data/held_out/arrow" --eval_at_start \
        --plugin zero2 --mixed_precision "$precision" \
        --num_epochs 5 --batch_size 4 --accumulation_steps 1 --max_length 512 --lr 1e-3 \
        --save_interval 0 --skip_save_each_epoch --save_dir "$output/pretrain" \
        --tensorboard_dir "$output/pretrain_logs" --config_file "$output/pretrain_config.json"
}

fine_tune() {
    run python prepare_sft_dataset.py \
        --data_input_dirs examples/data/sft --tokenizer_dir "$output/model" \
        --data_output_dirs "$output/sft_data" --max_length 512 --num_spliced_dataset_bins 4 --llama_version 2
    run_distributed train.py \
        --pretrained "$output/pretrain/modeling" --dataset "$output/sft_data/arrow" \
        --plugin zero2 --mixed_precision "$precision" \
        --num_epochs 40 --batch_size 8 --accumulation_steps 1 --max_length 512 --padding_mode longest --lr 2e-3 \
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

# Asks the fine-tuned model questions that it was trained on; every answer must be the same, word for word.
ask_questions() {
    local question expected answer wrong=0
    while IFS= read -r question && IFS= read -r expected; do
        set -- python inference_example.py \
            --model_path "$output/sft/modeling" --do_sample False --max_new_tokens 96 --input_txt "$question"
        show "$@"
        [[ -z $only_print ]] || continue
        answer=$(env -i "${environment[@]}" "$@" </dev/null)
        printf '%s\n' "$answer"
        if [[ $answer == "$expected" ]]; then
            echo "(as in the sample)"
        else
            printf 'error: the sample answers: %s\n' "$expected" >&2
            wrong=$((wrong + 1))
        fi
    done < <(sample_questions)
    ((wrong == 0)) || {
        echo "error: $wrong of $NUM_QUESTIONS answers differ from the sample" >&2
        exit 1
    }
}

# Scores the text that was held out of pre-training with the base model, the extended model and the trained one.
compare_models() {
    if [[ $output == *,* ]]; then
        echo "(no comparison: compare_models.py takes lists with commas, and $output has one)"
        return
    fi
    run python colossal_llama/evaluation/compare_models.py \
        --models "$output/base_model,$output/model,$output/pretrain/modeling" \
        --data_input_dirs "$output/pretrain_data/held_out" --output_dir "$output/comparison"
}

# Prints the first and the last loss of a run, and fails if the loss did not fall.
report_loss() {
    python - "$1" "$output/$2/metrics.jsonl" <<'PYTHON'
import json
import sys

with open(sys.argv[2], encoding="utf-8") as file:
    records = [record for record in map(json.loads, file) if "loss" in record]
first, last = records[0], records[-1]
print(f"{sys.argv[1]}: loss {first['loss']:.3f} at step {first['step']}, {last['loss']:.3f} at step {last['step']}")
if not last["loss"] < 0.9 * first["loss"]:
    sys.exit(f"error: {sys.argv[1]}: the loss did not fall")
PYTHON
}

main() {
    parse_arguments "$@"
    cd -- "$CLONE"
    if [[ -n $only_print ]]; then
        num_processes=2 precision=fp32 master_port=29500
    else
        # shellcheck source=examples/setup_environment.sh
        source examples/setup_environment.sh
        set_up_environment "$CLONE"
        SECONDS=0
        choose_device
        prepare_output_directory
    fi
    make_model
    pretrain
    fine_tune
    ask_questions
    compare_models
    [[ -z $only_print ]] || exit 0
    echo
    report_loss "Pre-training" pretrain_logs
    report_loss "Fine-tuning" sft_logs
    echo "All $NUM_QUESTIONS answers are those of the sample. Time without set-up: $SECONDS s"
    echo "Model: $output/sft/modeling"
}

main "$@"
