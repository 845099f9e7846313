"""Entries of torch.hub: they work in any folder, and without the libraries of training."""

import os
import subprocess
import sys

import pytest
import torch

import hubconf
from tests.conftest import ROOT
from tests.reference import DATA, reference_weights
from util.nested_tensor import nested_tensor_from_tensor_list

SCRIPT = """
import sys
for name in ("pycocotools", "matplotlib", "tqdm", "termcolor"):
    sys.modules[name] = None  # as if not installed
import torch
model, postprocess = torch.hub.load({repo!r}, "conditional_detr_resnet50", source="local", return_postprocessor=True)
outputs = model([torch.zeros(3, 64, 96, dtype=torch.uint8)])
assert set(outputs) == {{"pred_logits", "pred_boxes"}}
print(len(postprocess(outputs, torch.tensor([[64, 96]]))[0]["scores"]))
"""


def test_entries_work_in_any_folder_without_the_libraries_of_training(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(repo=str(ROOT))],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "100"


@pytest.mark.parametrize("entry", ["resnet50", "resnet50_dc5", "resnet101", "resnet101_dc5"])
@pytest.mark.parametrize(("name", "keys"), [("conditional_detr", ""), ("detr", "detr_")])
def test_entries_build_the_published_models(name, keys, entry):
    model = getattr(hubconf, f"{name}_{entry}")(num_classes=7)
    lines = (DATA / f"state_dict_keys_{keys}{entry.removesuffix('_dc5')}.txt").read_text().splitlines()
    assert list(model.state_dict()) == [line.split()[0] for line in lines]
    assert model.class_embed.out_features == 7 + (name == "detr")
    assert not model.training
    (features,), _ = model.backbone(nested_tensor_from_tensor_list([torch.zeros(3, 64, 64)]))
    assert features.tensors.shape[-1] == (4 if "dc5" in entry else 2)


@pytest.mark.parametrize("entry", ["conditional_detr_resnet50", "detr_resnet50_panoptic"])
def test_prepared_copies_predict_the_same(entry):
    model = getattr(hubconf, entry)()
    images = [torch.randint(256, (3, 64, 96), dtype=torch.uint8)]
    with torch.inference_mode():
        found, expected = model.prepared()(images), model(images)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("entry", ["resnet50", "resnet50_dc5", "resnet101"])
def test_panoptic_entries_predict_segments(entry):
    model, postprocess = getattr(hubconf, f"detr_{entry}_panoptic")(threshold=0, return_postprocessor=True)
    with torch.no_grad():
        outputs = model([torch.zeros(3, 64, 96, dtype=torch.uint8)])
    assert set(outputs) == {"pred_logits", "pred_boxes", "pred_masks"}
    assert outputs["pred_logits"].shape == (1, 100, 251)
    assert outputs["pred_masks"].shape == (1, 100, 16, 24)
    (result,) = postprocess(outputs, [(64, 96)], [(128, 192)])
    assert result["ids"].shape == (128, 192)
    assert result["png_string"].startswith(b"\x89PNG")
    if entry == "resnet50":
        keys = [
            line.split()[0] for line in (DATA / "state_dict_keys_detr_resnet50_panoptic.txt").read_text().splitlines()
        ]
        assert sorted(model.state_dict()) == sorted(keys)


def test_pretrained_weights_come_from_the_published_address(tmp_path, monkeypatch):
    asked = []
    weights = reference_weights(hubconf.conditional_detr_resnet50().state_dict())

    def download(url, target, **_):
        asked.append(url)
        torch.save({"model": weights}, target)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    model = hubconf.conditional_detr_resnet50_dc5(pretrained=True)
    assert torch.equal(model.query_embed.weight, weights["query_embed.weight"])
    assert asked == [
        "https://github.com/DeppMeng/ConditionalDETR/releases/download/v1.0/ConditionalDETR_r50dc5_epoch50.pth"
    ]
    with pytest.raises(ValueError, match="num_classes=7"):
        hubconf.conditional_detr_resnet50(pretrained=True, num_classes=7)


