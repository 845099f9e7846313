"""Checkpoints from strangers in all formats: each either works, or is refused in one line, in bounded memory."""

import json
import resource
import struct
import sys
import zipfile
from collections import Counter

import pytest
import torch

import main
from checkpoints.checkpoint import load_checkpoint
from datasets.shapes import write_dataset
from scripts.convert import convert
from scripts.detector import load_detector
from tests.conftest import TINY
from tests.hostile import FLAGS, PLACES, PLAIN, VALUES, WEIGHT, replaced, text_of
from util.command import error_line
from util.errors import InputError

pytestmark = pytest.mark.usefixtures("narrow")
SMALL = ("--backbone_weights", "none", "--batch_size", 1, "--num_workers", 0, "--min_size", 64, "--max_size", 107)
LONGEST_LINE = 600
MOST_MEMORY = 2**20  # KiB more than before
SAMPLE = 32  # each place is tried with every 32nd value, beginning with a different one
TRAINING = ("optimizer", "lr_scheduler", "step", "skipped", "scaler", "processes", "train_stats")


@pytest.fixture
def run(tmp_path, parse):
    """Run main.py in this process on two images."""
    write_dataset(tmp_path / "shapes", num_train=2, num_val=1)

    def run(*flags: object) -> None:
        main.main(parse(*flags, *SMALL, "--coco_path", tmp_path / "shapes"))

    return run


@pytest.fixture
def good(run, tmp_path):
    """Train for one epoch, and return its checkpoint, with every entry that a checkpoint can have."""
    run(*TINY, "--epochs", 1, "--output_dir", tmp_path / "run")
    return torch.load(tmp_path / "run" / "checkpoint.pth", weights_only=True) | {"ap": 0.5}


