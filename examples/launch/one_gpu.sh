#!/usr/bin/env bash
# Stable Diffusion v1.4 to BK-SDM-Base on one GPU: 256 pictures a step, as the paper has it.
# LAION is a folder of pictures with metadata.csv, or of img2dataset's tars.
set -euo pipefail
TEACHER=${TEACHER:-CompVis/stable-diffusion-v1-4} LAION=${LAION:-laion} OUT=${OUT:-runs}

bksdm prune "$TEACHER" --recipe base --out "$OUT/base"
bksdm prepare "$LAION" --teacher "$TEACHER" --out "$OUT/latents" --text_embeddings --workers 8
bksdm distill --plan --teacher "$TEACHER" --student "$OUT/base" --data "$OUT/latents" --out "$OUT/base-kd" \
  --batch_size 64 --accumulation 4
bksdm distill --teacher "$TEACHER" --student "$OUT/base" --data "$OUT/latents" --out "$OUT/base-kd" \
  --batch_size 64 --accumulation 4 --workers 4 --compile_teacher
