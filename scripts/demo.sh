#!/usr/bin/env bash
# From a fresh machine to a trained model: makes .venv, generates a small data set, trains on it, evaluates, draws.
# Leaves everything under output/demo; further flags go to main.py.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt
out=output/demo
rm -rf "$out"
python -m datasets.shapes --output "$out/data"
# A small model on small images, all of it trained from random weights: minutes on two CPU cores. Over so few steps,
# clipping gradients as the recipe for COCO does slows learning down.
python main.py --coco_path "$out/data" --output_dir "$out" \
  --backbone resnet18 --backbone_weights none --backbone_norm batch --min_size 96 --max_size 160 \
  --enc_layers 1 --dec_layers 2 --dim_feedforward 512 --dropout 0 --num_queries 20 \
  --lr 1e-4 --lr_backbone 1e-4 --clip_max_norm 0 --batch_size 8 --epochs 6 --lr_drop 5 --num_workers 1 "$@"
python -m scripts.demo_pictures --output_dir "$out"
