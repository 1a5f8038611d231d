#!/usr/bin/env bash
# The same on the eight GPUs of one machine: 8 x 32 pictures a step. Run it again to go on, on fewer GPUs if need be.
set -euo pipefail
TEACHER=${TEACHER:-CompVis/stable-diffusion-v1-4} LAION=${LAION:-laion} OUT=${OUT:-runs}
LAUNCH="accelerate launch --multi_gpu --num_machines 1 --num_processes 8 --mixed_precision no --dynamo_backend no -m"

bksdm prune "$TEACHER" --recipe base --out "$OUT/base"
$LAUNCH bksdm prepare "$LAION" --teacher "$TEACHER" --out "$OUT/latents" --text_embeddings --workers 4
$LAUNCH bksdm distill --teacher "$TEACHER" --student "$OUT/base" --data "$OUT/latents" --out "$OUT/base-kd" \
  --batch_size 32 --accumulation 1 --workers 4 --compile_teacher
$LAUNCH bksdm generate "$OUT/base-kd/student" --prompts "$LAION/metadata.csv" --out "$OUT/pictures" --batch_size 16
