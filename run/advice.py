"""Warnings, before a training starts, about settings with which it would fail or learn little."""

from __future__ import annotations

from flags.resolve import Flags
from util.text import counted

RECIPE_IMAGES = 16  # images per step that the published learning rates are meant for
RECIPE_LR = 1e-4
# With fewer steps, a transformer from random weights learns almost nothing. Even the demo's model, with three layers
# and very easy data, needs this number per layer; COCO's recipe trains twelve layers for 370,000 steps. In
# scripts/convergence.sh, DETR reaches an AP of 0.1 after 900 steps, and Conditional DETR after 330.
STEPS_PER_LAYER = {"conditional_detr": 600, "detr": 1_600}
SHORT = 10_000  # steps from random weights; docs/log.md describes which settings improved the demo's 2,700 steps
MOST_DROPS = 6  # divisions of the learning rate by ten; float32 has seven digits


def lr_factor(flags: Flags, images: int) -> float:
    """Return the factor by which `--lr_scale` multiplies the learning rates, given the number of images per step."""
    exponent = {"none": 0, "sqrt": 0.5, "linear": 1}[flags.lr_scale]
    return (images / RECIPE_IMAGES) ** exponent


def advice(flags: Flags, images: int, steps: int, from_scratch: bool) -> list[str]:
    """Return warnings about a training, one line each, that say what to do instead.

    Args:
        flags: the flags of the run.
        images: the number of images per step, on all processes together.
        steps: the number of steps of the whole training.
        from_scratch: True if the transformer starts from random weights.
    """
    lines = []
    needed = STEPS_PER_LAYER[flags.model] * (flags.enc_layers + flags.dec_layers)
    if from_scratch and not flags.overfit and steps < needed:
        lines.append(
            f"{counted(steps, 'step is', 'steps are')} too few for a transformer from random weights (below "
            f"{needed:,} steps, expect an AP near 0): start from a trained model with "
            f"--finetune {suggested_start(flags)}, or raise --epochs"
        )
    elif from_scratch and not flags.overfit and steps < SHORT and flags.lr_schedule == "step":
        lines.append(
            f"{counted(steps, 'step is', 'steps are')} a short training from random weights, which reaches a higher AP "
            "with --lr_schedule linear, twice the learning rates, and --max_size equal to --min_size"
        )
    most = 2 if flags.model == "conditional_detr" else 4  # DETR was also published with 64 images per step
    if flags.lr == RECIPE_LR and flags.lr_scale == "none" and not 0.5 <= images / RECIPE_IMAGES <= most:
        scaled = RECIPE_LR * (images / RECIPE_IMAGES) ** 0.5
        lines.append(
            f"the learning rate {RECIPE_LR:g} is meant for {RECIPE_IMAGES} images per step, not {images}: "
            f"consider --lr_scale sqrt ({scaled:.2g})"
        )
    if flags.lr_schedule == "step" and (drops := (flags.epochs - 1) // flags.lr_drop) > MOST_DROPS:
        lines.append(
            f"--lr_drop {flags.lr_drop} divides the learning rate by ten {drops} times, so that the last epochs change "
            "nothing: raise it"
        )
    if flags.backbone_weights == "none" and flags.backbone_norm == "frozen" and from_scratch:
        lines.append("a backbone without pretrained weights hardly learns with frozen norms: add --backbone_norm batch")
    return lines


def suggested_start(flags: Flags) -> str:
    """Return the name of the published model with this backbone, or a placeholder if there is none."""
    if flags.backbone not in ("resnet50", "resnet101"):
        return "CHECKPOINT"
    return f"{flags.model}_{flags.backbone}{'_dc5' if flags.dilation else ''}"
