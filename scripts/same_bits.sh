#!/usr/bin/env bash
# Print a hash of the weights, optimizer state and log of a short training run in each mode, to show that a change of
# structure did not change results. The hashes depend on the machine and the versions, so compare two commits on one:
#   bash scripts/same_bits.sh > before.txt; git switch my-change; bash scripts/same_bits.sh | diff before.txt -
# PYTHON names the interpreter (python3 by default). Takes about two minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export OMP_NUM_THREADS=1

"$python" -m datasets.shapes --output "$work/data" --train 14 --val 7 --masks >/dev/null
"$python" - "$work/resnet18.pth" <<'END'
import sys, torch, torchvision
torch.manual_seed(0)
torch.save(torchvision.models.resnet18().state_dict(), sys.argv[1])
END

common=(--coco_path "$work/data" --device cpu --deterministic --num_workers 0 --backbone resnet18
  --hidden_dim 32 --nheads 2 --enc_layers 1 --dec_layers 2 --dim_feedforward 64 --num_queries 8
  --min_size 64 --max_size 107 --batch_size 4 --epochs 2 --lr_drop 1)
scratch=("${common[@]}" --backbone_weights none --backbone_norm batch)
frozen=("${common[@]}" --backbone_weights "$work/resnet18.pth")

# quietly COMMAND ..: run it and show what it printed only if it fails.
quietly() {
  "$@" >"$work/printed.txt" 2>&1 || {
    cat "$work/printed.txt" >&2
    return 1
  }
}

# train MODE FLAG ..: train into the folder MODE.
train() {
  local mode=$1
  shift
  quietly "$python" main.py --output_dir "$work/$mode" "$@"
}

train scratch "${scratch[@]}"
train frozen "${frozen[@]}"
train accumulation "${frozen[@]}" --batch_size 2 --accum_steps 2
train bf16 "${frozen[@]}" --amp bf16
train activations "${frozen[@]}" --checkpoint_activations --position_embedding learned --no_aux_loss
train finetune "${frozen[@]}" --finetune "$work/scratch/checkpoint.pth" --backbone_norm batch
quietly "$python" -m torch.distributed.run --standalone --nproc_per_node=2 main.py --output_dir "$work/two_processes" \
  "${frozen[@]}" --batch_size 2

# Killed as soon as a checkpoint within the first epoch is on the disk; the end does not depend on the moment.
"$python" main.py --output_dir "$work/resumed" "${scratch[@]}" --save_every 1 >/dev/null 2>&1 &
until [ -e "$work/resumed/checkpoint.pth" ]; do sleep 0.02; done
kill -9 $!
wait $! 2>/dev/null || true
train resumed "${scratch[@]}" --save_every 1 --resume auto

quietly "$python" main.py --eval --resume "$work/scratch/checkpoint.pth" --output_dir "$work/evaluation" "${scratch[@]}"

"$python" - "$work" <<'END'
import hashlib, sys
from pathlib import Path
import torch

def add(digest, value):
    """Feed a nest of dicts, lists, tensors and plain values to a digest."""
    if isinstance(value, dict):
        for key in value:
            digest.update(repr(key).encode())
            add(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            add(digest, item)
    elif isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    else:
        digest.update(repr(value).encode())

for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir() and path.name != "data"):
    digest = hashlib.sha256()
    if (folder / "checkpoint.pth").exists():
        checkpoint = torch.load(folder / "checkpoint.pth", map_location="cpu", weights_only=True)
        add(digest, [checkpoint["model"], checkpoint["optimizer"]["state"]])
        digest.update((folder / "log.txt").read_bytes())
    else:
        digest.update((folder / "detections.json").read_bytes())
    print(digest.hexdigest()[:16], folder.name)
END
