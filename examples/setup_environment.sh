# shellcheck shell=bash
# Sourced by quickstart.sh and tests/run.sh. `set_up_environment CLONE [EXTRA]` puts a Python environment first on PATH
# in which this clone is installed with all that it needs. It is the active environment if the `colossal_llama` installed
# there is this clone, otherwise CLONE/.venv, which is created if it does not exist.

set_up_environment() {
    local clone=$1 extra=${2:-} environment target
    export PIP_DISABLE_PIP_VERSION_CHECK=1
    if _python_has_this_clone python "$clone"; then
        environment=$(python -c 'import sys; print(sys.prefix)')
        echo "Environment: the active one, $environment"
    else
        environment=$clone/.venv
        # An environment contains absolute paths, so one in a copied or moved clone is created again.
        if [[ "$("$environment/bin/pip" --version 2>/dev/null)" == *" from $environment/"* ]]; then
            echo "Environment: reusing $environment"
        else
            _make_environment "$environment" || return
        fi
        export VIRTUAL_ENV=$environment
        export PATH=$environment/bin:$PATH
        unset PYTHONHOME
    fi
    if _python_has_this_clone python "$clone" && _requirements_are_met "$clone" "$extra"; then
        echo "Environment: complete, nothing to install"
    else
        target=.${extra:+[$extra]}
        echo "Environment: pip install -e '$target' (the first time this takes minutes: PyTorch is large)"
        # Debian 12's pip 23.0 tries versions of [test] for more than ten minutes. An environment of the user's stays as it is.
        [[ $environment != "$clone/.venv" ]] || python -m pip install --quiet 'pip>=23.2' </dev/null || return
        (cd "$clone" && python -m pip install --quiet -e "$target" </dev/null) || {
            echo "error: pip could not install the requirements into $environment; its messages are above" >&2
            return 1
        }
    fi
    # `torchrun` and `colossalai` must come from the same environment as `python`.
    PATH=$(python -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
    export PATH
    hash -r
}

# True if `$1` runs and the colossal_llama that is installed there (not just on PYTHONPATH) is the clone `$2`.
_python_has_this_clone() {
    command -v "$1" >/dev/null || return 1
    (cd / && "$1" -I - "$2") 2>/dev/null <<'PYTHON'
import importlib.metadata
import importlib.util
import os
import sys

importlib.metadata.version("colossal_llama")
found = importlib.util.find_spec("colossal_llama").origin
sys.exit(not os.path.samefile(os.path.dirname(os.path.dirname(found)), sys.argv[1]))
PYTHON
}

# True if everything that setup.py requires now is installed, including the extra `$2`.
_requirements_are_met() {
    (cd / && python -I - "$1" "$2") 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

clone, extra = Path(sys.argv[1]), sys.argv[2]
lines = (clone / "requirements.txt").read_text(encoding="utf-8").splitlines()
lines = [line for line in lines if line.strip() and not line.startswith("#")]
if extra:
    # Read from setup.py itself: what pip recorded when it installed the clone may be out of date.
    import os
    import runpy

    import setuptools

    arguments = {}
    setuptools.setup = lambda **keywords: arguments.update(keywords)
    os.chdir(clone)
    runpy.run_path("setup.py")
    lines += arguments["extras_require"][extra]
for requirement in map(Requirement, lines):
    if requirement.name == "torch":
        # A newer one than colossalai allows was installed on purpose: docs/performance.md says how.
        requirement.specifier = SpecifierSet(",".join(str(s) for s in requirement.specifier if s.operator == ">="))
    if requirement.marker is None or requirement.marker.evaluate():
        if not requirement.specifier.contains(version(requirement.name), prereleases=True):
            sys.exit(1)
PYTHON
}

_make_environment() {
    local environment=$1 candidate
    if [[ $environment == *:* ]]; then
        echo "error: $environment: a Python environment can't live below a path with a colon; move the clone" >&2
        return 2
    fi
    for candidate in python3.11 python3.12 python3.10 python3 python; do
        # Run it to see: version managers put commands on PATH that only print an error.
        "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || continue
        echo "Environment: making $environment with $("$candidate" --version) ($(command -v "$candidate"))"
        if "$candidate" -m venv --clear "$environment" >/dev/null 2>&1; then
            return
        fi
        # Debian's Python without python3-venv has no ensurepip, but may have a pip that can install into the new environment.
        if "$candidate" -m venv --clear --without-pip "$environment" 2>/dev/null &&
            "$candidate" -m pip --python "$environment/bin/python" install --quiet pip 2>/dev/null; then
            return
        fi
        rm -rf -- "$environment"
        echo "Environment: $candidate can't make environments (Debian, Ubuntu: apt install python3-venv)" >&2
    done
    echo "error: no usable Python 3.10, 3.11 or 3.12 on PATH (tried python3.11, python3.12, python3.10, python3, python)" >&2
    return 2
}

# Installs the Debian packages of missing commands, given as pairs COMMAND PACKAGE, and starts no service. If this needs
# another user or another system, it only prints a message.
install_system_packages() {
    local -a packages=()
    while (($#)); do
        PATH=$PATH:/usr/sbin command -v "$1" >/dev/null || packages+=("$2")
        shift 2
    done
    ((${#packages[@]})) || return 0
    if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        echo "Environment: without ${packages[*]} some tests are skipped (root on Debian or Ubuntu: apt install)"
        return 0
    fi
    echo "Environment: apt-get install ${packages[*]}"
    local policy=/usr/sbin/policy-rc.d made=
    if [[ ! -e $policy ]]; then
        made=$policy
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
    fi
    _apt_install "${packages[@]}" || { apt-get update -qq >/dev/null && _apt_install "${packages[@]}"; } ||
        echo "Environment: apt-get could not install them; some tests are skipped" >&2
    [[ -z $made ]] || rm -f -- "$made"
}

_apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" </dev/null >/dev/null 2>&1
}
