#!/usr/bin/env bash
# Prepares pre-training data on all nodes of a Slurm job. Fill in the variables below, then, from the clone:
#
#     sbatch examples/launch/prepare_ray.slurm.sh
#
# Clone, environment, input and output have to be on storage that all nodes share. A job that was stopped
# continues where it stopped when it is submitted again.
#SBATCH --job-name=prepare
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
set -euo pipefail

DATA_INPUT_DIRS=""  # comma list of directories or URLs
TOKENIZER_DIR=""    # tokenizer in Hugging Face format
DATA_OUTPUT_DIRS="" # directory for cache/, jsonl/, arrow/ and stats.json
MAX_LENGTH=4096     # longest row, in tokens
NUM_BINS=1024       # part directories; each is packed by one CPU
RAY_HEAD=""         # address of the first node that the others reach; empty: its first one
RAY_PORT=6379       # on the first node

problems=()
for name in DATA_INPUT_DIRS TOKENIZER_DIR DATA_OUTPUT_DIRS; do
    [[ -n ${!name} ]] || problems+=("$name: empty; set it at the top of the script")
done
for name in SLURM_JOB_ID SLURM_JOB_NUM_NODES SLURM_CPUS_PER_TASK; do
    [[ -n ${!name:-} ]] || problems+=("$name: not set; start this script with sbatch")
done
# Slurm runs a copy of this script; the clone is where sbatch was called.
[[ -f prepare_pretrain_dataset.py ]] || problems+=("$PWD: holds no prepare_pretrain_dataset.py; call sbatch from the clone")
if ((${#problems[@]})); then
    printf 'error: %s\n' "${problems[@]}" >&2
    exit 2
fi

# Only this job may give the cluster work: others can reach its ports too.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN RAY_USAGE_STATS_ENABLED=0 RAY_PORT
# This script runs on the job's first node, which becomes the head.
RAY_HEAD=${RAY_HEAD:-$(hostname -I | awk '{ print $1 }')}
export RAY_HEAD

# shellcheck disable=SC2016  # each node fills in its own variables
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c '
    if ((SLURM_PROCID == 0)); then
        where=(--head --node-ip-address="$RAY_HEAD" --port="$RAY_PORT" --include-dashboard=false)
    else
        where=(--address="$RAY_HEAD:$RAY_PORT")
        until (: <"/dev/tcp/$RAY_HEAD/$RAY_PORT") 2>/dev/null; do sleep 1; done
    fi
    # Hardly anything goes through the object store.
    exec ray start "${where[@]}" --num-cpus="$SLURM_CPUS_PER_TASK" --object-store-memory=100000000 --block' >"ray-$SLURM_JOB_ID.log" 2>&1 &
nodes=$!
stop_nodes() {
    kill "$nodes" 2>/dev/null || true
    wait "$nodes" || true
}
trap stop_nodes EXIT

for _ in {1..120}; do
    (: <"/dev/tcp/$RAY_HEAD/$RAY_PORT") 2>/dev/null && break
    kill -0 "$nodes" 2>/dev/null || break
    sleep 1
done

# Nodes that are late join while it runs.
python prepare_pretrain_dataset.py \
    --data_input_dirs "$DATA_INPUT_DIRS" \
    --tokenizer_dir "$TOKENIZER_DIR" \
    --data_output_dirs "$DATA_OUTPUT_DIRS" \
    --max_length "$MAX_LENGTH" \
    --num_spliced_dataset_bins "$NUM_BINS" \
    --ray_address "$RAY_HEAD:$RAY_PORT"
