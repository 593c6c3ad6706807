#!/usr/bin/env bash
# Makes .venv with everything the CPU set-up needs. Called by the Makefile; safe to run again.
set -euo pipefail
cd "$(dirname "$0")/.."
torch_version=2.13.0

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
if [ -z "$python" ]; then
    echo "setup: Python 3.11, 3.12 or 3.13 is needed and none was found. Set PYTHON=/path/to/python." >&2
    exit 2
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check 'uv==0.13.*'

# torch comes by itself: its CPU build has an index of its own, which uv knows. Where that index cannot be reached, pip's
# own configuration may offer the build. Everything else, with what torch needs, is unpacked meanwhile.
install_torch() {
    UV_HTTP_RETRIES=${UV_HTTP_RETRIES:-1} .venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps \
        --torch-backend cpu "torch==$torch_version" 2>/dev/null ||
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps "torch==$torch_version"
}
torch_pid=
if ! .venv/bin/python -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch_version')" 2>/dev/null; then
    install_torch &
    torch_pid=$!
fi
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --require-hashes -r requirements/cpu.lock
.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --editable .
if [ -n "$torch_pid" ]; then wait "$torch_pid"; fi
if ! .venv/bin/python -c 'import torch, sys; sys.exit(torch.version.cuda is not None)'; then
    echo "setup: this torch is a CUDA build and the lock is for CPU machines." >&2
    echo "Install the CPU build of torch $torch_version into .venv, then run this again." >&2
    exit 2
fi
touch .venv/.ready
