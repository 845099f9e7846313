"""Category ids of any kind: small ones are labels, others are numbered, and all files of a run have the same labels."""

import json

import pytest
from PIL import Image

from datasets.classes import Classes
from datasets.coco import CocoDetection
from datasets.coco_names import COCO_NAMES
from datasets.transforms import make_coco_transforms
from flags.resolve import NUM_CLASSES
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


def named(**names: int) -> list[dict]:
    return [{"id": class_id, "name": name} for name, class_id in names.items()]


def test_names_decide_where_files_number_classes_differently():
    train = Classes.from_categories(named(WBC=1, RBC=2, Platelets=3))
    permuted = train.of_categories(named(RBC=1, Platelets=2, wbc=3))
    assert permuted.ids == {1: 3, 2: 1, 3: 2}
    assert "3 classes have other ids than in the file (RBC is 1 instead of 2)" in permuted.difference(train)
    assert train.of_categories(named(RBC=1, Platelets=2)).ids == {2: 1, 3: 2}
    assert not train.of_categories(named(WBC=1, RBC=2)).difference(train)
    with pytest.raises(InputError, match=r"val.json: category id 1 is 'white cell', but 'WBC' in the file, and names"):
        train.of_categories(named(**{"white cell": 1}), "val.json")


def test_exact_names_decide_before_similar_ones():
    """Examples are letters, and digits whose names are the ids of other digits."""
    letters = Classes.from_categories(named(A=1, a=2))
    assert letters.of_categories(named(a=1, A=2)).ids == {2: 1, 1: 2}
    digits = Classes.from_categories([{"id": i, "name": str(i)} for i in range(3)])
    assert digits.of_categories([{"id": i + 1, "name": str(i)} for i in range(3)]).ids == {0: 1, 1: 2, 2: 3}
    assert Classes.from_categories(named(cat=1, dog=2)).of_categories([{"id": 2, "name": "2"}]).ids == {2: 2}


def test_no_two_classes_share_a_label():
    plain = Classes.from_categories(categories(1, 3))
    assert plain.of_categories(categories(3, "cow", 4)).ids == {3: 3, 4: "cow", 5: 4}
    with pytest.raises(InputError, match=r"category ids 1 \(cat\) and 2 \(2\) are one class in the file: cat"):
        Classes.from_categories(named(dog=1, cat=2)).of_categories([*named(cat=1), {"id": 2, "name": "2"}])


def test_an_id_stands_for_one_class_in_checkpoints():
    train = Classes.from_categories(named(WBC=1, RBC=2, Platelets=3))
    val = train.of_categories(named(RBC=1, Platelets=2))
    assert (train | val).ids == {2: 1, 3: 2}
    assert (train | val).names == train.names


def test_ids_decide_where_several_classes_share_a_name():
    twice = [{"id": 1, "name": "WBC"}, {"id": 2, "name": "RBC"}, {"id": 3, "name": "RBC"}]
    train = Classes.from_categories(twice)
    assert train.of_categories(twice).ids == {1: 1, 2: 2, 3: 3}
    with pytest.raises(InputError, match="category id 2 is 'Platelets', but 'RBC'"):
        train.of_categories(named(WBC=1, Platelets=2))


def test_checkpoints_that_do_not_name_their_classes():
    """91 classes are taken for COCO's, unless the data says otherwise: the published code always has 91."""
    coco = Classes.from_checkpoint({}, NUM_CLASSES["coco"])
    assert coco.of_categories(named(car=7)).ids == {3: 7}
    cells = coco.of_categories(named(WBC=1, RBC=2))
    assert cells.ids == {1: 1, 2: 2}
    assert "does not name its classes" in cells.difference(coco)
    assert Classes.from_checkpoint({}, 13).of_categories(named(WBC=1)).ids == {1: 1}


def test_classes_of_checkpoints():
    coco = Classes.from_checkpoint({}, NUM_CLASSES["coco"])
    assert coco.names == COCO_NAMES
    assert len(COCO_NAMES) == 80
    panoptic = Classes.from_checkpoint({}, NUM_CLASSES["coco_panoptic"])
    assert len(panoptic.names) == 133
    assert [panoptic.isthing[label] for label in (1, 90, 92, 200)] == [True, True, False, False]
    named = panoptic.state_dict() | {"class_isthing": {}}
    assert Classes.from_checkpoint(named, 250).isthing == panoptic.isthing  # as in folders of transformers
    assert not coco.isthing
    assert coco.ids == {label: label for label in COCO_NAMES}
    assert Classes.from_checkpoint({}, 3).names == {0: "0", 1: "1", 2: "2"}
    mine = Classes.from_categories(categories("cat", 5))
    assert Classes.from_checkpoint(mine.state_dict(), 9) == mine


def test_a_data_set_with_strings_as_ids(tmp_path):
    load = write(tmp_path / "train", ["dog", "cat"], used="dog")
    assert load()[0][1]["labels"].tolist() == [1]
    assert [entry["category_id"] for entry in load().coco.anns.values()] == [1]
    val = write(tmp_path / "val", ["cow", "dog"], used="dog")
    assert val(load().classes)[0][1]["labels"].tolist() == [1]


def test_a_class_that_the_model_does_not_know(tmp_path):
    known = write(tmp_path / "train", ["dog", "cat"], used="dog")().classes
    val = write(tmp_path / "val", ["cow", "dog"], used="cow")(known)
    with pytest.raises(InputError, match=r"category id cow \(name of cow\) does not fit a model of 2 classes"):
        val.check_classes(known.num_labels)
