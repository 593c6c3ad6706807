#!/usr/bin/env bash
# Pins the CPU set-up with hashes, starting from the pins that stand. torch is apart (see setup.sh); torchvision,
# torchaudio and torchcodec come as CUDA builds that break `import transformers` beside a CPU torch, so they stay out.
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/uv pip compile --quiet pyproject.toml --extra cpu --extra qlora --extra dev --python-version 3.11 \
    --generate-hashes --no-annotate --no-header --no-emit-find-links \
    --no-emit-package torch --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec \
    "$@" --output-file requirements/cpu.lock
