"""Conversion to transformers, safetensors and checkpoints, and back: the models stay the same."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from checkpoints.checkpoint import load_checkpoint
from datasets.coco_names import COCO_NAMES
from main import get_args_parser
from main import main as run
from scripts.convert import main
from scripts.detector import load_detector
from tests.conftest import TINY
from tests.converting import OWN_CLASSES, save
from tests.reference import reference_images, reference_weights
from util.errors import InputError
from util.nested_tensor import nested_tensor_from_tensor_list

transformers = pytest.importorskip("transformers")

SAMPLES = nested_tensor_from_tensor_list(reference_images([(128, 160), (96, 192)], seed=3))
SMALL = ("--enc_layers", 1, "--dec_layers", 2, "--dim_feedforward", 64, "--num_queries", 20)
# The configuration of microsoft/conditional-detr-resnet-50 on the hub, with the sizes of a tiny model.
HUB_CONFIG = {
    **{"model_type": "conditional_detr", "architectures": ["ConditionalDetrForObjectDetection"]},
    **{"use_timm_backbone": True, "backbone": "resnet18", "dilation": False, "num_queries": 8, "d_model": 32},
    **{"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_hidden_layers": 1, "dropout": 0.1},
    **{"activation_function": "relu", "auxiliary_loss": False, "position_embedding_type": "sine", "max_length": 20},
    **{"id2label": {"0": "N/A", "1": "cat", "2": "N/A", "3": "dog"}, "label2id": {"N/A": 2, "cat": 1, "dog": 3}},
}
TIMM_STRIDE_8 = {"model_type": "timm_backbone", "backbone": "resnet18", "output_stride": 8}
HUB_PREPROCESSOR = {
    **{"do_normalize": True, "do_resize": True, "feature_extractor_type": "ConditionalDetrFeatureExtractor"},
    **{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "size": 640, "max_size": 900},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("tiny") / "c.pth", *TINY, num_classes=3, **OWN_CLASSES)


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    """A model for transformers, in a folder that existed and was empty."""
    (tmp_path / "folder").mkdir()
    main([str(tiny), str(tmp_path / "folder"), "--to", "transformers"])
    return tmp_path / "folder"


def outputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the outputs of one of our or their models for the padded batch."""
    with torch.inference_mode():
        if not isinstance(model, transformers.PreTrainedModel):
            return model(SAMPLES)
        outputs = model(pixel_values=SAMPLES.tensors, pixel_mask=(~SAMPLES.mask).long())
    return {"pred_logits": outputs.logits, "pred_boxes": outputs.pred_boxes}


