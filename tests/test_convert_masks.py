"""Conversion of models with masks to transformers' `DetrForSegmentation`, and back: the models stay the same."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from checkpoints.huggingface_names import name_in_files, their_modules, to_theirs
from main import get_args_parser
from main import main as run
from scripts.convert import main
from scripts.detector import load_detector
from tests.conftest import TINY
from tests.converting import save
from tests.reference import reference_images
from util.errors import InputError
from util.nested_tensor import nested_tensor_from_tensor_list

transformers = pytest.importorskip("transformers")

SAMPLES = nested_tensor_from_tensor_list(reference_images([(64, 96), (96, 70)], seed=3))
SAMPLES.tensors = SAMPLES.tensors.double()
MASKS = ("--masks", "--model", "detr", "--nheads", 8)
# The configuration of facebook/detr-resnet-50-panoptic on the hub, with the sizes of a tiny model.
HUB_CONFIG = {
    **{"model_type": "detr", "architectures": ["DetrForSegmentation"], "use_timm_backbone": True},
    **{"backbone": "resnet18", "dilation": False, "num_queries": 8, "d_model": 32, "dropout": 0.1},
    **{"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"encoder_attention_heads": 8, "decoder_attention_heads": 8, "activation_function": "relu"},
    **{"auxiliary_loss": False, "position_embedding_type": "sine", "num_channels": 3},
    **{"id2label": {str(i): f"LABEL_{i}" for i in range(250)}, "label2id": {f"LABEL_{i}": i for i in range(250)}},
}


def assert_same_outputs(theirs: transformers.PreTrainedModel, ours: torch.nn.Module) -> None:
    """Check logits, boxes and masks of all queries for the padded batch, in 64 bits."""
    theirs, ours = copy.deepcopy(theirs).double(), copy.deepcopy(ours).double()
    ours.all_masks = True
    with torch.inference_mode():
        found = theirs(pixel_values=SAMPLES.tensors, pixel_mask=(~SAMPLES.mask).long())
        expected = ours(SAMPLES)
    assert_close(found.logits, expected["pred_logits"], atol=1e-4, rtol=0)
    assert_close(found.pred_boxes, expected["pred_boxes"], atol=1e-4, rtol=0)
    assert_close(found.pred_masks, expected["pred_masks"], atol=1e-4, rtol=0)
    assert expected["pred_masks"].std(1).mean() > 0.01  # the masks of queries differ


def from_pretrained(folder: Path) -> transformers.PreTrainedModel:
    """Return their model of a folder, and check that the folder holds all of its weights and no others."""
    model, info = transformers.DetrForSegmentation.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


DILATED = ("--backbone", "resnet50", "--backbone_norm", "frozen", "--dilation")


@pytest.mark.parametrize("flags", [(), DILATED], ids=["plain", "DC5"])
def test_to_transformers_and_back(flags, tmp_path):
    if "--dilation" in flags:
        pytest.importorskip("timm")
    source = save(tmp_path / "c.pth", *TINY, *MASKS, *flags, num_classes=250, sharp=True)
    main([str(source), str(tmp_path / "there"), "--to", "transformers"])
    theirs = from_pretrained(tmp_path / "there")
    assert theirs.config.architectures == ["DetrForSegmentation"]
    assert (theirs.config.num_labels, theirs.config.id2label[200]) == (250, "rug-merged")
    detector = load_detector(str(source))
    assert_same_outputs(theirs, detector.model)

    theirs.save_pretrained(tmp_path / "theirs")
    main([str(tmp_path / "theirs"), str(tmp_path / "back.pth"), "--to", "checkpoint"])
    back = load_detector(str(tmp_path / "back.pth"))
    assert (back.args.masks, back.args.dilation) == (True, "--dilation" in flags)
    assert back.classes == detector.classes
    weights = torch.load(source, weights_only=True)["model"]
    for name, tensor in back.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name


def test_from_a_folder_of_the_hub(tmp_path):
    pytest.importorskip("timm")
    theirs = transformers.DetrForSegmentation(transformers.DetrConfig(**HUB_CONFIG)).eval()
    source = save(tmp_path / "c.pth", *TINY, *MASKS, "--backbone_norm", "frozen", num_classes=250, sharp=True)
    weights = torch.load(source, weights_only=True)["model"]
    in_files = to_theirs(weights, their_modules(1, 2, None, "detr", masks=True))
    theirs.load_state_dict({key: in_files[name_in_files(key, "detr")] for key in theirs.state_dict()})
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))
    ours = load_detector(str(tmp_path))
    assert_same_outputs(theirs, ours.model)
    assert ours.classes.names[184] == "LABEL_184"
    (found,) = ours([torch.zeros(3, 64, 96, dtype=torch.uint8)])
    assert len(found["codes"]) == len(found["scores"]) == 8

    tensors = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}  # with the keys of current modules
    assert "mask_head.fpn_stages.0.refine.conv.weight" in tensors
    pytest.importorskip("safetensors.torch").save_file(tensors, tmp_path / "model.safetensors")
    for name, tensor in load_detector(str(tmp_path)).model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    with pytest.raises(InputError, match=r"the weights of a Hugging Face model; name its folder"):
        load_detector(str(tmp_path / "model.safetensors"))


def test_evaluation_takes_a_folder(shapes, tmp_path, capsys):
    flags = (*TINY, *MASKS, "--backbone_norm", "frozen")
    source = save(tmp_path / "c.pth", *flags, num_classes=4)
    main([str(source), str(tmp_path / "folder"), "--to", "transformers"])
    capsys.readouterr()
    printed = []
    for resume in (source, tmp_path / "folder"):
        more = ["--coco_path", shapes, "--eval", "--resume", resume]
        run(get_args_parser().parse_args([*map(str, (*flags, *more))]))
        printed += [[line for line in capsys.readouterr().out.splitlines() if "Average" in line]]
    assert len(printed[0]) > 12
    assert printed[0] == printed[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--model", "conditional_detr"),
            "ConditionalDetrForSegmentation leaves the reference points out of its boxes",
        ),
        (("--nheads", 2), "--nheads to be a multiple of 8, .* this model's are 2 and 32"),
        (("--hidden_dim", 48), "--hidden_dim to be 16, 32, 64 or a multiple of 128, .* this model's are 8 and 48"),
    ],
)
def test_models_that_transformers_computes_differently_are_refused(flags, message, tmp_path):
    source = save(tmp_path / "c.pth", *TINY, *MASKS, *flags)
    with pytest.raises(InputError, match=message):
        main([str(source), str(tmp_path / "folder"), "--to", "transformers"])
    assert not (tmp_path / "folder").exists()


def test_their_conditional_detr_with_masks_is_refused(tmp_path):
    source = save(tmp_path / "c.pth", *TINY, "--nheads", 8)
    main([str(source), str(tmp_path / "folder"), "--to", "transformers"])
    config = transformers.ConditionalDetrConfig.from_pretrained(tmp_path / "folder")
    config.backbone_config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    transformers.ConditionalDetrForSegmentation(config).save_pretrained(tmp_path / "masks")
    with pytest.raises(InputError, match=r"masks: .*leaves the reference points out of its boxes; no model here"):
        load_detector(str(tmp_path / "masks"))
