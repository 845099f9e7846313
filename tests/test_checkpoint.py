"""Checkpoints: they are written atomically, found again, and refused if they contain code or do not fit."""

import argparse
import functools
import http.server
import os
import resource
import threading

import pytest
import torch

from checkpoints.backbone_weights import load_backbone_weights
from checkpoints.checkpoint import (
    changed_flags,
    load_checkpoint,
    load_latest_checkpoint,
    load_model_weights,
    num_classes_of,
)
from flags.resolve import resolve
from models import build_model
from run.log_file import append_log, read_log, trim_log
from run.optim import build_optimizer, build_schedule, restore_optimizer
from run.start import with_model_flags
from util.errors import InputError
from util.files import download, save_on_master


class Malice:
    def __reduce__(self):
        return (open, ("executed", "w"))


class SystemCall:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def small(epoch: int = 0, **extra) -> dict:
    return {"model": {"class_embed.bias": torch.zeros(4)}, "epoch": epoch, "args": {"lr": 0.1}} | extra


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_round_trip(tmp_path):
    save_on_master(small(epoch=3), tmp_path / "new" / "c.pth")
    loaded = load_checkpoint(tmp_path / "new" / "c.pth")
    assert loaded["epoch"] == 3
    assert num_classes_of(loaded, "c.pth") == 4
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["c.pth"]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    save_on_master(small(epoch=1), tmp_path / "c.pth")
    with pytest.raises((AttributeError, TypeError)):
        save_on_master(small(bad=lambda: None), tmp_path / "c.pth")
    assert load_checkpoint(tmp_path / "c.pth")["epoch"] == 1


def test_a_full_disk_leaves_what_was_there(tmp_path):
    """A limit on the size of files stops a write in the middle, as a full disk does; /dev/full is always full."""
    latest, previous = tmp_path / "checkpoint.pth", tmp_path / "checkpoint_previous.pth"
    for epoch in (1, 2):
        save_on_master(small(epoch=epoch), latest, keep_old_as=previous)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(InputError, match=r"checkpoint.pth: cannot be written .*File too large.* before is intact"):
            save_on_master(small(epoch=3, much=torch.zeros(10**6)), latest, keep_old_as=previous)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == [latest.name, previous.name]
    assert [load_checkpoint(path)["epoch"] for path in (latest, previous)] == [2, 1]
    with pytest.raises(InputError, match=r"/dev/full: cannot be written .*No space left"):
        append_log("/dev/full", {"epoch": 0})


def test_published_checkpoints_hold_a_namespace(tmp_path):
    torch.save(small(args=argparse.Namespace(dilation=True, backbone="resnet50")), tmp_path / "c.pth")
    assert load_checkpoint(tmp_path / "c.pth")["args"] == {"dilation": True, "backbone": "resnet50"}


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save(small(bad=Malice()), path), "refused because it contains code"),
        (lambda path: torch.save(small(bad=SystemCall()), path), "refused because it contains code"),
        (lambda path: path.write_bytes(b"x\n"), "not a checkpoint, or a damaged one"),
        (lambda path: path.write_bytes(b"text"), "not a checkpoint, or a damaged one"),
        (lambda path: path.write_bytes(b""), "not a checkpoint, or a damaged one"),
        (lambda path: torch.save([1], path), "holds no 'model'"),
        (lambda path: None, "no such checkpoint"),
        (lambda path: path.mkdir(), "a folder, but not of a Hugging Face model"),
    ],
)
def test_unusable_files(write, message, tmp_path):
    write(tmp_path / "c.pth")
    with pytest.raises(InputError, match=message) as error:
        load_checkpoint(tmp_path / "c.pth")
    assert str(tmp_path / "c.pth") in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_a_truncated_file_is_refused(tmp_path):
    torch.save(small(), tmp_path / "c.pth")
    (tmp_path / "c.pth").write_bytes((tmp_path / "c.pth").read_bytes()[:-200])
    with pytest.raises(InputError, match="damaged"):
        load_checkpoint(tmp_path / "c.pth")


