"""README, CONTRIBUTING and docs: the links, flags, files and functions that they name exist."""

import re
from importlib import import_module

import pytest

from flags.parser import ParsedFlags, check_args, get_args_parser, parse_flags
from scripts import flags as tools
from tests.conftest import ROOT
from tests.documents import PAGES, README, commands, flags_of_main, is_run, tool_of

# The files with the 3,500 lines that README recommends for an afternoon.
AFTERNOON = ("models/*.py", "run/step.py", "engine.py", "training.py", "main.py")

OTHER_FLAGS = {
    *("train", "val", "masks", "panoptic"),  # datasets.shapes
    *("nproc_per_node", "nnodes", "use_env", "max-restarts", "rdzv_backend", "rdzv_id", "rdzv_endpoint"),  # torchrun
    *("nodes", "gpus-per-node", "ntasks-per-node", "signal"),  # sbatch
    *("fp16", "onnx", "saveEngine", "minShapes", "optShapes", "maxShapes"),  # trtexec
    *("onnx_path", "output_path", "keep_io_types"),  # modelopt
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchor_of(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@each_page
def test_targets_of_links_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r'\]\(([^)\s]+)\)|src="([^"]+)"', text):
        path, _, anchor = "".join(link).partition("#")
        if "://" in path:
            continue
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text("utf-8"), re.MULTILINE)
            assert anchor in map(anchor_of, headings), f"{path}#{anchor}"


def test_the_readme_links_every_page():
    text = README.read_text("utf-8")
    assert [page.name for page in PAGES[1:] if f"({page.relative_to(ROOT)})" not in text] == []


def test_the_readme_is_short_and_states_how_many_lines_to_read():
    text = README.read_text("utf-8")
    assert len(text.encode()) <= 10_000
    lines = sum(path.read_text("utf-8").count("\n") for pattern in AFTERNOON for path in ROOT.glob(pattern))
    assert [abs(int(n.replace(",", "")) - lines) <= 100 for n in re.findall(r"([\d,]+) lines", text)] == [True] * 2


@each_page
def test_flags_exist(page):
    parsers = [get_args_parser(), *(parser() for parser in tools.PARSERS.values())]
    known = {name.lstrip("-") for parser in parsers for name in parser._option_string_actions}
    named = set(re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", page.read_text("utf-8")))
    assert named - known <= OTHER_FLAGS


@each_page
def test_files_and_functions_exist(page):
    """Check names in code that begin with a package of this project, but no patterns and no lists of names."""
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for name in set(re.findall(r"`([^`\s{(*]+)`", page.read_text("utf-8"))):
        if "/" in name and name.split("/")[0] in packages:
            assert (ROOT / name).exists(), name
        elif "/" not in name and name.split(".")[0] in packages:
            assert resolve(name), name


def resolve(name: str) -> object:
    """Return the package, module, class or function of a dotted name."""
    first, *parts = name.split(".")
    found: object = import_module(first)
    for i, part in enumerate(parts, start=2):
        found = getattr(found, part, None) or import_module(".".join(name.split(".")[:i]))
    return found


@each_page
def test_flags_of_commands_are_valid(page):
    for command in commands(page):
        if (flags := flags_of_main(command)) is not None:
            check_args(parse_flags(get_args_parser(), ["--device", "cpu", *flags], ParsedFlags()))
        elif tool := tool_of(command):
            tools.parse_flags(tool, command[3:])
        else:
            assert not is_run(command) or command[:2] == ["python", "scripts/onnx_example.py"], command
