#!/usr/bin/env bash
# Everything that is measured on a GPU, within eight minutes: bash scripts/gpu_day.sh OUT --model FOLDER. Without a GPU: --dry-run.
# The few figures that matter most, in a minute and a half and without a model: bash scripts/gpu_day.sh minute OUT.json.
# Nothing is fetched: packages that the machine lacks are taken from wheels in .gpu_wheels, if there are some, into a folder of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
site=$(mktemp -d)
if ! "$python" -c 'import pydantic, evaluate' 2>/dev/null && compgen -G '.gpu_wheels/*.whl' >/dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" .gpu_wheels/*.whl
    PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONPATH=$PWD:$PWD/scripts/benchmarks:$PWD/scripts/experiments${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
script=gpu_day
if [ "${1:-}" = minute ]; then
    script=gpu_minute
    shift
fi
exec "$python" "scripts/benchmarks/$script.py" "$@"
