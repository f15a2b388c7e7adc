#!/usr/bin/env bash
# Set up and run everything that is checked: ruff, the type checker, the tests. Arguments go to
# pytest; --slow adds the long ones.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -q "$@"
