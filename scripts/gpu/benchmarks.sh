#!/usr/bin/env bash
# Throughput, memory and plan at full Stable Diffusion v1.4 size with random weights, on one GPU of 80 GB or more.
# usage: scripts/gpu/benchmarks.sh RESULT_FOLDER
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=src:${PYTHONPATH:-} PYTHONUNBUFFERED=1
python3 benchmarks/train_throughput.py --sizes sd --recipes base small tiny --batch-sizes 16 64 --turns 1 --steps 5 --out "$1"
python3 benchmarks/plan.py --batch-sizes 16 64 --out "$1"
