#!/usr/bin/env bash
# Masks of objects: trains the demo's detector if it is not there yet, then a mask head on top of it, and draws.
# Leaves everything under output/demo_masks; further flags go to main.py.
set -euo pipefail
boxes=output/demo out=output/demo_masks
[ -f "$(dirname "$0")/../$boxes/checkpoint_best.pth" ] || bash "$(dirname "$0")/demo.sh"
source "$(dirname "$0")/venv.sh" requirements.txt
rm -rf "$out"
# The detector stays as it is, so a step costs little: only the head is trained. Model and data are those of the demo.
python main.py --masks --frozen_weights "$boxes/checkpoint_best.pth" --coco_path "$boxes/data" --output_dir "$out" \
  --min_size 104 --max_size 104 --lr 1e-3 --lr_schedule linear --ema_decay 0.99 --clip_max_norm 0 \
  --batch_size 8 --epochs 6 --eval_every 3 --num_workers 1 "$@"
python -m scripts.predict --checkpoint "$out/checkpoint_best.pth" --output "$out/predictions" "$boxes/data/images/val2017"