def from_pretrained(folder: Path) -> transformers.PreTrainedModel:
    """Return their model of a folder, and check that the folder holds all of its weights and no others."""
    load = transformers.ConditionalDetrForObjectDetection.from_pretrained
    model, info = load(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(
    "flags",
    [
        ["resnet50"],
        pytest.param(["resnet50", "--dilation"], marks=pytest.mark.slow),
        pytest.param(["resnet101"], marks=pytest.mark.slow),
        pytest.param(["resnet101", "--dilation"], marks=pytest.mark.slow),
        ["resnet50", "--dilation", *SMALL],
        pytest.param(["resnet34", *SMALL], marks=pytest.mark.slow),
        ["resnet18", *SMALL, "--position_embedding", "learned", "--backbone_norm", "batch"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_to_transformers_and_back(flags, tmp_path):
    if "--dilation" in flags:
        pytest.importorskip("timm")
    source = save(tmp_path / "c.pth", "--backbone", *flags)
    main([str(source), str(tmp_path / "there"), "--to", "transformers"])
    theirs = from_pretrained(tmp_path / "there")
    expected = outputs_of(load_detector(str(source)).model)
    assert_close(outputs_of(theirs), expected, atol=1e-4, rtol=0)
    assert {i: name for i, name in theirs.config.id2label.items() if name != "N/A"} == COCO_NAMES
    assert theirs.config.label2id["toothbrush"] == 90

    theirs.save_pretrained(tmp_path / "theirs")
    back = load_detector(str(tmp_path / "theirs"))
    assert_close(outputs_of(back.model), expected, atol=1e-4, rtol=0)
    assert (back.args.backbone, back.args.dilation) == (flags[0], "--dilation" in flags)
    assert (back.classes.names, back.classes.ids) == (COCO_NAMES, {i: i for i in COCO_NAMES})


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_from_a_folder_of_the_hub(weights, tmp_path):
    """Keys and fields are those of version 4: transformers still reads both, and still writes the keys."""
    pytest.importorskip("timm")
    theirs = transformers.ConditionalDetrForObjectDetection(transformers.ConditionalDetrConfig(**HUB_CONFIG)).eval()
    theirs.load_state_dict(reference_weights(theirs.state_dict()))
    theirs.save_pretrained(tmp_path)
    if weights != "model.safetensors":
        tensors = pytest.importorskip("safetensors.torch").load_file(tmp_path / "model.safetensors")
        assert "model.backbone.conv_encoder.model.layer2.0.downsample.1.running_var" in tensors
        assert "model.decoder.layers.0.ca_qpos_sine_proj.weight" in tensors
        torch.save(tensors, tmp_path / weights)
        (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text(json.dumps(HUB_CONFIG))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(HUB_PREPROCESSOR))
    ours = load_detector(str(tmp_path))
    assert_close(outputs_of(ours.model), outputs_of(theirs), atol=1e-4, rtol=0)
    assert ours.classes.names == {1: "cat", 3: "dog"}
    assert (ours.args.min_size, ours.args.max_size) == (640, 900)


def test_from_a_folder_with_the_keys_of_current_modules(folder):
    theirs = from_pretrained(folder)
    assert "model.decoder.layers.1.encoder_attn.q_pos_sine_proj.weight" in theirs.state_dict()
    tensors = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    pytest.importorskip("safetensors.torch").save_file(tensors, folder / "model.safetensors")
    assert_close(outputs_of(load_detector(str(folder)).model), outputs_of(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("to", "name"), [("safetensors", "m.safetensors"), ("checkpoint", "m.pth")])
def test_files_hold_all_that_inference_needs(to, name, tiny, tmp_path):
    main([str(tiny), str(tmp_path / "new" / name), "--to", to])
    written, source = load_checkpoint(tmp_path / "new" / name), load_checkpoint(tiny)
    del source["epoch"]
    assert written.keys() == source.keys()
    assert_close(written.pop("model"), source.pop("model"), atol=0, rtol=0)
    assert written == source
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_class_ids_and_names_stay_when_transformers_saves_the_model(folder, tmp_path):
    theirs = from_pretrained(folder)
    assert theirs.config.id2label == OWN_CLASSES["class_names"]
    theirs.save_pretrained(tmp_path / "again")
    for path in (folder, tmp_path / "again"):
        classes = load_detector(str(path)).classes
        assert classes.state_dict() == OWN_CLASSES


def test_their_processor_resizes_images_as_for_our_model(tiny, folder):
    detector = load_detector(str(folder))
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in ((120, 90), (70, 110))]
    theirs = processor(images=images, return_tensors="pt")
    ours = nested_tensor_from_tensor_list([detector.resize(image) for image in images])
    expected = detector.model.normalize(ours.tensors, ours.mask)
    assert_close(theirs["pixel_values"], expected, atol=1e-5, rtol=0)
    assert torch.equal(theirs["pixel_mask"] == 0, ours.mask)

    outputs = from_pretrained(folder)(**theirs)
    sizes = torch.tensor([image.shape[1:] for image in images])
    found = processor.post_process_object_detection(outputs, threshold=0, target_sizes=sizes, top_k=24)
    for there, here in zip(found, load_detector(str(tiny))(images), strict=True):
        assert_close(there["scores"], here["scores"], atol=1e-4, rtol=0)
        assert_close(there["boxes"][:3], here["boxes"][:3], atol=1e-2, rtol=0)


def test_evaluation_takes_a_folder(shapes, tmp_path, capsys):
    """The conversion turns trained norms into frozen ones with the same values, so --backbone_norm has to change."""
    source, folder = save(tmp_path / "c.pth", *TINY, num_classes=4), tmp_path / "folder"
    main([str(source), str(folder), "--to", "transformers"])
    flags = [*TINY, "--coco_path", str(shapes), "--eval", "--resume", str(folder)]
    with pytest.raises(
        InputError, match=r"folder is of another model: --backbone_norm is batch now, frozen in the checkpoint"
    ):
        run(get_args_parser().parse_args(flags))
    run(get_args_parser().parse_args([*flags, "--backbone_norm", "frozen"]))
    assert f"loading {folder}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("config.json", {"model_type": "yolos"}, "model_type is yolos, not conditional_detr or detr"),
        ("config.json", {"backbone_config": {"model_type": "swin"}}, "its backbone is none of resnet18"),
        (
            "config.json",
            {"backbone_config": None, "use_timm_backbone": True, "backbone": "vit"},
            "its backbone is none",
        ),
        ("config.json", {"backbone_config": None}, "its backbone is none of"),
        ("config.json", {"backbone_config": TIMM_STRIDE_8}, "its backbone is none of"),
        ("config.json", {"decoder_attention_heads": 4}, "decoder_attention_heads is 4 and the encoder's 2"),
        ("config.json", {"d_model": "wide"}, "d_model is wide, not a number"),
        ("config.json", {"d_model": 64}, "does not fit the model"),
        ("config.json", {"auxiliary_loss": True}, "auxiliary_loss is True, only False is supported"),
        ("config.json", {"position_embedding_type": "fourier"}, "fourier: choose one of sine, learned"),
        ("config.json", {"id2label": ["cat"]}, "id2label, category_ids or category_isthing cannot be read"),
        ("config.json", {"decoder_layers": 3}, "does not fit the model"),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}, "image_mean is .* only .*0.485"),
        ("preprocessor_config.json", {"size": {"height": 640, "width": 640}}, "images keep their proportions"),
    ],
)
def test_a_folder_of_another_model_is_refused(file, fields, message, folder):
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))
    with pytest.raises(InputError, match=message):
        load_detector(str(folder))


@pytest.mark.parametrize(
    ("file", "contents", "message"),
    [
        ("config.json", b"{", "config.json: cannot be read"),
        ("config.json", b"[1]", "config.json: not a JSON object"),
        ("config.json", b"\xff\xfe\x00", "config.json: cannot be read"),
        ("preprocessor_config.json", b"", "preprocessor_config.json: cannot be read"),
        ("model.safetensors", b"", "not a safetensors file, or a damaged one"),
        ("model.safetensors", b"\x08" + bytes(7) + b"damaged!" + bytes(99), "not a safetensors file, or a damaged one"),
    ],
)
def test_damaged_files_are_named(file, contents, message, folder):
    (folder / file).write_bytes(contents)
    with pytest.raises(InputError, match=message):
        load_detector(str(folder))


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(InputError, match=r"the weights of a Hugging Face model; name its folder"):
        load_detector(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds neither model.safetensors nor pytorch_model.bin"):
        load_detector(str(folder))
    torch.save([1], folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"weights is a list of 1, not a dict"):
        load_detector(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"not of a Hugging Face model \(config.json is missing\)"):
        load_detector(str(folder))
    with pytest.raises(InputError, match=r"gone.safetensors: no such checkpoint"):
        load_detector(str(tmp_path / "gone.safetensors"))
