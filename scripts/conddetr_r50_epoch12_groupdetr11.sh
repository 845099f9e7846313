#!/usr/bin/env bash
# Group DETR: Conditional DETR with ResNet-50 and 11 groups of queries, 12 epochs, with 2 images per GPU on 8 GPUs.
# COCO_PATH, NGPU and OUTPUT_DIR come from the environment; further flags go to main.py.
set -euo pipefail
torchrun --standalone --nproc_per_node="${NGPU:-8}" "$(dirname "$0")/../main.py" --resume auto \
  --coco_path "${COCO_PATH:-data/coco}" --output_dir "${OUTPUT_DIR:-output/conddetr_r50_epoch12_groupdetr11}" \
  --backbone resnet50 --group_detr 11 --epochs 12 --lr_drop 11 --batch_size 2 "$@"
