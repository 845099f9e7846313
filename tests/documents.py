"""README, CONTRIBUTING and the pages of docs, and the commands in them."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Beginnings of commands that are not run, although their flags are checked if they are those of main.py or a tool.
NOT_RUN = {
    "git clone": "needs the network",
    "pip install": "needs the network",
    "python3 -m venv": "only prepares the installation",
    "torchrun": "needs several GPUs or nodes",
    "sbatch": "needs SLURM",
    "bash scripts/": "takes minutes or needs 8 GPUs; tests/test_recipes.py runs the recipes up to the training",
    "python -m scripts.benchmark": "takes minutes; tests/test_benchmark.py runs it on small sizes",
    "python main.py --coco_path bccd": "needs other data",
    "trtexec": "needs TensorRT",
    "python -m modelopt": "needs a package of NVIDIA",
}

# Bash without any program: instead of running a command, it prints the words that the program would receive.
PRINT_COMMANDS = r"""
PATH=/nonexistent
source() { :; }; cd() { :; }
command_not_found_handle() { printf '%s\0' "$@"; printf '\n\0'; }
"""


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command in the page's blocks of bash."""
    for block in blocks(page, "bash"):
        done = subprocess.run(["bash", "-c", PRINT_COMMANDS + block], capture_output=True, text=True, check=False)
        assert not done.stderr, done.stderr
        for command in done.stdout.split("\n\0")[:-1]:
            yield command.split("\0")[:-1]


def is_run(command: list[str]) -> bool:
    return not " ".join(command).startswith(tuple(NOT_RUN))


def flags_of_main(command: list[str]) -> list[str] | None:
    """Return the flags of main.py in a command, also if a launcher or a recipe starts it; None in other commands."""
    for i, word in enumerate(command):
        if word == "main.py" or (word.endswith(".sh") and "main.py" in (ROOT / word).read_text("utf-8")):
            return [flag for flag in command[i + 1 :] if flag != "--panoptic"]  # a flag of demo_masks.sh
    return None


def tool_of(command: list[str]) -> str | None:
    """Return the name of a tool of scripts/ that a command starts; None in other commands."""
    module = command[2] if command[:2] == ["python", "-m"] else ""
    return module.removeprefix("scripts.") if module.startswith("scripts.") else None
