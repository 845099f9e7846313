#!/usr/bin/env bash
# DETR with ResNet-50, 500 epochs: a row of the results table, with 64 images per step on 8 GPUs.
# COCO_PATH, NGPU and OUTPUT_DIR come from the environment; further flags go to main.py.
set -euo pipefail
torchrun --standalone --nproc_per_node="${NGPU:-8}" "$(dirname "$0")/../main.py" --resume auto --model detr \
  --coco_path "${COCO_PATH:-data/coco}" --output_dir "${OUTPUT_DIR:-output/detr_r50_epoch500}" \
  --backbone resnet50 --epochs 500 --lr_drop 400 --batch_size 4 --accum_steps 2 "$@"
