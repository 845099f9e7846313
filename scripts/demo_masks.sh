#!/usr/bin/env bash
# Masks of objects: trains the demo's detector if it is not there yet, then a mask head on top of it, and draws. With
# --panoptic as the first flag, masks of objects and backgrounds, on top of a detector of both.
# Leaves everything under output/demo_masks or output/demo_panoptic; further flags go to the training of the head.
set -euo pipefail
kind=masks
[ "${1:-}" != --panoptic ] || { kind=panoptic && shift; }
here=$(dirname "$0")
out=output/demo_$kind
if [ "$kind" = masks ]; then
  boxes=output/demo
  data=(--coco_path "$boxes/data")
  [ -f "$here/../$boxes/checkpoint_best.pth" ] || bash "$here/demo.sh"
  source "$here/venv.sh" requirements.txt
  source scripts/demo_flags.sh
  rm -rf "$out"
else
  boxes=$out/boxes
  data=(--dataset_file coco_panoptic --coco_panoptic_path "$boxes/data" --coco_path "$boxes/data")
  source "$here/venv.sh" requirements.txt
  source scripts/demo_flags.sh
  rm -rf "$out"
  python -m datasets.shapes --panoptic --output "$boxes/data"
  python main.py "${data[@]}" --num_classes 6 --output_dir "$boxes" "${detector[@]}" "${images[@]}" "${schedule[@]}"
fi
python main.py "${data[@]}" --frozen_weights "$boxes/checkpoint_best.pth" --output_dir "$out" \
  "${head[@]}" "${images[@]}" "${schedule[@]}" "$@"
python -m scripts.predict --checkpoint "$out/checkpoint_best.pth" --output "$out/predictions" "$boxes/data/images/val2017"