class Attempts:
    """Attempts to use hostile files: each is checked, and counted as loaded or refused."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.seen: set[str] = set()
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __call__(self, name: str, action) -> object:
        """Return the result of an action, or None if it raises an InputError of one short line."""
        try:
            done = action()
        except InputError as error:
            line = error_line(error.line)
            assert len(line) <= LONGEST_LINE, (name, line[:LONGEST_LINE])
            assert line.isprintable(), (name, line)
            done = None
        except Exception as error:
            raise AssertionError(f"{name} ends in {type(error).__name__}: {error}") from error
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory
        assert grown < MOST_MEMORY * (1 if sys.platform == "linux" else 1024), (name, grown)
        return done

    def count(self, name: str, load, *uses) -> None:
        """Try to load a file; if that works, and gives something new, try its uses."""
        loaded = self(name, load)
        self.counts["refused" if loaded is None else "loaded"] += 1
        if loaded is not None and (text := repr(loaded)) not in self.seen:
            self.seen.add(text)
            for use in uses:
                self(name, lambda use=use: use() or True)


def detect(path) -> None:
    load_detector(str(path))([torch.zeros(3, 32, 32, dtype=torch.uint8)])


def sample(values: dict, place: int) -> list[tuple[str, object]]:
    return list(values.items())[place % SAMPLE :: SAMPLE]


@pytest.mark.parametrize("training", [False, True])
def test_checkpoints_with_values_of_other_types_are_loaded_or_refused(training, good, run, tmp_path):
    attempts, path = Attempts(), tmp_path / "hostile.pth"
    if not training:
        good = {key: value for key, value in good.items() if key not in TRAINING}
    for number, place in enumerate(PLACES):
        if (place[0] in TRAINING) == training:
            for name, value in sample(VALUES, number):
                torch.save(replaced(good, place, value), path)
                uses = [lambda: run("--resume", path, "--epochs", 2)]
                if not training:
                    uses = [
                        lambda: detect(path),
                        lambda: run("--eval", "--resume", path),
                        lambda: run(*TINY, "--finetune", path, "--epochs", 1),
                    ]
                attempts.count(f"{text_of(place)} = {name}", lambda: load_checkpoint(path, training), *uses)
    print(f"values in checkpoints, {training=}: {dict(attempts.counts)}")
    assert attempts.counts["refused"] > 50
    assert attempts.counts["loaded"] > 5


@pytest.mark.parametrize(
    "pickle", [b"\x80\x02" + b"]" * 10**6 + b"a" * (10**6 - 1) + b".", b"\x80\x02" + b")" + b"\x85" * 10**5 + b"."]
)
def test_deeply_nested_pickles_are_refused(pickle, tmp_path):
    """A million nested lists, and 100,000 nested tuples, which Python itself cannot write."""
    with zipfile.ZipFile(tmp_path / "c.pth", "w") as archive:
        archive.writestr("c/data.pkl", pickle)
        archive.writestr("c/version", "3\n")
    attempts = Attempts()
    assert attempts("nested", lambda: load_checkpoint(tmp_path / "c.pth")) is None


def test_damaged_config_files_are_loaded_or_refused(good, run, tmp_path):
    good["args"]["backbone_norm"] = "frozen"
    good["model"] = {key: value for key, value in good["model"].items() if not key.endswith("num_batches_tracked")}
    torch.save(good, tmp_path / "c.pth")
    convert(str(tmp_path / "c.pth"), folder := tmp_path / "folder", "transformers")
    attempts = Attempts()
    uses = (lambda: detect(folder), lambda: run("--eval", "--resume", folder))
    for file in ("config.json", "preprocessor_config.json"):
        config = json.loads((folder / file).read_text())
        texts = DAMAGED | {name: json.dumps(value) for name, value in JSON.items()}
        for i, field in enumerate(config):
            texts |= {f"{field} = {name}": json.dumps(config | {field: value}) for name, value in sample(JSON, i)}
        for name, text in texts.items():
            (folder / file).write_text(text)
            attempts.count(f"{file}: {name}", lambda: load_checkpoint(folder), *uses)
        (folder / file).write_text(json.dumps(config))
    print(f"config.json: {dict(attempts.counts)}")
    assert attempts.counts["refused"] > 50
    assert attempts.counts["loaded"] > 10


def test_damaged_safetensors_files_are_loaded_or_refused(good, run, tmp_path):
    torch.save(good, tmp_path / "c.pth")
    convert(str(tmp_path / "c.pth"), path := tmp_path / "c.safetensors", "safetensors")
    contents = path.read_bytes()
    length = struct.unpack("<Q", contents[:8])[0]
    header, weights = json.loads(contents[8 : 8 + length]), contents[8 + length :]
    attempts = Attempts()
    for name, text in headers(header).items():
        encoded = text.encode()
        path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + weights)
        uses = (lambda: detect(path), lambda: run("--eval", "--resume", path))
        attempts.count(f"header: {name}", lambda: load_checkpoint(path), *uses)
    for size in (0, 2**62, 2**64 - 1, len(contents)):
        path.write_bytes(struct.pack("<Q", size) + contents[8:])
        attempts.count(f"length {size}", lambda: load_checkpoint(path))
    print(f"safetensors: {dict(attempts.counts)}")
    assert attempts.counts["refused"] > 50
    assert attempts.counts["loaded"] > 3


def headers(header: dict) -> dict[str, str]:
    """Return headers of a safetensors file with other metadata, and with other descriptions of a tensor."""
    flags = json.loads(header["__metadata__"]["args"])
    metadata = {f"metadata: {name}": value for name, value in JSON.items()}
    for field in ("args", "class_names", "class_ids"):
        texts = DAMAGED | {name: json.dumps(value) for name, value in JSON.items()}
        metadata |= {f"{field}: {name}": header["__metadata__"] | {field: text} for name, text in texts.items()}
    for i, flag in enumerate(FLAGS):
        changed = {name: json.dumps(flags | {flag: value}) for name, value in sample(JSON, i)}
        metadata |= {f"{flag} = {name}": header["__metadata__"] | {"args": text} for name, text in changed.items()}
    changed = {name: header | {"__metadata__": value} for name, value in metadata.items()}
    for i, key in enumerate(("shape", "dtype", "data_offsets")):
        values = dict(sample(JSON, i)) | {"large": [10**6, 10**6], "negative": [-1, 5], "overlap": [0, 4]}
        changed |= {f"{key} = {name}": replaced(header, (WEIGHT, key), value) for name, value in values.items()}
    return DAMAGED | {name: json.dumps(value) for name, value in changed.items()}


def is_json(value: object) -> bool:
    try:
        return len(json.dumps(value)) > 0
    except (TypeError, ValueError):
        return False


JSON = {name: value for name, value in PLAIN.items() if name != "shared lists" and is_json(value)}
DAMAGED = {
    "nothing": "",
    "cut off": '{"model_type": "conditional_detr", ',
    "nested lists": "[" * 10**6,
    "nested objects": '{"a":' * 10**5,
    "a huge integer": '{"model_type": ' + "9" * 10**5 + "}",
    "repeated": '{"d_model": 1, "d_model": 2}',
}
