#!/usr/bin/env bash
# The tests under the lowest and the newest supported torch and transformers: bash scripts/test_matrix.sh [pytest arguments]
# Each pair gets an environment in .matrix/, and the table says what was in it. KEEP_TORCH=1: with the torch that $PYTHON has, in every pair.
#   PAIRS="2.11.*:5.17.0 2.*:5.*"   the pairs, as pip reads them     INDEX=https://download.pytorch.org/whl/cpu   where torch comes from
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
read -ra pairs <<<"${PAIRS:-2.11.*:5.17.0 2.*:5.*}"
tests=("$@")
[ $# -gt 0 ] || tests=(tests/checkpoint_code tests/conversion/test_convert.py tests/cli tests/distillation/test_distill.py)
site=$("$python" -c 'import site; print(site.getsitepackages()[0])')
rows=() failed=0
for pair in "${pairs[@]}"; do
    folder=".matrix/${pair//[^0-9.]/_}"
    rm -rf "$folder"
    "$python" -m venv "$folder" || exit 2
    run="$folder/bin/python"
    if [ -n "${KEEP_TORCH:-}" ]; then
        "$run" -c "import sys; open('$folder/lib/python%d.%d/site-packages/base.pth' % sys.version_info[:2], 'w').write('$site')"
    else
        "$run" -m pip install --quiet ${INDEX:+--index-url "$INDEX"} "torch==${pair%%:*}" || { rows+=("$pair: no such torch"); failed=1; continue; }
    fi
    "$run" -m pip install --quiet --editable ".[dev]" "transformers==${pair##*:}" || { rows+=("$pair: not installable"); failed=1; continue; }
    found=$("$run" -c 'import torch, transformers; print(f"torch {torch.__version__}, transformers {transformers.__version__}")')
    if "$run" -m pytest -q -p no:cacheprovider "${tests[@]}" >"$folder/log" 2>&1; then verdict=pass; else verdict=FAIL failed=1; fi
    rows+=("$found: $verdict, $(tail -1 "$folder/log")")
    [ "$verdict" = pass ] || tail -40 "$folder/log"
done
printf '%s\n' "${rows[@]}"
exit $failed
