#!/usr/bin/env bash
# The tests of the Triton kernels, by Triton's interpreter where there is no GPU. Triton beside a CPU
# build of torch upsets other packages, so it is put into a folder of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || bash scripts/setup.sh dev
[ -d .triton/triton ] || .venv/bin/python -m pip install --quiet --no-deps --target .triton "triton>=3.6,<3.8"
PYTHONPATH=.triton .venv/bin/python -m pytest -q -p no:cacheprovider tests/gpu/test_fused.py "$@"