NEIGHBOUR = """
import sys
sys.path.insert(0, {project!r})
import models, models.net, util.misc
import torch
sys.path.insert(0, {repo!r})
module = torch.hub._import_module("hubconf.py", {repo!r} + "/hubconf.py")
sys.path.remove({repo!r})
entries = [name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")]
expected = [f"{{model}}_resnet{{variant}}" for model in ("conditional_detr", "detr")
            for variant in ("101", "101_dc5", "50", "50_dc5")]
expected += [f"detr_resnet{{variant}}_panoptic" for variant in ("101", "50", "50_dc5")]
assert entries == sorted(expected), entries
for _ in range(2):
    model, postprocess = torch.hub.load({repo!r}, "conditional_detr_resnet50", source="local",
                                        return_postprocessor=True)
import copy
outputs = copy.deepcopy(model)([torch.zeros(3, 64, 96, dtype=torch.uint8)])
assert len(postprocess(outputs, torch.tensor([[64, 96]]))[0]["scores"]) == 100
assert models.net.NAME == "theirs" and {repo!r} not in sys.path
import datasets.later, models.later, util.later
assert datasets.later.NAME == models.later.NAME == util.later.NAME == "theirs"
for name, module in sys.modules.items():
    if name.partition(".")[0] in ("models", "util", "datasets"):
        assert {project!r} in str(getattr(module, "__file__", None) or list(module.__path__)), name
print("untouched")
"""


def test_entries_work_next_to_packages_of_the_same_names(tmp_path):
    project = tmp_path / "project"
    for package in ("models", "util", "datasets"):
        (project / package).mkdir(parents=True)
        (project / package / "__init__.py").touch()
        for name in ("net", "misc", "later"):
            (project / package / f"{name}.py").write_text("NAME = 'theirs'")
    program = NEIGHBOUR.format(project=str(project), repo=str(ROOT))
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["untouched"], done.stderr


IMPORTS = """
import atexit, os, signal, sys, threading, warnings
import matplotlib, multiprocessing, torch
from PIL import Image, ImageFile
def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    settings = [dict(os.environ), list(warnings.filters), threading.active_count(), atexit._ncallbacks(),
                torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.random.initial_seed(),
                matplotlib.get_backend(), multiprocessing.get_start_method(allow_none=True),
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES]
    return handlers, settings
import hotcoco, matplotlib.figure, pycocotools.coco, scipy.optimize, torch._dynamo, torch.utils.checkpoint
import torch.distributed.elastic.multiprocessing.errors, torchvision.io, torchvision.transforms.v2
before = state()
import datasets, datasets.build, main, models, engine
after = state()
assert before == after, [pair for pair in zip(before[1], after[1]) if pair[0] != pair[1]]
print("unchanged")
"""


def test_imports_change_nothing_in_the_importing_program():
    done = subprocess.run([sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["unchanged"], done.stderr


WINDOWS = """
import os, signal, sys
import matplotlib.figure, pycocotools.coco, hotcoco, scipy.optimize, torch, torchvision.transforms.v2, tqdm
import torch.distributed.elastic.multiprocessing.errors
for module, names in ((signal, ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGKILL", "pthread_sigmask")),
                      (os, ("sched_getaffinity", "register_at_fork", "getpgid", "killpg"))):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
for name in ("fcntl", "resource", "pwd", "termios"):
    sys.modules[name] = None
sys.modules["msvcrt"] = type(sys)("msvcrt")
sys.platform = "win32"
import main
args = main.get_args_parser().parse_args(["--num_workers", "auto"])
print("imported", args.num_workers > 0)
"""


def test_main_can_be_imported_where_signals_and_modules_of_unix_are_missing():
    """Imitate Windows; other libraries are imported before the names of Unix are removed."""
    done = subprocess.run([sys.executable, "-c", WINDOWS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-2:] == ["imported", "True"], done.stderr
