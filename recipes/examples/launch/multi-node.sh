#!/usr/bin/env bash
# Distil on several machines: run this on each of them with its number, the first machine's address, and a recipe.
#   MACHINES=2 PROCESSES=16 bash recipes/examples/launch/multi-node.sh 0 10.0.0.1 recipes/llama-faithful.yaml shard=true output_dir=/shared/out
# PROCESSES is the number over all machines, one per GPU; output_dir and the text lie on a disk that all machines see. CPU=1: without GPUs.
set -euo pipefail
cd "$(dirname "$0")/../../.."
rank=$1 main=$2
shift 2
[ -z "${CPU:-}" ] || export ACCELERATE_USE_CPU=1 # "--cpu" would start one process per machine, each for itself
exec "${PYTHON:-python}" -m accelerate.commands.launch --multi_gpu \
    --num_machines "${MACHINES:-2}" --num_processes "${PROCESSES:-16}" --machine_rank "$rank" \
    --main_process_ip "$main" --main_process_port "${PORT:-29500}" --mixed_precision no --dynamo_backend no \
    scripts/distill.py "$@"
