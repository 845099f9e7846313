"""The command-line tools as users start them: as a file or with -m, and on terminals of any encoding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import ROOT

TOOLS = sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if "run_command(main)" in path.read_text("utf-8"))


def run(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    """Run Python and return its output as bytes, because the tests check their encoding."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        timeout=300,
        check=False,
    )


def test_the_tools_are_found():
    assert {"benchmark", "check_data", "convert", "export_onnx", "plot_logs", "predict", "replay"} <= set(TOOLS)


@pytest.mark.parametrize("tool", TOOLS)
def test_tools_run_as_files(tool, tmp_path):
    """They start in any folder, also on a terminal that only has ASCII characters."""
    process = run(ROOT / "scripts" / f"{tool}.py", "--help", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(b"usage:")


@pytest.fixture
def cats(tmp_path) -> list[object]:
    """Return the flags of a data set whose names no 8-bit encoding can print."""
    Image.new("RGB", (40, 30)).save(tmp_path / "猫é.png")
    data = {
        "images": [{"id": 1, "file_name": "猫é.png", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "猫é\N{CAT FACE}"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 30, 20]}],
    }
    (tmp_path / "data.json").write_text(json.dumps(data), encoding="utf-8")
    files = {"images": tmp_path, "annotations": tmp_path / "data.json"}
    return [part for split in ("train", "val") for kind, path in files.items() for part in (f"--{split}_{kind}", path)]


@pytest.mark.parametrize(("encoding", "printed"), [("gbk", "猫é?"), ("cp1252", "?é?"), ("utf-8", "猫é\N{CAT FACE}")])
def test_characters_that_the_encoding_lacks_are_replaced(encoding, printed, cats, tmp_path):
    process = run("-m", "scripts.check_data", *cats, cwd=ROOT, PYTHONIOENCODING=encoding)
    assert process.returncode == 0, process.stderr
    assert printed in process.stdout.decode(encoding)


def test_main_replaces_characters_that_the_encoding_lacks(tmp_path):
    process = run(ROOT / "main.py", "--coco_path", "猫é", cwd=tmp_path, PYTHONIOENCODING="cp1252")
    assert process.returncode == 1
    assert process.stderr.decode("cp1252").startswith("error: --coco_path ?é: no such folder")
