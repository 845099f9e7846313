"""Check the words of texts, docstrings, comments and messages: `python -m scripts.language [PATH ..]`.

Each line of the output gives a place, its words, and better words. The exit code is 1 if there is such a line.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATHS = (  # checked by default
    *("README.md", "CONTRIBUTING.md", "docs", "main.py", "training.py", "engine.py", "hubconf.py", "run"),
    *("evaluation", "checkpoints", "datasets", "models", "flags", "util", "scripts", "tests"),
)
SUFFIXES = (".md", ".py", ".sh", ".toml", ".txt", ".html")

# Nouns in "2 images a step", which should be "2 images per step".
COUNTED = "images?|tasks?|lines?|scripts?|recipes?|checkpoints?|numbers?|faults?|bytes|ms|seconds?|minutes"
PER = "step|epoch|image|GPU|process|node|layer|class|model|file"

# Words to avoid, and better words. Words directly after a quotation mark are only mentioned, not used.
AVOIDED = {
    re.compile(rf'(?<!["\w])({words})\b', re.IGNORECASE): better
    for words, better in (
        (r"go(es|ing|ne)?\s+on|went\s+on", "continue or resume"),
        (r"anew", "again"),
        (r"beside", "next to"),
        (r"behind", "after"),
        (r"but\s+for", "except"),
        (r"so\s+many", "N, or the number of"),
        (rf"({COUNTED})\s+an?\s+({PER})", "per"),
    )
}
OPENING = re.compile(r"(What|Whether|Where|How)\b")  # of a docstring or a heading

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

Text = tuple[int, str]  # the number of the first line, and the text


def texts(path: Path) -> Iterator[Text]:
    """Yield the texts of a file: comments and strings of a Python file, the whole of any other file."""
    source = path.read_text("utf-8")
    if path.suffix != ".py":
        yield 1, source
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def openings(path: Path) -> Iterator[Text]:
    """Yield the docstrings of a Python file, or the headings of a Markdown page."""
    source = path.read_text("utf-8")
    if path.suffix == ".md":
        for number, line in enumerate(source.splitlines(), start=1):
            if line.startswith("#"):
                yield number, line.lstrip("# ")
    elif path.suffix == ".py":
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node, clean=False)):
                yield node.body[0].lineno, docstring


def problems(path: Path) -> Iterator[str]:
    """Yield a line for each place in a file, or in the files of a folder, with words to avoid."""
    if path.is_dir():
        for child in sorted(path.rglob("*")):
            if child.suffix in SUFFIXES and child != Path(__file__):  # which lists the words
                yield from problems(child)
        return
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    for first, text in openings(path):
        if found := OPENING.match(text):
            yield f"{name}:{first}: begins with {found[0]!r}: begin with a verb, or with the noun that it describes"
    for first, text in texts(path):
        for pattern, better in AVOIDED.items():
            for found in pattern.finditer(text):
                line = first + text.count("\n", 0, found.start())
                yield f"{name}:{line}: {' '.join(found[0].split())!r}: write {better}"


def main(arguments: list[str]) -> int:
    """Check the paths of the command line, by default `PATHS`, and return the exit code."""
    found = [line for path in arguments or PATHS for line in problems((ROOT / path).resolve())]
    print("\n".join(found) or "nothing to improve")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
