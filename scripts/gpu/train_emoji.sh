#!/usr/bin/env bash
# Retrain the embedded model on one GPU, longer than two CPU cores can. Run `examples/emoji/art.py`
# on a machine with npm first, and bring `examples/emoji/work/art` along.
# usage: scripts/gpu/train_emoji.sh RESULT_FOLDER [TEACHER_STEPS]
set -euo pipefail
cd "$(dirname "$0")/../.."
result=$1
steps=${2:-30000}
export PYTHONPATH=src:${PYTHONPATH:-} PYTHONUNBUFFERED=1
python3 examples/emoji/pretrain.py vae --device cuda --steps 8000 --batch-size 64
python3 examples/emoji/pretrain.py encoder --device cuda --steps 6000 --batch-size 256
python3 examples/emoji/pretrain.py teacher --device cuda --steps "$steps" --batch-size 256
python3 examples/emoji/ship.py
python3 examples/emoji/grid.py --out "$result/emoji.png" --guidance 2.5
tar -cf "$result/emoji.tar" -C src/bksdm/common/assets emoji/model emoji/encoder
