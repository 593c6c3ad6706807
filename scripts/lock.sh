#!/usr/bin/env bash
# Pins what is installed, with hashes, starting from the pins that stand: cpu.lock for machines without GPUs, gpu.lock
# and flash-attn.lock for those with (Python 3.12, CUDA), docs.lock for the documentation site. Arguments go to uv.
#
# torch's CPU build is apart (see setup.sh); torchvision, torchaudio and torchcodec come as CUDA builds that break
# `import transformers` beside it, so they stay out of cpu.lock. flash-attn has a lock of its own, since its build
# imports the torch that gpu.lock installs.
set -euo pipefail
cd "$(dirname "$0")/.."
options=(--quiet --generate-hashes --no-annotate --no-header --no-emit-find-links --no-emit-index-url "$@")

.venv/bin/uv pip compile "${options[@]}" pyproject.toml --extra cpu --extra qlora --extra dev --python-version 3.11 \
    --no-emit-package torch --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec \
    --output-file requirements/cpu.lock

whole=$(mktemp)
trap 'rm -f "$whole"' EXIT
cat requirements/gpu.lock requirements/flash-attn.lock >"$whole"
.venv/bin/uv pip compile "${options[@]}" pyproject.toml --extra gpu --extra flash --extra qlora \
    --python-version 3.12 --python-platform x86_64-manylinux_2_28 --output-file "$whole"
awk '/^[^ ]/ { lock = "requirements/" (/^flash-attn==/ ? "flash-attn" : "gpu") ".lock" } { print > lock }' "$whole"

.venv/bin/uv pip compile "${options[@]}" pyproject.toml --extra docs --python-version 3.11 \
    --output-file requirements/docs.lock
