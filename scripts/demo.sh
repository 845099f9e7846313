#!/usr/bin/env bash
# From a fresh machine to a trained model: makes .venv, generates a small data set, trains on it, evaluates, draws.
# Leaves everything under output/demo; further flags go to main.py.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt
out=output/demo
rm -rf "$out"
python -m datasets.shapes --masks --output "$out/data"
# A small model on small images, all of it trained from random weights: minutes on two CPU cores. What such short trainings
# gain from is in docs/log.md: a linear schedule, an average of the weights, images that all fill the same square, more
# weight on the classes, and gradients that are not clipped as the recipe for COCO does.
python main.py --coco_path "$out/data" --output_dir "$out" \
  --backbone resnet18 --backbone_weights none --backbone_norm batch --min_size 104 --max_size 104 \
  --enc_layers 1 --dec_layers 2 --dim_feedforward 512 --dropout 0 --num_queries 10 \
  --lr 2e-4 --lr_backbone 4e-4 --lr_schedule linear --ema_decay 0.997 --clip_max_norm 0 \
  --cls_loss_coef 4 --batch_size 8 --epochs 9 --eval_every 3 --num_workers 1 "$@"
python -m scripts.demo_pictures --output_dir "$out"
