"""Copies of models for predictions on CPUs: they compute the same, with weights that are packed only once."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import engine
from models.conditional_detr import ConditionalDETR
from models.folded_norms import FoldedBody, FoldedConv2d
from models.prepared import Prepared, prepare
from tests.folded import random_norms
from tests.small import build_small

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = [torch.randint(256, (3, *size), dtype=torch.uint8, generator=GENERATOR) for size in ((64, 96), (96, 70))]
MODELS = {
    "conditional_detr": (),
    "detr": ("--model", "detr"),
    "dilated": ("--backbone", "resnet50", "--dilation"),
    "masks": ("--masks",),
    "batch_norm": ("--backbone_norm", "batch", "--backbone_weights", "none"),
}
pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


def build(*flags: object) -> ConditionalDETR:
    model, _ = build_small(*flags)
    return random_norms(model).eval()


def detections(model: nn.Module, precision: torch.dtype = torch.float32) -> dict[str, Tensor]:
    with torch.inference_mode(), torch.autocast("cpu", precision, enabled=precision is not torch.float32):
        outputs = model(IMAGES)
        if "masks" in outputs:
            outputs["pred_masks"] = outputs["masks"].all()
    return {name: value for name, value in outputs.items() if torch.is_tensor(value)}


@pytest.mark.parametrize("flags", MODELS.values(), ids=MODELS)
def test_the_copy_computes_the_same(flags):
    model = build(*flags)
    fast = model.prepared()
    assert sum(isinstance(module, Prepared) for module in fast.modules()) > 20
    for _ in range(2):  # the second time with the weights that are kept
        assert_close(detections(fast), detections(model), rtol=0, atol=1e-4)
    expected = detections(model)
    for name, value in detections(fast, torch.bfloat16).items():
        rounded = detections(model, torch.bfloat16)[name]
        assert value.dtype == rounded.dtype
        assert (value - expected[name]).norm() <= 1.5 * (rounded - expected[name]).norm() + 1e-6
    assert_close(detections(fast), expected, rtol=0, atol=1e-4)  # both precisions are kept


def test_weights_are_folded_converted_and_packed_once(monkeypatch):
    fast = build().prepared()
    expected = detections(fast, torch.bfloat16)
    for owner, name in ((FoldedConv2d, "fold"), (FoldedBody, "norm_terms")):
        monkeypatch.setattr(owner, name, None)
    for packing in ("_reorder_linear_weight", "_reorder_convolution_weight"):
        monkeypatch.setattr(torch.ops.mkldnn, packing, None)
    assert_close(detections(fast, torch.bfloat16), expected, rtol=0, atol=0)


def test_the_copy_does_not_follow_changes():
    model = build()
    fast = model.prepared()
    before = detections(model)
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    assert_close(detections(fast), before, rtol=0, atol=1e-4)
    assert (detections(model)["pred_logits"] - before["pred_logits"]).abs().max() > 0.01
    assert model.training is False
    assert all(parameter.requires_grad for parameter in model.transformer.parameters())


def test_other_inputs_and_modes_use_the_plain_layers():
    model = build()
    fast = model.prepared()
    image = IMAGES[0][None].double() / 255
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(image)
        assert_close(copy.deepcopy(fast).double()(image)["pred_boxes"], expected["pred_boxes"])
        with torch.backends.mkldnn.flags(enabled=False):
            assert_close(fast(image.float())["pred_boxes"], model(image.float())["pred_boxes"])
        batch = torch.stack([image.float(), image.float() + 1])
        found = torch.func.vmap(lambda x: fast.input_proj(fast.backbone[0].body(x)["layer4"]))(batch)
        assert_close(found[1], model.input_proj(model.backbone[0].body(batch[1])["layer4"]), rtol=1e-3, atol=1e-3)
    x = image.float().requires_grad_()
    fast(x)["pred_boxes"].sum().backward()
    assert x.grad.abs().max() > 0


def test_transforms_and_fake_tensors_leave_nothing_behind():
    model = build()
    fast = model.prepared()
    states = {key: torch.stack([value, value * 1.1]) for key, value in fast.state_dict().items()}
    image = IMAGES[0][None] / 255
    with torch.no_grad():
        torch.func.vmap(lambda state: torch.func.functional_call(fast, state, (image,))["pred_boxes"])(states)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fast(torch.empty(1, 3, 64, 96))
    assert_close(detections(fast), detections(model), rtol=0, atol=1e-4)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):  # nor does it use what is kept
        assert fast(torch.empty(1, 3, 64, 96))["pred_boxes"].shape == (1, 7, 4)


def test_copies_and_files_leave_out_what_is_kept():
    fast = build().prepared()
    expected = detections(fast)
    file = io.BytesIO()
    torch.save(fast, file)
    assert file.tell() < 4.2 * sum(value.numel() for value in fast.state_dict().values())
    file.seek(0)
    for twin in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert_close(detections(twin), expected, rtol=0, atol=0)


def test_models_that_cannot_be_prepared_are_returned_themselves():
    model = build()
    handle = model.transformer.register_forward_hook(lambda *given: None)
    assert prepare(model) is model
    handle.remove()
    assert prepare(model) is not model
    meta = copy.deepcopy(model).to("meta")
    assert prepare(meta) is meta
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        assert prepare(wrapped) is wrapped
    finally:
        destroy_process_group()
    model.transformer.compile(backend="eager")
    assert prepare(model) is model


def test_evaluation_uses_the_copy():
    model, used = build(), []
    forward = ConditionalDETR.forward

    class Loader(list):
        dataset = None

    def watched(self, samples):
        used.append(self)
        return forward(self, samples)

    batches = Loader([(torch.zeros(1, 3, 64, 64), [{"image_id": torch.tensor(1)}])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConditionalDETR, "forward", watched)
        engine.detect(model, {}, batches, [], torch.device("cpu"))
    (fast,) = used
    assert fast is not model
    assert isinstance(fast.class_embed, Prepared)
