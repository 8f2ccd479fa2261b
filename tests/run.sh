#!/usr/bin/env bash
# Sets up the environment as quickstart.sh does, plus the test extra, then checks style and runs the whole test suite.
# Arguments go to pytest: `bash tests/run.sh tests/unit -k packing`.
set -euo pipefail

ROOT=$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$ROOT"
# shellcheck source=examples/setup_environment.sh
source examples/setup_environment.sh
set_up_environment "$ROOT" test
# For tests on several hosts; no Python package brings them.
install_system_packages sshd openssh-server ip iproute2 pkill procps

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
export MPLBACKEND=Agg HF_HUB_OFFLINE=1

ruff check .
ruff format --check .
shellcheck --external-sources -- *.sh tests/*.sh tests/gpu/*.sh examples/*.sh examples/launch/*.{sh,sbatch} .ci/run
if (($#)); then
    exec python -m pytest "$@" </dev/null
fi
# Unit tests run on all cores (a file stays with one worker, since its fixtures are shared); the others start
# processes of their own, and some measure time.
status=0
python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile tests/unit </dev/null || status=$?
python -m pytest tests/upstream tests/integration tests/distributed tests/gpu </dev/null || status=$?
exit "$status"
