"""Training steps: recomputed activations, waits of the host, compilation, and accumulated batches."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from models import build_model
from models.classification import Totals
from run.kernels import compile_model
from tests import two_processes
from tests.conftest import TINY
from tests.forked import run_on_several
from tests.operators import Recorder
from tests.small import FLAGS, build_small

IMAGES = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]


def make_targets(device: str = "cpu") -> list[dict[str, torch.Tensor]]:
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.4, 0.1, 0.3]], device=device)
    labels = torch.tensor([1, 3], device=device)
    masks = [torch.ones(n, *image.shape[1:], dtype=torch.uint8) for n, image in zip((2, 0), IMAGES, strict=True)]
    return [{"labels": labels[: len(m)], "boxes": boxes[: len(m)], "masks": m.to(device)} for m in masks]


def total_loss(model, criterion, samples, targets) -> torch.Tensor:
    losses = criterion(model(samples), targets)
    return sum(losses[name] * weight for name, weight in criterion.weight_dict.items() if name in losses)


@pytest.mark.parametrize("more", [(), ("--masks",)])
def test_checkpointed_activations_give_the_same_gradients(more, parse):
    args = parse(*FLAGS, "--dropout", 0.3, *more)
    results = []
    for args.checkpoint_activations in (False, True):
        torch.manual_seed(0)
        model, criterion, _ = build_model(args)
        torch.manual_seed(1)
        loss = total_loss(model, criterion, IMAGES, make_targets())
        with Recorder() as recorder:
            loss.backward()
        assert ("native_layer_norm" in recorder.names) == args.checkpoint_activations  # of a second forward pass
        results.append((loss, {key: p.grad for key, p in model.named_parameters() if p.requires_grad}))
    assert_close(*results, rtol=0, atol=0)
    with torch.no_grad():
        model.eval()(IMAGES)
    copy.deepcopy(model)


@pytest.mark.parametrize("more", [(), ("--masks",)])
def test_the_host_reads_no_value_in_a_step(more):
    model, criterion = build_small(*more)
    model.train()
    with Recorder() as recorder:
        total_loss(model, criterion, IMAGES, make_targets()).backward()
    assert recorder.count_waits() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("more", [(), ("--masks",)])
def test_the_host_waits_for_a_gpu_once_per_step(more):
    model, criterion = build_small(*more)
    model.train()
    model.cuda()
    samples, targets = [image.cuda() for image in IMAGES], make_targets("cuda")
    total_loss(model, criterion, samples, targets).backward()  # initialises libraries
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            total_loss(model, criterion, samples, targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in waits if "synchroniz" in str(w.message)]) == 1


def test_the_model_compiles_as_one_graph():
    model, _ = build_small("--enc_layers", 1, "--dec_layers", 2)
    keys = list(model.state_dict())
    with torch.no_grad():
        expected = [model(samples) for samples in (IMAGES, IMAGES[:1])]
    model.compile(fullgraph=True, backend="aot_eager")
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        for samples, outputs in zip((IMAGES, IMAGES[:1]), expected, strict=True):
            assert_close(model(samples), outputs, rtol=0, atol=1e-4)
    model.train()(IMAGES)["pred_boxes"].sum().backward()


def test_one_compilation_serves_images_of_all_sizes():
    model, _ = build_small("--enc_layers", 1, "--dec_layers", 2)
    keys = list(model.state_dict())
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    sizes = [((96, 160), (64, 64)), ((128, 224), (96, 96)), ((160, 320), (160, 96)), ((192, 128), (64, 128))]
    batches = [[torch.rand(3, *size) for size in of_batch] for of_batch in sizes]
    alike = [[image] * 2 for image, _ in batches]
    with torch.no_grad():
        expected = [model(samples) for samples in batches + alike]
    compile_model(model, fullgraph=True, backend=backend)
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        for samples, outputs in zip(batches + alike, expected, strict=True):
            assert_close(model(samples), outputs, rtol=0, atol=1e-4)
    assert len(compiled) == 2  # with padding, and without
    model.train()(batches[0])["pred_boxes"].sum().backward()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_compiled_code_gives_the_same_outputs():
    model, _ = build_small("--enc_layers", 1, "--dec_layers", 2)
    with torch.no_grad():
        expected = model(IMAGES)
        compile_model(model)
        assert_close(model(IMAGES), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("processes", "more"), [(1, ()), (1, ("--model", "detr")), (1, ("--masks",)), (2, ())])
def test_accumulated_batches_give_the_gradients_of_one_large_batch(processes, more, parse, tmp_path, meeting):
    """Images have one size and different numbers of boxes; norms are frozen, and there is no dropout."""
    found = []
    for accum_steps in (1, 2):
        args = parse(*FLAGS, *more, "--dropout", 0, "--accum_steps", accum_steps, "--clip_max_norm", 0)
        output = tmp_path / str(accum_steps)
        output.mkdir()
        arguments = (processes, meeting(), args, output)
        run_on_several(two_processes.step, arguments, processes)
        found.append(torch.load(output / f"{processes}-0.pth"))
    whole, accumulated = found
    for name, value in whole["stats"].items():
        if "error" not in name:  # a mean over batches, which have different numbers of boxes
            assert accumulated["stats"][name] == pytest.approx(value, rel=1e-5), name
    for name, gradient in whole["gradients"].items():
        assert_close(accumulated["gradients"][name], gradient, rtol=1e-4, atol=1e-5)


def test_each_process_divides_the_cross_entropy_of_detr_by_its_own_weights(parse, tmp_path, meeting):
    """Losses of boxes are divided by the mean number of targets per process. Then, gradients are averaged."""
    boxes = (1, 0, 3, 5)  # the processes have 4 and 5 of them
    args = parse(*TINY, "--model", "detr", "--backbone_norm", "frozen", "--backbone_weights", "x", "--dropout", 0)
    run_on_several(two_processes.step, (2, meeting(), args, tmp_path, boxes), 2)
    first, second = (torch.load(tmp_path / f"2-{rank}.pth") for rank in range(2))

    model, criterion = two_processes.random_model(args, seed=0)
    images, targets = two_processes.images_and_targets(boxes)
    weights = torch.tensor([1.0] * 91 + [0.1])
    cross_entropies = []
    for rank in range(2):
        share, own = images[rank::2], targets[rank::2]
        outputs = model(share)
        losses = criterion(outputs, own, Totals(torch.tensor(4.5), [len(target["labels"]) for target in own]))
        for suffix, layer in (("", outputs), ("_0", outputs["aux_outputs"][0])):
            classes = torch.full((2, 8), 91)
            for image, (queries, rows) in enumerate(criterion.matcher(layer, own)):
                classes[image, queries] = own[image]["labels"][rows]
            losses["loss_ce" + suffix] = F.cross_entropy(layer["pred_logits"].transpose(1, 2), classes, weights)
        sum(losses[name] * weight / 2 for name, weight in criterion.weight_dict.items()).backward()
        cross_entropies.append(losses["loss_ce"].item())
    assert abs(cross_entropies[0] - cross_entropies[1]) > 1e-3
    for found in (first, second):
        assert found["stats"]["loss_ce_unscaled"] == pytest.approx(sum(cross_entropies) / 2, rel=1e-6)
        for name, gradient in found["gradients"].items():
            assert_close(gradient, model.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
