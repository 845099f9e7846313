"""The import rule: packages import only from those below them, and files do not import each other in circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = (  # from top to bottom; CONTRIBUTING.md describes them
    {"scripts"},
    {"main", "hubconf"},
    {"training"},
    {"engine"},
    {"run"},
    {"evaluation"},
    {"checkpoints"},
    {"datasets"},
    {"models"},
    {"flags"},
    {"util"},
)
LEVEL = {name: len(LAYERS) - i for i, names in enumerate(LAYERS) for name in names}


def files():
    names = [name for name in LEVEL if (ROOT / name).is_dir()]
    return [*ROOT.glob("*.py"), *(path for name in names for path in (ROOT / name).rglob("*.py"))]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Return the modules of this project that a file imports anywhere, in functions as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import; name the package"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    modules = {module_name(path) for path in files()}
    return {name for name in found if name in modules}


def test_every_file_has_a_place():
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files()} == set(LEVEL)


def test_imports_point_down():
    wrong = []
    for path in files():
        package = module_name(path).partition(".")[0]
        for name in sorted(imports(path)):
            other = name.partition(".")[0]
            if other != package and LEVEL[other] >= LEVEL[package]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_no_cycles():
    graph = {module_name(path): imports(path) - {module_name(path)} for path in files()}
    TopologicalSorter(graph).prepare()  # raises CycleError