def test_latest_is_the_furthest_that_can_be_read(tmp_path):
    reports = []
    assert load_latest_checkpoint(tmp_path / "none") is None
    for epoch, name in ((9, "checkpoint0009"), (19, "checkpoint0019"), (15, "checkpoint")):
        save_on_master(small(epoch=epoch), tmp_path / f"{name}.pth")
    save_on_master(small(epoch=99), tmp_path / "checkpoint_best.pth")
    checkpoint, path = load_latest_checkpoint(tmp_path)
    assert (checkpoint["epoch"], path.name) == (19, "checkpoint0019.pth")
    (tmp_path / "checkpoint0019.pth").write_bytes(b"cut off")
    checkpoint, path = load_latest_checkpoint(tmp_path, reports.append)
    assert (checkpoint["epoch"], path.name) == (15, "checkpoint.pth")
    assert "checkpoint0019.pth" in reports[0]
    (tmp_path / "checkpoint.pth").write_bytes(b"cut off")
    assert load_latest_checkpoint(tmp_path, reports.append)[0]["epoch"] == 9
    (tmp_path / "checkpoint0009.pth").write_bytes(b"cut off")
    with pytest.raises(InputError, match="none of its checkpoints can be read; move them elsewhere"):
        load_latest_checkpoint(tmp_path, reports.append)


def test_the_previous_checkpoint_is_used_if_the_latest_is_missing(tmp_path):
    """This is the state between the two renames with which a checkpoint is written."""
    save_on_master(small(epoch=-1, step=3), tmp_path / "checkpoint_previous.pth")
    checkpoint, path = load_latest_checkpoint(tmp_path)
    assert (checkpoint["step"], path.name) == (3, "checkpoint_previous.pth")


def test_a_run_does_not_resume_from_the_best_checkpoint(tmp_path):
    save_on_master(small(epoch=7), tmp_path / "checkpoint_best.pth")
    assert load_latest_checkpoint(tmp_path) is None
    save_on_master(small(epoch=3), tmp_path / "checkpoint.pth")
    assert load_latest_checkpoint(tmp_path)[0]["epoch"] == 3


def test_the_log_has_only_whole_lines_of_earlier_epochs(tmp_path, capsys):
    log = tmp_path / "log.txt"
    assert read_log(log) == []
    for epoch in range(3):
        append_log(log, {"epoch": epoch, "train_loss": 0.1})
    trim_log(log, 3)
    assert capsys.readouterr().out == ""
    log.write_text(log.read_text() + '{"epoch": 3, "train_l')
    assert [entry["epoch"] for entry in read_log(log)] == [0, 1, 2]
    trim_log(log, 2)
    dropped = "1 line of epoch 2 and later and 1 line without the numbers of an epoch"
    assert f"log.txt: dropped {dropped}" in capsys.readouterr().out
    append_log(log, {"epoch": 2})
    assert [entry["epoch"] for entry in read_log(log)] == [0, 1, 2]


def test_urls(tmp_path):
    torch.save(small(epoch=4), tmp_path / "served.pth")
    assert load_checkpoint((tmp_path / "served.pth").as_uri())["epoch"] == 4
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert load_checkpoint(f"{address}/served.pth")["epoch"] == 4
        with pytest.raises(InputError, match=r"absent.pth: could not be downloaded .*404.*place the file at"):
            load_checkpoint(f"{address}/absent.pth")
        server.shutdown()
    assert load_checkpoint(f"{address}/served.pth")["epoch"] == 4  # kept from the first time
    for url in ("http://example.com/c.pth", "ftp://127.0.0.1/c.pth"):
        with pytest.raises(InputError, match="use https"):
            load_checkpoint(url)


def test_contradicting_flags_are_named_with_both_values(parse):
    args = parse("--dilation", "--nheads", 4)
    stored = {"args": {"dilation": False, "nheads": 8, "backbone": "resnet50"}}
    with pytest.raises(
        InputError, match="--dilation is True now, False in the checkpoint; --nheads is 4 now, 8 in the checkpoint"
    ):
        with_model_flags(resolve(args), stored, "c.pth")
    with_model_flags(resolve(parse()), stored, "c.pth")
    with_model_flags(resolve(args), {"args": {}}, "c.pth")
    with pytest.raises(InputError, match="--backbone_norm is batch now, frozen in the checkpoint"):
        with_model_flags(resolve(parse("--backbone_norm", "batch")), stored, "published.pth")
    assert changed_flags(parse("--lr", 1), {"args": {"lr": 0.1}}, ["lr"]) == ["--lr is 1.0 now, 0.1 in the checkpoint"]


