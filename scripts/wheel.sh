#!/usr/bin/env bash
# Builds the wheel and the source distribution into dist/, installs the wheel alone into a new environment, and runs the
# commands that must work there, from a folder outside the repository. PYTHON names the Python to use.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
rm -rf dist
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/build"
"$work/build/bin/pip" install --quiet --disable-pip-version-check 'build>=1.3,<2'
"$work/build/bin/python" -m build --outdir dist .

"$python" -m venv "$work/install"
"$work/install/bin/pip" install --quiet --disable-pip-version-check dist/*.whl
config=$PWD/configs/ppo.yaml
cd "$work"
export PATH="$work/install/bin:$PATH"
unset PYTHONPATH

expect() { # expect CODE TEXT COMMAND...: the command ends with the code, and its output holds the text
    local code=$1 text=$2 status=0
    shift 2
    "$@" >output.txt 2>&1 || status=$?
    if [ "$status" != "$code" ] || ! grep --quiet --fixed-strings -e "$text" output.txt; then
        echo "wheel: \`$*\` ended with $status, expected $code and \"$text\". It printed:" >&2
        cat output.txt >&2
        exit 1
    fi
}

expect 0 "rlhf " rlhf --version
expect 0 "rlhf train METHOD" rlhf --help
expect 0 "--policy.lr" rlhf train ppo --help
expect 0 "Usage: rlhf check" rlhf check --help
expect 2 "policy.model: no such folder" rlhf check ppo "$config"
expect 2 "pip install 'rlhf[cpu]'" rlhf generate some/model --prompt Once
expect 2 "pip install 'rlhf[cpu]'" rlhf doctor

python - <<'EOF'
import subprocess, sys, time
from importlib.resources import files

script = "import time; t = time.perf_counter(); import rlhf; print(time.perf_counter() - t)"
seconds = min(float(subprocess.check_output([sys.executable, "-c", script])) for _ in range(3))
print(f"import rlhf: {seconds:.3f} s")
assert seconds < 0.3, "the import takes 0.3 s at most"
assert (files("rlhf") / "py.typed").is_file()
EOF
