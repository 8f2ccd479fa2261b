#!/usr/bin/env bash
# The first quarter of an hour on a machine with a GPU, in the order of what would hurt most: installation without nvcc, each
# plugin against the CPU's curve, overflow, resume, flash attention, Gemini, then the benchmarks. A part that fails or takes
# too long does not end the others; the results file has the machine, every result and the messages of what failed.
#
#   bash tests/gpu/run.sh                   uses what is installed
#   bash tests/gpu/run.sh --wheels DIR      first installs the wheels in DIR, beside what is there and without network
#   bash tests/gpu/run.sh --toy             tiny shapes on the CPU: shows that it runs
#
# More arguments: --output FILE, --only PART ..., --seconds N, --list (python tests/gpu/first_run.py --help).
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

python=$(command -v python || command -v python3)
arguments=()
site=''
trap '[[ -z $site ]] || rm -rf -- "$site"' EXIT
while (($#)); do
    case $1 in
    --wheels)
        (($# > 1)) || { echo "error: --wheels: needs a directory" >&2; exit 2; }
        site=$(mktemp -d)
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$2"/*.whl
        export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
        shift
        ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg HF_HUB_OFFLINE=1
"$python" tests/gpu/first_run.py ${arguments[@]+"${arguments[@]}"}
