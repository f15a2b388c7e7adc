#!/usr/bin/env bash
# Make .venv with this package in it: bash scripts/setup.sh EXTRAS. Keeps a torch that is there
# already.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "error: found $("$python" --version), expected Python 3.11 or newer: name one by PYTHON=…" >&2; exit 2; }
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -c 'import torch' 2>/dev/null || .venv/bin/python -m pip install --quiet 'torch==2.13.0'
.venv/bin/python -m pip install --quiet --editable ".[${1:?expected extras, such as dev or all: bash scripts/setup.sh dev}]"
