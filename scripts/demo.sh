#!/usr/bin/env bash
# The main job on a fresh machine: convert a shipped teacher, distil it, evaluate before and after, let each write.
#   bash scripts/demo.sh [llama|mistral|gpt2]
set -euo pipefail
cd "$(dirname "$0")/.."
family=${1:-llama}
bash scripts/setup.sh all
export PATH="$PWD/.venv/bin:$PATH"
teacher=recipes/teachers/$family text=recipes/text/books-test.txt runs=runs/demo-$family
rm -rf "$runs"
step() { printf '\n== %s\n' "$*"; }

step "Convert $teacher: every FFN becomes a kernel readout; the teacher makes its own calibration text"
expansion=4 && [ "$family" != gpt2 ] || expansion=3 # prototypes per hidden unit, as in the recipe
hf-kernel-ffn convert "$teacher" "$runs/converted" --expansion "$expansion"
step "Before distillation, on text that neither model has read"
hf-kernel-ffn evaluate "$runs/converted" --teacher "$teacher" --text "$text" --max-tokens 32768 --json "$runs/before.json"
step "Distil by recipes/$family-faithful.yaml, a quarter of its tokens"
hf-kernel-ffn distill "recipes/$family-faithful.yaml" student="$runs/converted" output_dir="$runs/distilled" \
    stages.0.tokens=150000 stages.1.tokens=100000
step "After distillation"
hf-kernel-ffn evaluate "$runs/distilled" --teacher "$teacher" --text "$text" --max-tokens 32768 --json "$runs/after.json"
step "What each of them writes"
for model in "$teacher" "$runs/converted" "$runs/distilled"; do
    python scripts/generate.py "$model" "The old man looked at"
done
