"""With --tensorboard, the curves that TensorBoard reads are those of the log, also after interruptions."""

import shutil
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main
import training
from run.tensorboard import TensorBoard
from tests.conftest import TINY, log_lines
from tests.narrow import narrowed
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("narrow")

SHOWN = {"loss", "class_error", "loss_ce", "loss_bbox", "loss_giou"}
STEPS = [1, 11, 15, 25, 29, 39]  # with a point, in three epochs of 14 steps


def train(shapes, output, *more: object) -> None:
    flags = (*TINY, "--coco_path", shapes, "--output_dir", output, "--batch_size", 1, "--tensorboard", *more)
    main.main(main.get_args_parser().parse_args([str(flag) for flag in flags]))


def read(output, run: str) -> EventAccumulator:
    return EventAccumulator(str(output / "tensorboard" / run)).Reload()


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    points = [(point.step, point.value) for point in events.Scalars(tag)]
    assert points == sorted(points)
    assert len(dict(points)) == len(points)
    return dict(points)


def assert_as_logged(output) -> None:
    train, val = read(output, "train"), read(output, "val")
    lines = {line["epoch"] + 1: line for line in log_lines(output)}
    assert curve(train, "epochs/loss") == pytest.approx({n: line["train_loss"] for n, line in lines.items()})
    assert curve(train, "epochs/lr") == pytest.approx({n: line["train_lr"] for n, line in lines.items()})
    assert curve(val, "epochs/loss_ce") == pytest.approx({n: line["test_loss_ce"] for n, line in lines.items()})
    for group, key in (("coco", "test_coco_eval_bbox"), ("coco_masks", "test_coco_eval_masks")):
        for name, number in (("AP", 0), ("AP50", 1), ("AR_100", 8)):
            if expected := {n: line[key][number] for n, line in lines.items() if key in line}:
                assert curve(val, f"{group}/{name}") == pytest.approx(expected)


@pytest.fixture(scope="module")
def whole(shapes, tmp_path_factory):
    """Train for three epochs without interruption."""
    output = tmp_path_factory.mktemp("whole")
    with narrowed():
        train(shapes, output, "--epochs", 3, "--lr_drop", 2)
    return output


def test_curves_are_those_of_the_log(whole):
    assert_as_logged(whole)
    scalars = {run: set(read(whole, run).Tags()["scalars"]) for run in ("train", "val", "steps")}
    assert scalars["train"] == {f"epochs/{name}" for name in SHOWN | {"lr"}}
    assert scalars["steps"] == {f"steps/{name}" for name in SHOWN | {"lr"}}
    always = {f"coco/{name}" for name in ("AP", "AP50", "AP75", "AR_1", "AR_10", "AR_100")}
    by_size = {f"coco/A{kind}_{size}" for kind in "PR" for size in "SML"}
    epochs = {f"epochs/{name}" for name in SHOWN}
    assert epochs | always <= scalars["val"] <= epochs | always | by_size
    assert min(curve(read(whole, "val"), "coco/AR_100").values()) >= 0
    steps = curve(read(whole, "steps"), "steps/loss")
    assert list(steps) == STEPS
    assert max(steps.values()) > 1


def test_masks_have_curves_too(shapes, tmp_path):
    train(shapes, tmp_path, "--epochs", 1, "--masks")
    assert_as_logged(tmp_path)
    for run, group in (("train", "epochs"), ("val", "epochs"), ("steps", "steps")):
        assert {f"{group}/loss_mask", f"{group}/loss_dice"} <= set(read(tmp_path, run).Tags()["scalars"])
    val = read(tmp_path, "val")
    assert "coco_masks/AR_100" in val.Tags()["scalars"]


def test_numbers_of_other_evaluators_have_curves(tmp_path):
    with TensorBoard(tmp_path / "tensorboard", lambda evaluator: ()) as board:
        board.begin(0, 0)
        board.write_epoch(1, {"test_loss": 2.0, "test_PQ_all": {"pq": 0.5, "n": 3}}, None)
    assert set(read(tmp_path, "val").Tags()["scalars"]) == {"epochs/loss", "PQ_all/pq", "PQ_all/n"}


def test_pictures_show_the_same_images_after_every_evaluation(whole):
    events = read(whole, "val")
    names = events.Tags()["images"]
    assert len(names) == 4
    for name in names:
        pictures = events.Images(name)
        assert [picture.step for picture in pictures] == [1, 2, 3]
        assert pictures[0].width > 1.4 * pictures[0].height


def test_a_run_that_is_resumed_from_an_earlier_epoch_replaces_later_points(shapes, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    more = ("--resume", whole / "checkpoint0001.pth", "--lr_drop", 2, "--weight_decay", 0.1)
    train(shapes, tmp_path / "run", "--epochs", 3, *more)
    assert_as_logged(tmp_path / "run")
    assert [picture.step for picture in read(tmp_path / "run", "val").Images("images/000001.jpg")] == [1, 2, 3]
    assert list(curve(read(tmp_path / "run", "steps"), "steps/loss")) == STEPS


@pytest.mark.parametrize("before", ["append_log", "save_on_master"])
def test_an_epoch_that_was_interrupted_is_drawn_once(before, shapes, whole, tmp_path, monkeypatch):
    """The run stops after the curves and before the line of the log, or in the second epoch before its checkpoint."""
    original, calls = getattr(training, before), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == (2 if before == "append_log" else 3):
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(training, before, interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(shapes, tmp_path, "--epochs", 2, "--lr_drop", 2)
    monkeypatch.setattr(training, before, original)
    train(shapes, tmp_path, "--epochs", 2, "--lr_drop", 2, "--resume", "auto")
    assert_as_logged(tmp_path)
    expected = curve(read(whole, "steps"), "steps/loss")
    assert curve(read(tmp_path, "steps"), "steps/loss") == {step: expected[step] for step in STEPS[:4]}


def test_epochs_without_evaluation_have_no_points_of_val(shapes, tmp_path):
    train(shapes, tmp_path, "--epochs", 2, "--eval_every", 2)
    assert list(curve(read(tmp_path, "train"), "epochs/loss")) == [1, 2]
    assert list(curve(read(tmp_path, "val"), "coco/AP")) == [2]


def test_a_missing_package_or_output_folder_is_named(parse, monkeypatch, tmp_path):
    """The error comes before anything is read: the test has no data."""
    with pytest.raises(InputError, match="--tensorboard writes to --output_dir: add that flag"):
        main.main(parse(*TINY, "--tensorboard"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"--tensorboard needs tensorboard: pip install tensorboard"):
        main.main(parse(*TINY, "--tensorboard", "--output_dir", tmp_path))
