#!/usr/bin/env bash
# One host's part of a run on several hosts, by plain torchrun and without ssh. Run it on every host, with the same
# arguments (those of train.py) and a different NODE_RANK:
#
#     MASTER_ADDR=host-a NNODES=2 NODE_RANK=0 bash examples/launch/torchrun.sh --pretrained … --dataset …    # host-a
#     MASTER_ADDR=host-a NNODES=2 NODE_RANK=1 bash examples/launch/torchrun.sh --pretrained … --dataset …    # host-b
#
#     MASTER_ADDR      name or address of the host with NODE_RANK 0
#     MASTER_PORT      a free port there (29500)
#     NNODES           hosts
#     NODE_RANK        this host's number, from 0
#     NPROC_PER_NODE   processes on this host (one per GPU, or two on a machine without)
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

problems=()
[[ ${NNODES:-} =~ ^[1-9][0-9]*$ ]] || problems+=("NNODES=${NNODES:-}: give the number of hosts")
[[ ${NODE_RANK:-} =~ ^[0-9]+$ ]] || problems+=("NODE_RANK=${NODE_RANK:-}: give this host's number, from 0")
[[ -n ${MASTER_ADDR:-} ]] || problems+=("MASTER_ADDR: give the name or address of the host with NODE_RANK 0")
if ((${#problems[@]} == 0 && NODE_RANK >= NNODES)); then
    problems+=("NODE_RANK=$NODE_RANK: the hosts' numbers go from 0 to $((NNODES - 1))")
fi
if ((${#problems[@]})); then
    printf 'error: %s\n' "${problems[@]}" >&2
    exit 2
fi

gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -c . || true)
((gpus)) || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun \
    --nnodes "$NNODES" \
    --node_rank "$NODE_RANK" \
    --nproc_per_node "${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 2))}" \
    --master_addr "$MASTER_ADDR" \
    --master_port "${MASTER_PORT:-29500}" \
    train.py "$@"
