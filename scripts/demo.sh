#!/usr/bin/env bash
# The main job on a fresh machine.
#   bash scripts/demo.sh [llama|mistral|gpt2]   convert a shipped teacher, distil it, evaluate before and after, let each write
#   bash scripts/demo.sh smollm2                fetch SmolLM2-135M, convert it, evaluate it, read a prompt, let both write
set -euo pipefail
cd "$(dirname "$0")/.."
name=${1:-llama}
bash scripts/setup.sh all
export PATH="$PWD/.venv/bin:$PATH"
text=recipes/text/books-test.txt runs=runs/demo-$name
rm -rf "$runs"
step() { printf '\n== %s\n' "$*"; }

write() {
    step "What each of them writes"
    for model in "$@"; do
        python scripts/generate.py "$model" "The old man looked at"
    done
}

if [ "$name" = smollm2 ]; then
    teacher=runs/smollm2
    python -c 'import gguf' 2>/dev/null || pip install --quiet gguf
    step "Fetch SmolLM2-135M-Instruct (Apache-2.0)"
    [ -e "$teacher/config.json" ] || python scripts/real_models.py smollm2 "$teacher"
    step "Convert it without any text: every FFN becomes a sum of kernels at the stock FFN's parameters"
    hf-kernel-ffn convert "$teacher" "$runs/converted"
    step "On text that neither model was fitted on"
    hf-kernel-ffn evaluate "$runs/converted" --teacher "$teacher" --text "$text" --max-tokens 2048 --json "$runs/report.json"
    step "Read one prompt"
    hf-kernel-ffn read "$runs/converted" --prompt "The capital of France is"
    write "$teacher" "$runs/converted"
    exit
fi

teacher=recipes/teachers/$name
step "Convert $teacher: every FFN becomes a kernel readout; the teacher makes its own calibration text"
expansion=4 && [ "$name" != gpt2 ] || expansion=3 # prototypes per hidden unit, as in the recipe
hf-kernel-ffn convert "$teacher" "$runs/converted" --expansion "$expansion"
step "Before distillation, on text that neither model has read"
hf-kernel-ffn evaluate "$runs/converted" --teacher "$teacher" --text "$text" --max-tokens 32768 --json "$runs/before.json"
step "Distil by recipes/$name-faithful.yaml, a quarter of its tokens"
hf-kernel-ffn distill "recipes/$name-faithful.yaml" student="$runs/converted" output_dir="$runs/distilled" \
    stages.0.tokens=150000 stages.1.tokens=100000
step "After distillation"
hf-kernel-ffn evaluate "$runs/distilled" --teacher "$teacher" --text "$text" --max-tokens 32768 --json "$runs/after.json"
write "$teacher" "$runs/converted" "$runs/distilled"