def test_weights_that_do_not_fit(parse):
    model, _, _ = build_model(parse("--backbone", "resnet18", "--num_classes", 5))
    other, _, _ = build_model(parse("--backbone", "resnet18", "--num_classes", 7))
    with pytest.raises(
        InputError, match=r"class_embed.bias is \[5\] in the model, \[7\] in the file \(2 keys differ\)"
    ):
        load_model_weights(model, {"model": other.state_dict()}, "c.pth")
    with pytest.raises(InputError, match=r"is .* in the model, missing in the file"):
        load_model_weights(model, small(), "c.pth")
    with pytest.raises(InputError, match="no class head"):
        num_classes_of({"model": {}}, "c.pth")


def trained_model(parse, *flags):
    model, _, _ = build_model(parse("--backbone", "resnet18", "--enc_layers", 1, "--dec_layers", 2, *flags))
    optimizer = build_optimizer(model, 1e-4, 1e-5, 1e-4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def test_the_optimizer_keeps_its_moments_and_takes_the_learning_rates_of_this_run(parse):
    _, optimizer = trained_model(parse)
    saved = optimizer.state_dict()
    model, _, _ = build_model(parse("--backbone", "resnet18", "--enc_layers", 1, "--dec_layers", 2))
    fresh = build_optimizer(model, 3e-4, 3e-5, 1e-4)
    restore_optimizer(fresh, saved, "c.pth")
    assert [group["lr"] for group in fresh.param_groups] == [3e-4, 3e-5]
    for index, moments in saved["state"].items():
        assert torch.equal(fresh.state_dict()["state"][index]["exp_avg"], moments["exp_avg"])
    frozen, _, _ = build_model(parse("--backbone", "resnet18", "--lr_backbone", 0))
    with pytest.raises(InputError, match="use --lr_backbone 0 and --backbone_weights none in both runs or in neither"):
        restore_optimizer(build_optimizer(frozen, 1e-4, 0, 1e-4), saved, "c.pth")


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize(
    ("flags", "factors"),
    [
        (("--lr_drop", 2), [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001]),
        (("--lr_schedule", "linear", "--epochs", 8), [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    ],
    ids=["step", "linear"],
)
def test_the_schedule_continues_where_it_was(flags, factors, start, parse):
    flags = resolve(parse(*flags))

    def rates(first: int, last: int) -> list[float]:
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([{"params": [parameter], "lr": 3e-4}])
        schedule = build_schedule(optimizer, flags, start_epoch=first)
        seen = []
        for _ in range(first, last):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen

    assert rates(start, 8) == rates(0, 8)[start:]
    assert rates(0, 8) == pytest.approx([3e-4 * factor for factor in factors])


@pytest.mark.parametrize("name", ["c.pth", "model.safetensors", "folder/config.json", "backbone.pth"])
def test_named_pipes_are_refused_without_waiting(name, tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / name)
    source = tmp_path / name.split("/")[0]
    with pytest.raises(InputError, match=f"{name}: is a named pipe, not a file"):
        if name == "backbone.pth":
            load_backbone_weights(torch.nn.Module(), "resnet18", str(source))
        else:
            load_checkpoint(source)


def test_abandoned_downloads_are_removed(tmp_path):
    """Those that did not grow for an hour are removed; another process may be writing the others."""
    (tmp_path / "source.pth").write_bytes(b"whole")
    old, new, other = (tmp_path / f"{name}.partial" for name in ("c.pth.0a", "c.pth.0b", "d.pth.0c"))
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (0, 0))
    download((tmp_path / "source.pth").as_uri(), tmp_path / "c.pth", progress=False)
    assert (tmp_path / "c.pth").read_bytes() == b"whole"
    assert (old.exists(), new.exists(), other.exists()) == (False, True, True)
