#!/usr/bin/env bash
# The same on two machines of eight GPUs each, which see the same files. Start it on both:
#   machine 0:  RANK_OF_MACHINE=0 MAIN=address-of-machine-0 examples/launch/two_nodes.sh
#   machine 1:  RANK_OF_MACHINE=1 MAIN=address-of-machine-0 examples/launch/two_nodes.sh
set -euo pipefail
TEACHER=${TEACHER:-CompVis/stable-diffusion-v1-4} LAION=${LAION:-laion} OUT=${OUT:-runs}
LAUNCH="accelerate launch --multi_gpu --num_machines 2 --num_processes 16 --machine_rank $RANK_OF_MACHINE
  --main_process_ip $MAIN --main_process_port 29500 --mixed_precision no --dynamo_backend no -m"

$LAUNCH bksdm prepare "$LAION" --teacher "$TEACHER" --out "$OUT/latents" --text_embeddings --workers 4
$LAUNCH bksdm distill --teacher "$TEACHER" --student "$OUT/base" --data "$OUT/latents" --out "$OUT/base-kd" \
  --batch_size 16 --accumulation 1 --workers 4
