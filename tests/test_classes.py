"""Category ids of any kind: labels where they are small, numbered otherwise, and the same in every file of a run."""

import json

import pytest
from PIL import Image

from datasets.coco import CocoDetection
from datasets.transforms import make_coco_transforms
from util.classes import COCO_NAMES, COCO_NUM_CLASSES, Classes
from util.errors import InputError


def categories(*ids) -> list[dict]:
    return [{"id": class_id, "name": f"name of {class_id}"} for class_id in ids]


def write(folder, ids, used) -> CocoDetection:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (20, 20)).save(folder / "a.png")
    annotation = {"id": 1, "image_id": 1, "category_id": used, "bbox": [1, 1, 5, 5]}
    data = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [annotation], "categories": categories(*ids)}
    (folder / "a.json").write_text(json.dumps(data))

    def load(classes=None):
        return CocoDetection(folder, folder / "a.json", make_coco_transforms("val"), classes=classes)

    return load


@pytest.mark.parametrize(
    ("ids", "labels"),
    [
        ((1, 2, 90), (1, 2, 90)),
        ((0, 7), (0, 7)),
        ((5, 1999), (5, 1999)),
        ((5, 2000), (0, 1)),
        ((3, -1), (1, 0)),
        ((2**70, 10**9), (1, 0)),
        (("dog", "cat"), (1, 0)),
        (("2", 10, 9), (2, 1, 0)),
    ],
)
def test_labels(ids, labels):
    classes = Classes.from_categories(categories(*ids))
    assert classes.ids == dict(zip(labels, ids, strict=True))
    assert all(classes.name_of(label) == f"name of {class_id}" for label, class_id in classes.ids.items())
    assert classes.num_labels == max(labels) + 1


def test_another_file_has_the_same_labels():
    numbered = Classes.from_categories(categories("cat", "dog"))
    assert numbered.of_categories(categories("dog")).ids == {1: "dog"}
    assert numbered.of_categories(categories(7, "dog", "cow")).ids == {2: 7, 1: "dog", 3: "cow"}
    plain = Classes.from_categories(categories(1, 3))
    assert plain.of_categories(categories(3, 9, "cow")).ids == {3: 3, 9: 9, 4: "cow"}


def test_names_that_contradict():
    """As of a COCO model that is to be evaluated on other classes with the same ids."""
    cells = Classes.from_categories([{"id": 1, "name": "WBC"}, {"id": 3, "name": "car"}, {"id": 12, "name": "new"}])
    coco = Classes.from_checkpoint({}, COCO_NUM_CLASSES)
    assert cells.named_otherwise(coco) == ["id 1 is WBC here and person there"]
    assert not cells.named_otherwise(Classes.from_checkpoint({}, 13))
    assert not coco.named_otherwise(coco)


def test_classes_of_checkpoints():
    coco = Classes.from_checkpoint({}, COCO_NUM_CLASSES)
    assert coco.names == COCO_NAMES
    assert len(COCO_NAMES) == 80
    assert coco.ids == {label: label for label in COCO_NAMES}
    assert Classes.from_checkpoint({}, 3).names == {0: "0", 1: "1", 2: "2"}
    mine = Classes.from_categories(categories("cat", 5))
    assert Classes.from_checkpoint(mine.state_dict(), 9) == mine


def test_a_data_set_with_texts_for_ids(tmp_path):
    load = write(tmp_path / "train", ["dog", "cat"], used="dog")
    assert load()[0][1]["labels"].tolist() == [1]
    assert [entry["category_id"] for entry in load().coco.anns.values()] == [1]
    val = write(tmp_path / "val", ["cow", "dog"], used="dog")
    assert val(load().classes)[0][1]["labels"].tolist() == [1]


def test_a_class_that_the_model_does_not_know(tmp_path):
    known = write(tmp_path / "train", ["dog", "cat"], used="dog")().classes
    val = write(tmp_path / "val", ["cow", "dog"], used="cow")(known)
    with pytest.raises(InputError, match=r"category id cow \(name of cow\) does not fit the class head of 2 logits"):
        val.check_classes(known.num_labels)
