"""A training step: what it recomputes, when the host waits, and its compiled form."""

import copy
import shutil

import pytest
import torch
from torch.testing import assert_close

from models import build_model
from run.kernels import compile_model
from tests import two_processes
from tests.forked import run_on_several
from tests.operators import Recorder
from tests.small import FLAGS, build_small

IMAGES = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]


def make_targets(device: str = "cpu") -> list[dict[str, torch.Tensor]]:
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.3, 0.4, 0.1, 0.3]], device=device)
    labels = torch.tensor([1, 3], device=device)
    return [{"labels": labels[:n], "boxes": boxes[:n]} for n in (2, 0)]


def total_loss(model, criterion, samples, targets) -> torch.Tensor:
    losses = criterion(model(samples), targets)
    return sum(losses[name] * weight for name, weight in criterion.weight_dict.items())


def test_checkpointed_activations_give_the_same_gradients(parse):
    args = parse(*FLAGS, "--dropout", 0.3)
    results = []
    for args.checkpoint_activations in (False, True):
        torch.manual_seed(0)
        model, criterion, _ = build_model(args)
        torch.manual_seed(1)
        loss = total_loss(model, criterion, IMAGES, make_targets())
        with Recorder() as recorder:
            loss.backward()
        assert ("native_layer_norm" in recorder.names) == args.checkpoint_activations  # the forward pass once more
        results.append((loss, {key: p.grad for key, p in model.named_parameters() if p.requires_grad}))
    assert_close(*results, rtol=0, atol=0)
    with torch.no_grad():
        model.eval()(IMAGES)
    copy.deepcopy(model)


def test_the_host_reads_no_value_in_a_step():
    model, criterion = build_small()
    model.train()
    with Recorder() as recorder:
        total_loss(model, criterion, IMAGES, make_targets()).backward()
    assert recorder.count_waits() == 0


@pytest.mark.gpu
def test_the_host_waits_for_a_gpu_once_a_step():
    model, criterion = build_small()
    model.train()
    model.cuda()
    samples, targets = [image.cuda() for image in IMAGES], make_targets("cuda")
    total_loss(model, criterion, samples, targets).backward()  # libraries initialise
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


@pytest.mark.parametrize("processes", [1, 2])
def test_accumulated_batches_are_one_large_batch(processes, parse, tmp_path, meeting):
    """Images of one size with different numbers of boxes, frozen norms, no dropout."""
    found = []
    for accum_steps in (1, 2):
        args = parse(*FLAGS, "--dropout", 0, "--accum_steps", accum_steps, "--clip_max_norm", 0)
        output = tmp_path / str(accum_steps)
        output.mkdir()
        arguments = (processes, meeting(), args, output)
        run_on_several(two_processes.step, arguments, processes)
        found.append(torch.load(output / f"{processes}-0.pth"))
    whole, accumulated = found
    for name, value in whole["stats"].items():
        if "error" not in name:  # means over images that differ in their number of boxes
            assert accumulated["stats"][name] == pytest.approx(value, rel=1e-5), name
    for name, gradient in whole["gradients"].items():
        assert_close(accumulated["gradients"][name], gradient, rtol=1e-4, atol=1e-5)
