"""Models as folders of Hugging Face transformers: `config.json`, `preprocessor_config.json` and `model.safetensors`.

These are plain files, so transformers itself is not needed. Folders of versions 4 and 5 can be read; folders written
here load in both, except for learned positions, which version 4 stores under another name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints.checkpoint_schema import flags as check_flags
from checkpoints.checkpoint_schema import weights as check_weights
from checkpoints.huggingface_names import their_modules, to_ours, to_theirs
from checkpoints.safetensors_file import read_tensors, write_tensors
from checkpoints.schema import either, from_json, integer, label, shown, table_of, text
from checkpoints.torch_file import load_file
from checkpoints.weight_flags import of_detector
from datasets.classes import Classes
from models.backbone import CHANNELS, DEPTHS
from models.detector import IMAGENET_MEAN, IMAGENET_STD
from util.errors import InputError, reason
from util.files import check_is_file, replacing

Json = dict[str, Any]

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS, OLD_WEIGHTS = "model.safetensors", "pytorch_model.bin"
# Fields of config.json and the corresponding flags.
SIZES = {
    "d_model": "hidden_dim",
    "encoder_layers": "enc_layers",
    "decoder_layers": "dec_layers",
    "encoder_attention_heads": "nheads",
    "decoder_attention_heads": "nheads",
    "encoder_ffn_dim": "dim_feedforward",
    "decoder_ffn_dim": "dim_feedforward",
    "num_queries": "num_queries",
}
# Fields with a single supported value. With auxiliary_loss, their decoder normalises the input of all later layers.
FIXED = {"num_channels": 3, "activation_function": "relu", "auxiliary_loss": False}
FIXED_RESNET = {
    "embedding_size": 64,
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}
FIXED_PREPROCESSOR = {
    "do_resize": True,
    "resample": 2,  # bilinear
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(IMAGENET_MEAN),
    "image_std": list(IMAGENET_STD),
}
BASIC = {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}
BOTTLENECK = {"layer_type": "bottleneck", "hidden_sizes": [256, 512, 1024, 2048]}
RESNETS: dict[str, dict[str, Any]] = {
    name: {"depths": list(depths)} | (BASIC if CHANNELS[name] == 512 else BOTTLENECK) for name, depths in DEPTHS.items()
}
MOST_BYTES = 2**24  # of a JSON file
CLASSES = {"conditional_detr": "ConditionalDetr", "detr": "Detr"}  # prefixes of transformers' class names
BOXES_WITHOUT_REFERENCE = "transformers' ConditionalDetrForSegmentation leaves the reference points out of its boxes"
NO_CLASS = "N/A"  # name of labels without a class


def write_folder(folder: Path, weights: dict[str, Tensor], args: argparse.Namespace, classes: Classes) -> None:
    """Write a model as a folder that `from_pretrained` loads.

    Args:
        folder: absent or empty.
        weights: the weights of the model, under our names.
        args: all flags of the model.
        classes: the classes of its labels.

    Raises:
        InputError: if transformers does not support the model, or the folder cannot be written.
    """
    if args.model == "conditional_detr" and args.dec_layers < 2:
        raise InputError(
            "a model of one decoder layer has no query_scale, which transformers' models always have; "
            "use --to safetensors or --to checkpoint"
        )
    if args.masks:
        check_mask_head(args)
    depths = None if args.dilation else RESNETS[args.backbone]["depths"]
    modules = their_modules(args.enc_layers, args.dec_layers, depths, args.model, args.masks)
    tensors = to_theirs(weights, modules)
    write_tensors(folder / WEIGHTS, tensors, {})
    write_json(folder / PREPROCESSOR, preprocessor_of(args))
    num_classes = len(of_detector(weights)["class_embed.bias"]) - (args.model == "detr")  # without "no object"
    write_json(folder / CONFIG, config_of(args, classes, num_classes))  # last, since it marks the folder as complete


def read_folder(folder: Path) -> dict[str, Any]:
    """Return the contents of a folder of transformers as a checkpoint: `model`, `args`, `class_ids`, `class_names`.

    Raises:
        InputError: if its model is unknown or not supported here, or a file is damaged.
    """
    if not (folder / CONFIG).exists():
        raise InputError(
            f"{folder}: a folder, but not of a Hugging Face model ({CONFIG} is missing); {_files_to_name(folder)}"
        )
    config = read_json(folder / CONFIG)
    preprocessor = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).exists() else {}
    flags, depths = flags_of(config, folder / CONFIG)
    flags |= image_sizes_of(preprocessor, folder / PREPROCESSOR)
    flags = check_flags(flags, f"{folder}: args")
    tensors = check_weights(read_weights(folder), f"{folder}: weights")
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    flags["masks"] = any(key.startswith("mask_head.") for key in tensors)
    if flags["masks"] and flags["model"] == "conditional_detr":
        raise InputError(f"{folder}: {BOXES_WITHOUT_REFERENCE}; no model here computes the same")
    modules = their_modules(flags["enc_layers"], flags["dec_layers"], depths, flags["model"], flags["masks"])
    return {"model": to_ours(tensors, modules, flags["model"]), "args": flags} | classes_of_config(
        config, folder / CONFIG
    )


def check_mask_head(args: argparse.Namespace) -> None:
    """Raise InputError for a model with masks that transformers cannot build, or for which it returns other boxes."""
    dim, heads = args.hidden_dim, args.nheads
    if args.model == "conditional_detr":
        raise InputError(f"{BOXES_WITHOUT_REFERENCE}, which would be wrong; use --to safetensors or --to checkpoint")
    if heads % 8 or (dim not in (16, 32, 64) and dim % 128):
        raise InputError(
            "transformers' mask heads need --nheads to be a multiple of 8, and --hidden_dim to be 16, 32, 64 or a "
            f"multiple of 128, so that their norms have groups of equal size; this model's are {heads} and {dim}"
        )


def _files_to_name(folder: Path) -> str:
    """Return advice for a folder that is named instead of a file: its checkpoints, checkpoint.pth first."""
    files = sorted(folder.glob("*.pth"), key=lambda path: (path.stem != "checkpoint", path.stem != "checkpoint_best"))
    files += [path for path in sorted(folder.glob("*.safetensors")) if path.name != WEIGHTS]
    return f"name a file in it: {', '.join(map(str, files[:2]))}" if files else "name a file"


def config_of(args: argparse.Namespace, classes: Classes, num_classes: int) -> Json:
    """Return the config.json of a model; DC5 uses timm's ResNet, since transformers' ResNet has no dilation."""
    names = {label: classes.names.get(label, NO_CLASS) for label in range(num_classes)}
    config = {
        "architectures": [f"{CLASSES[args.model]}{'ForSegmentation' if args.masks else 'ForObjectDetection'}"],
        "model_type": args.model,
        **FIXED,
        **{field: getattr(args, flag) for field, flag in SIZES.items()},
        "position_embedding_type": args.position_embedding,
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), args.dropout),
        "dilation": args.dilation,
        "use_timm_backbone": args.dilation,
        "use_pretrained_backbone": False,
        "backbone": args.backbone if args.dilation else None,
        "backbone_config": None if args.dilation else resnet_of(args.backbone, args.masks),
        "id2label": names,
        "label2id": {name: label for label, name in names.items()},
    }
    if any(label != class_id for label, class_id in classes.ids.items()):
        config["category_ids"] = classes.ids  # our own field, which transformers preserves
    if classes.isthing:
        config["category_isthing"] = classes.state_dict()["class_isthing"]  # another one
    return config


def resnet_of(name: str, all_stages: bool) -> Json:
    """Return the backbone_config of transformers' own ResNet, which outputs all stages or only the last one."""
    stages = [1, 2, 3, 4] if all_stages else [4]
    outputs = {"out_features": [f"stage{i}" for i in stages], "out_indices": stages}
    return {"model_type": "resnet", **RESNETS[name], **FIXED_RESNET, **outputs}


