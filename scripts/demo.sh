#!/usr/bin/env bash
# From a fresh machine to a trained model: makes .venv, generates a small data set, trains on it, evaluates, draws.
# Leaves everything under output/demo; further flags go to main.py.
set -euo pipefail
source "$(dirname "$0")/venv.sh" requirements.txt
source scripts/demo_flags.sh
out=output/demo
rm -rf "$out"
python -m datasets.shapes --masks --output "$out/data"
python main.py --coco_path "$out/data" --output_dir "$out" "${detector[@]}" "${images[@]}" "${schedule[@]}" "$@"
python -m scripts.demo_pictures --output_dir "$out"
