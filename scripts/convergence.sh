#!/usr/bin/env bash
# Compares how fast the models learn: trains each of them with several seeds on the same data, and draws AP over epochs.
# Without --coco_path, it makes .venv, generates scenes, and trains small models: more than an hour on two CPU cores.
# With --coco_path, it trains on COCO as the published recipe does, on NGPU GPUs.
# SEEDS, MODELS and OUTPUT_DIR come from the environment; further flags go to main.py. Called again, it resumes.
set -euo pipefail
out=${OUTPUT_DIR:-output/convergence}

# All runs share the backbone, the data, the augmentation, the optimizer, the schedule and the number of queries: 100 on
# COCO, DETR's own, since more of them make it worse. Heads, losses and matching are those of each model. Group DETR is
# Conditional DETR with 11 groups of queries in training.
case " $* " in
  *" --coco_path"*)
    cd "$(dirname "$0")/.."
    main=(torchrun --standalone --nproc_per_node="${NGPU:-8}" main.py
      --backbone resnet50 --num_queries 100 --batch_size 2 --epochs 50 --lr_drop 40)
    ;;
  *)
    source "$(dirname "$0")/venv.sh" requirements.txt
    python -m datasets.shapes --output "$out/data"
    main=(python main.py --coco_path "$out/data" --min_size 96 --max_size 160
      --backbone resnet18 --backbone_weights none --backbone_norm batch
      --enc_layers 1 --dec_layers 2 --dim_feedforward 512 --dropout 0 --num_queries 20
      --lr 1e-4 --lr_backbone 1e-4 --batch_size 16 --epochs 12 --lr_drop 10 --num_workers 1)
    ;;
esac

for seed in ${SEEDS:-1 2 3}; do
  for name in ${MODELS:-conditional_detr detr group_detr}; do
    model=(--model "$name")
    [ "$name" != group_detr ] || model=(--model conditional_detr --group_detr 11)
    "${main[@]}" "${model[@]}" --seed "$seed" --output_dir "$out/$name/seed$seed" --resume auto "$@"
    python -m scripts.convergence --runs "$out"
  done
done
