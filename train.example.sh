#!/usr/bin/env bash
# Continual pre-training on one host or many. To use it:
#
#     cp hostfile.example hostfile      # list your hosts; for this machine alone, skip this and leave HOSTFILE empty
#     cp train.example.sh train.sh
#     $EDITOR train.sh                  # the variables and flags below
#     bash train.sh
#
# SIGTERM, Ctrl-C and closing the terminal make every host save and stop. The same command then continues from the last
# checkpoint.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
# shellcheck source=examples/launch/launch.sh
source examples/launch/launch.sh

PROJECT_NAME=""           # names the directories of this experiment
PARENT_SAVE_DIR=""        # checkpoints go to PARENT_SAVE_DIR/PROJECT_NAME
PARENT_TENSORBOARD_DIR="" # metrics go to PARENT_TENSORBOARD_DIR/PROJECT_NAME
PARENT_CONFIG_FILE=""     # the configuration goes to PARENT_CONFIG_FILE/PROJECT_NAME.json
PRETRAINED_MODEL_PATH=""  # model made by init_model.py, tokenizer included
declare -a dataset=(
    # "prepared/zh/arrow/part-00000" "prepared/en/arrow" …: part directories, or arrow/ directories for all parts
)
HOSTFILE=""       # file with one host name per line; empty: this machine alone
NPROC_PER_NODE="" # processes on each host; empty: one per GPU, or two on a machine without a GPU
MASTER_PORT=""    # port on the first host; empty: 29500, or a free one on this machine alone
SSH_PORT=""       # port of ssh on the hosts; empty: as ssh is configured

require_settings PROJECT_NAME PARENT_SAVE_DIR PARENT_TENSORBOARD_DIR PARENT_CONFIG_FILE PRETRAINED_MODEL_PATH dataset
report_problems

SAVE_DIR=$PARENT_SAVE_DIR/$PROJECT_NAME
supervise colossalai run \
    --nproc_per_node "$NPROC_PER_NODE" \
    --hostfile "$HOSTFILE" \
    --master_port "$MASTER_PORT" \
    --ssh-port "$SSH_PORT" \
    train.py \
    --pretrained "$PRETRAINED_MODEL_PATH" \
    --dataset "${dataset[@]}" \
    --plugin zero2 \
    --load_checkpoint latest \
    --save_interval 400 \
    --save_dir "$SAVE_DIR" \
    --tensorboard_dir "$PARENT_TENSORBOARD_DIR/$PROJECT_NAME" \
    --config_file "$PARENT_CONFIG_FILE/$PROJECT_NAME.json" \
    --num_epochs 1 \
    --batch_size 8 \
    --accumulation_steps 1 \
    --max_length 4096 \
    --lr 1e-4 \
    --weight_decay 0.01 \
    --warmup_steps 100 \
    --grad_clip 1.0 \
    --mixed_precision bf16 \
    --use_grad_checkpoint
