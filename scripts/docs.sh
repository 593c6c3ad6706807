#!/usr/bin/env bash
# Builds the documentation site into site/, in an environment of its own: it needs no training library. A broken link, a
# missing anchor or a page outside the navigation fails the build. PYTHON names the Python to use.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ ! -e .venv-docs/.ready ] || [ requirements/docs.lock -nt .venv-docs/.ready ]; then
    "${PYTHON:-python3}" -m venv --clear .venv-docs
    .venv-docs/bin/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/docs.lock
    touch .venv-docs/.ready
fi
# Material for MkDocs prints a notice about MkDocs 2 unless this is set.
NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
echo "site/index.html"