def preprocessor_of(args: argparse.Namespace) -> Json:
    """Return the preprocessor_config.json of a model."""
    return {
        "image_processor_type": f"{CLASSES[args.model]}ImageProcessor",
        "format": "coco_detection",
        **FIXED_PREPROCESSOR,
        "size": {"shortest_edge": args.min_size, "longest_edge": args.max_size},
        "do_pad": True,
    }


def flags_of(config: Json, path: Path) -> tuple[dict[str, Any], list[int] | None]:
    """Return the flags of a config.json's model, and the depths of transformers' own ResNet (None: timm's ResNet)."""
    model = config.get("model_type")
    if not isinstance(model, str) or model not in CLASSES:
        raise InputError(f"{path}: model_type is {config_text(model)}, not {' or '.join(CLASSES)}")
    check_fixed(config, FIXED, path)
    flags: dict[str, Any] = {}
    for field, flag in SIZES.items():
        value = config.get(field)
        if type(value) is not int or value < 0:
            raise InputError(f"{path}: {field} is {config_text(value)}, not a number")
        if flags.setdefault(flag, value) != value:
            raise InputError(f"{path}: {field} is {value} and the encoder's {flags[flag]}; they must be equal here")
    flags["position_embedding"] = config.get("position_embedding_type", "sine")
    backbone, depths = backbone_of(config, path)
    return flags | backbone | {"model": model, "backbone_norm": "frozen"}, depths


