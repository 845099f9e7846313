"""Draw the diagram of the packages' imports in CONTRIBUTING.md: `python -m scripts.imports`."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Files import only from packages in the lines below their own; packages in one line do not import each other.
LAYERS = (
    ("scripts",),
    ("main", "hubconf"),
    ("training",),
    ("engine",),
    ("run",),
    ("evaluation",),
    ("checkpoints",),
    ("datasets",),
    ("models",),
    ("flags",),
    ("util",),
)
PACKAGES = tuple(name for names in LAYERS for name in names)


def files() -> list[Path]:
    """Return the Python files of the project, without its tests."""
    folders = [ROOT / name for name in PACKAGES if (ROOT / name).is_dir()]
    return sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def module_name(path: Path) -> str:
    """Return the name by which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports() -> dict[str, set[str]]:
    """Return the project's modules that each module imports, also within functions."""
    paths = {module_name(path): path for path in files()}
    found = {}
    for name, path in paths.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        found[name] = (imported & paths.keys()) - {name}
    return found


def package_of(module: str) -> str:
    """Return the top-level package or file that a module belongs to."""
    return module.partition(".")[0]


def package_imports() -> dict[str, set[str]]:
    """Return the other packages that each package imports."""
    found: dict[str, set[str]] = {name: set() for name in PACKAGES}
    for module, imported in imports().items():
        found[package_of(module)] |= {package_of(other) for other in imported} - {package_of(module)}
    return found


def diagram() -> str:
    """Return the packages as a Mermaid diagram, without arrows that follow from other arrows."""
    direct = package_imports()
    reached: dict[str, set[str]] = {}
    for name in reversed(PACKAGES):  # from the bottom, so that imported packages come first
        reached[name] = direct[name].union(*(reached[other] for other in direct[name]))
    lines = [
        f"    {name} --> {other}"
        for name in PACKAGES
        for other in PACKAGES
        if other in direct[name] and not any(other in reached[between] for between in direct[name])
    ]
    return "\n".join(["graph TD", *lines])


if __name__ == "__main__":
    print(diagram())
