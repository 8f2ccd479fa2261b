#!/usr/bin/env bash
# What run.sh measures on a GPU, on a machine that has one and maybe no network.
#
#   bash benchmarks/gpu.sh                   uses what is installed
#   bash benchmarks/gpu.sh --wheels DIR      installs the wheels in DIR first, beside what is there
#   bash benchmarks/gpu.sh --toy             toy shapes, on the CPU if there is no GPU: shows that it runs
#
# Wheels are fetched where there is a network: pip download --no-deps --only-binary=:all: -d DIR NAME==VERSION ...
# Other arguments go to run.sh (--output FILE).
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

arguments=()
site=''
trap '[[ -z $site ]] || rm -rf -- "$site"' EXIT
while (($#)); do
    case $1 in
    --wheels)
        (($# > 1)) || { echo "error: --wheels: needs a directory" >&2; exit 2; }
        site=$(mktemp -d)
        python -m pip install --quiet --no-index --no-deps --target "$site" "$2"/*.whl
        export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
        shift
        ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
bash benchmarks/run.sh --only gpu --only sft_padding "${arguments[@]}"
