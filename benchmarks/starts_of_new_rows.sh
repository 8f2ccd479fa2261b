#!/usr/bin/env bash
# Remakes benchmarks/results/<date>_starts.md and the tables of docs/vocabulary.md: corpora, base models, tokenizers, and every case.
# What is there already is not made again. About two hours of one core, 10 GB of disk, and apt-get for the corpora.
#
#   bash benchmarks/starts_of_new_rows.sh WORK_DIR SmolLM2-135M-Instruct.Q4_1.gguf
set -euo pipefail
(($# == 2)) || { sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
mkdir -p -- "$1"
gguf=$(realpath -- "$2")
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cd -- "$1"

make_base() {
    [[ -d corpora/ru ]] || python "$root/examples/study/make_corpora.py" --packages_dir packages --output_dir corpora \
        --languages zh en more_en de ru
    [[ -d smollm2 ]] || python "$root/examples/study/convert_gguf.py" --gguf "$gguf" --output_dir smollm2
    [[ -d small/random ]] || python "$root/examples/make_base_model.py" --data_input_dirs corpora/en,corpora/more_en \
        --output_dir small/random --vocab_size 8000 --hidden_size 256 --num_layers 6 --num_heads 4 --max_positions 2048
    [[ -d small/data ]] || python "$root/prepare_pretrain_dataset.py" --data_input_dirs corpora/en,corpora/more_en \
        --tokenizer_dir small/random --data_output_dirs small/data --max_length 512 --num_spliced_dataset_bins 1
    [[ -d small/run/modeling ]] || python "$root/train.py" --pretrained small/random --dataset small/data/arrow --plugin zero2 \
        --mixed_precision bf16 --batch_size 4 --accumulation_steps 1 --max_length 512 --lr 2e-3 --lr_schedule wsd \
        --warmup_steps 40 --decay_start 500 --decay_steps 130 --num_workers 0 --save_interval 0 --skip_save_each_epoch \
        --save_dir small/run --tensorboard_dir small/run/logs --config_file small/run.json
}

# tokenizer BASE NAME CORPUS PIECES FLAGS...: the best PIECES of what the flags of learn_pieces.py give.
tokenizer() {
    [[ -d tokenizers/$2 ]] && return
    mkdir -p tokenizers
    python "$root/colossal_llama/tokenizer/learn_pieces.py" --data_input_dirs "corpora/$3" --source_tokenizer_dir "$1" \
        --output_file "tokenizers/$2.all.jsonl" "${@:5}"
    head -n "$4" "tokenizers/$2.all.jsonl" > "tokenizers/$2.jsonl"
    python "$root/colossal_llama/tokenizer/init_tokenizer.py" --source_tokenizer_dir "$1" \
        --expand_tokens_file "tokenizers/$2.jsonl" --target_tokenizer_dir "tokenizers/$2"
}

# measure NAME BASE TOKENIZER LANGUAGE FLAGS...
measure() {
    python "$root/benchmarks/starts_of_new_rows.py" --work_dir cases --name "$1" --base "$2" --tokenizer "tokenizers/$3" \
        --corpus "corpora/$4" --held_out "corpora/held_out/$4,corpora/held_out/en" "${@:5}"
}

make_base
words=(--num_tokens 3500 --character_filter all --max_piece_length 16)
tokenizer small/run/modeling small_de de 2000 "${words[@]}"
tokenizer small/run/modeling small_zh zh 2000 --num_tokens 2000
tokenizer smollm2 smollm2_zh zh 3000 --num_tokens 3000
tokenizer smollm2 smollm2_ru ru 2000 "${words[@]}"
starts=mean+mean,mean+mean+calibrated,mean+half,mean+half+calibrated
measure small-German small/run/modeling small_de de --held_out_bytes 20000,12000 --starts "$starts"
measure small-Chinese small/run/modeling small_zh zh --held_out_bytes 20000,12000
measure SmolLM2-Chinese smollm2 smollm2_zh zh --held_out_bytes 24000,10000 --num_positions 2048
measure SmolLM2-Russian smollm2 smollm2_ru ru --held_out_bytes 30000,8000 --num_positions 2048 --init_input mean \
    --init_output mean,half,first
