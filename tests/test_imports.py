"""The import rule: packages import only from those below them, and files do not import each other in cycles."""

from graphlib import TopologicalSorter

from scripts.imports import LAYERS, PACKAGES, ROOT, diagram, files, imports, package_of

LEVEL = {name: len(LAYERS) - i for i, names in enumerate(LAYERS) for name in names}


def test_every_file_belongs_to_a_layer():
    assert {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in files()} == set(PACKAGES)


def test_imports_point_down():
    wrong = [
        f"{module} imports {other}"
        for module, imported in imports().items()
        for other in sorted(imported)
        if package_of(other) != package_of(module) and LEVEL[package_of(other)] >= LEVEL[package_of(module)]
    ]
    assert wrong == []


def test_imports_have_no_cycles():
    TopologicalSorter(imports()).prepare()  # raises CycleError


def test_the_diagram_is_up_to_date():
    assert f"```mermaid\n{diagram()}\n```" in (ROOT / "CONTRIBUTING.md").read_text("utf-8")
