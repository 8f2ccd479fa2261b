#!/usr/bin/env bash
# Runs every benchmark and writes benchmarks/results/<date>-<machine kind>.md: promises, figures, raw output.
#
#   bash benchmarks/run.sh                      the real thing: half an hour on two cores, on a machine that does nothing else
#   bash benchmarks/run.sh --toy                everything at toy shapes, in a minute or two: shows that it runs
#   bash benchmarks/run.sh --only packing_peer  one of them (may be given several times)
#   bash benchmarks/run.sh --output FILE        writes there
#
# LLAMAFACTORY_DIR is the directory of --llamafactory_dir (docs/performance.md), if it is set.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

toy='' output='' only=()
while (($#)); do
    case $1 in
    --toy) toy=1 ;;
    --only | --output)
        (($# > 1)) || { echo "error: $1: needs a value" >&2; exit 2; }
        if [[ $1 == --only ]]; then only+=("$2"); else output=$2; fi
        shift
        ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    *) echo "error: $1: unknown argument; there are --toy, --only NAME and --output FILE" >&2; exit 2 ;;
    esac
    shift
done

names=(
    init_tokenizer init_model prepare_dataset prepare_byte_level prepare_peer packing_peer train_step checkpoint
    sft_padding start_up scaling gpu
)
for name in "${only[@]}"; do
    if [[ " ${names[*]} " != *" $name "* ]]; then
        echo "error: --only $name: there are ${names[*]}" >&2
        exit 2
    fi
done
failed=()
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
export BENCHMARK_RECORDS=$work/records.jsonl

# measure NAME THREADS SCRIPT ARGUMENT...: runs a script, keeps its output; one that fails does not end the others.
measure() {
    local name=$1 threads=$2 status=0 started=$SECONDS
    shift 2
    if ((${#only[@]})) && [[ " ${only[*]} " != *" $name "* ]]; then
        return
    fi
    echo "== $name: python benchmarks/$*"
    OMP_NUM_THREADS=$threads python "benchmarks/$1" "${@:2}" 2>"$work/$name.err" | tee "$work/$name.txt" || status=$?
    if ((status)); then
        tail -n 30 "$work/$name.err" | tee -a "$work/$name.txt" >&2
        failed+=("$name")
    fi
    echo $((SECONDS - started)) >"$work/$name.seconds"
    echo "$status" >"$work/$name.status"
}

cores=$(nproc)
if [[ $toy ]]; then
    measure init_tokenizer 1 init_tokenizer.py --vocab_size 1000 --num_pieces 500 --num_texts 500 --repeats 1
    measure init_model 1 init_model.py --num_layers 1 --hidden_size 64 --num_texts 500 --source_rows 1000 \
        --new_rows 500 --repeats 1
    measure prepare_dataset 1 prepare_dataset.py --size_mb 1 --vocab_size 8000 --max_length 256 --no-memory
    measure prepare_byte_level 1 prepare_dataset.py --size_mb 1 --byte_level --vocab_size 8000 --max_length 256 \
        --no-memory --no-ray
    measure prepare_peer 1 prepare_peer.py --size_mb 1 --vocab_size 8000 --max_length 256 --repeats 1
    measure packing_peer 1 packing_peer.py --num_documents 500 --max_length 512 --repeats 1
    measure train_step 1 train_step.py --pairs 1 --warmup 1 --max_length 32 --hidden_size 32 --num_layers 1 \
        --vocab_size 256
    measure checkpoint 1 checkpoint.py --hidden_size 64 --num_layers 1 --repeats 1
    measure sft_padding 1 sft_padding.py --hidden_size 32 --num_layers 1 --vocab_size 256 --num_samples 64 \
        --max_length 128
    measure start_up 1 start_up.py --repeats 1 --only_training --processes 1 --plugins ddp
    measure scaling 1 scaling.py --toy
    measure gpu 1 gpu_step.py --toy
else
    measure init_tokenizer 1 init_tokenizer.py
    measure init_model 1 init_model.py --repeats 3
    measure prepare_dataset 1 prepare_dataset.py --size_mb 100 --repeats 3 --large
    measure prepare_byte_level 1 prepare_dataset.py --size_mb 100 --repeats 3 --byte_level --vocab_size 128000 \
        --no-memory --no-ray
    measure prepare_peer 1 prepare_peer.py ${LLAMAFACTORY_DIR:+--llamafactory_dir "$LLAMAFACTORY_DIR"}
    measure packing_peer 1 packing_peer.py
    measure train_step "$cores" train_step.py
    measure checkpoint "$cores" checkpoint.py
    if command -v nvidia-smi >/dev/null; then
        measure sft_padding "$cores" sft_padding.py --hidden_size 2048 --num_layers 16 --num_heads 32 \
            --vocab_size 32000 --max_length 4096 --num_samples 1024
    else
        measure sft_padding "$cores" sft_padding.py
    fi
    measure start_up 1 start_up.py
    measure scaling 1 scaling.py
    measure gpu 1 gpu_step.py
fi

python benchmarks/write_results.py --work_dir "$work" ${toy:+--toy} ${output:+--output_file "$output"}
if ((${#failed[@]})); then
    echo "error: failed: ${failed[*]}; the results file has their messages" >&2
    exit 1
fi