def backbone_of(config: Json, path: Path) -> tuple[dict[str, Any], list[int] | None]:
    """Return the flags of a config.json's backbone, and the depths of transformers' own ResNet (None: timm's)."""
    backbone = config.get("backbone_config")
    if backbone is None and config.get("use_timm_backbone", True):  # version 4
        backbone = {"model_type": "timm_backbone", "backbone": config.get("backbone")}
        backbone["output_stride"] = 16 if config.get("dilation") else 32
    elif not isinstance(backbone, dict):
        backbone = {}
    stages = backbone.get("out_indices")
    last_stage = stages[-1] in (4, -1) if isinstance(stages, list) and stages else stages is None
    if last_stage and backbone.get("model_type") == "timm_backbone":
        name = str(backbone.get("backbone")).removeprefix("timm/").split(".")[0]  # the suffix describes its training
        if name in CHANNELS and (stride := backbone.get("output_stride")) in (None, 16, 32):
            return {"backbone": name, "dilation": stride == 16}, None
    elif last_stage and backbone.get("model_type") == "resnet":
        check_fixed(backbone, FIXED_RESNET, path)
        for name, shape in RESNETS.items():
            if shape.items() <= backbone.items():
                return {"backbone": name, "dilation": False}, shape["depths"]
    raise InputError(f"{path}: its backbone is none of {', '.join(CHANNELS)}, plain or DC5")


def image_sizes_of(preprocessor: Json, path: Path) -> dict[str, int]:
    """Return the flags for image sizes of a preprocessor_config.json; if it is empty, the sizes of COCO's models."""
    check_fixed(preprocessor, FIXED_PREPROCESSOR, path)
    size = preprocessor.get("size") or 800
    if not isinstance(size, dict):  # the first versions
        size = {"shortest_edge": size}
    if (side := size.get("max_height")) and side == size.get("max_width"):  # images are scaled to fit into a square
        size = {"shortest_edge": side, "longest_edge": side}
    shortest = size.get("shortest_edge")
    longest = size.get("longest_edge") or preprocessor.get("max_size") or 1333
    if not type(shortest) is type(longest) is int:
        raise InputError(f"{path}: size is {config_text(size)}; images keep their proportions here: give shortest_edge")
    return {"min_size": shortest, "max_size": longest}


def classes_of_config(config: Json, path: Path) -> dict[str, dict]:
    """Return `class_ids`, `class_names` and `class_isthing` of a checkpoint; an empty dict if there are no names."""
    place = f"{path}: id2label, category_ids or category_isthing cannot be read: a table"
    names = table_of(label, text)(config.get("id2label") or {}, place)
    names = {label: name for label, name in names.items() if name != NO_CLASS}
    ids = table_of(label, either(text, integer(-(2**63))))(config.get("category_ids") or {}, place)
    isthing = table_of(label, integer(0, 1))(config.get("category_isthing") or {}, place)
    tables = {"class_ids": {label: ids.get(label, label) for label in names}, "class_names": names}
    return tables | ({"class_isthing": isthing} if isthing else {}) if names else {}


def config_text(value: Any) -> str:
    """Describe the value of a field, without quotes around texts."""
    return shown(value).strip("'")


def check_fixed(found: Json, fixed: Json, path: Path) -> None:
    """Raise InputError if a field does not have its only supported value."""
    for field, value in fixed.items():
        if found.get(field) not in (None, value):
            raise InputError(f"{path}: {field} is {config_text(found[field])}, only {value} is supported here")


def read_weights(folder: Path) -> Any:
    """Return the weights in a folder under transformers' names, unchecked."""
    if (folder / WEIGHTS).exists():
        return read_tensors(folder / WEIGHTS)[0]
    if not (folder / OLD_WEIGHTS).exists():
        raise InputError(f"{folder}: holds neither {WEIGHTS} nor {OLD_WEIGHTS}")
    return load_file(folder / OLD_WEIGHTS, folder / OLD_WEIGHTS)


def read_json(path: Path) -> Json:
    """Return the object in a JSON file. Raise InputError if it is damaged or contains no object."""
    check_is_file(path)
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes are too many for the description of a model")
        contents = from_json(path.read_text(encoding="utf-8"), f"{path}:")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from error
    if not isinstance(contents, dict):
        raise InputError(f"{path}: not a JSON object")
    return contents


def write_json(path: Path, contents: Json) -> None:
    with replacing(path) as file:
        file.write(json.dumps(contents, indent=2, ensure_ascii=False).encode())
