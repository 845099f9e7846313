"""Words to avoid: no file contains one, and scripts/language.py finds them."""

import pytest

from scripts.language import PATHS, ROOT, main, problems


@pytest.mark.parametrize("path", PATHS)
def test_files_have_no_words_to_avoid(path):
    assert list(problems(ROOT / path)) == []


@pytest.mark.parametrize(
    ("line", "better"),
    [
        ("The run goes{}on.", "continue or resume"),
        ("It went{}on.", "continue or resume"),
        ("all but{}for one", "except"),
        ("2 images a{}step", "per"),
    ],
)
@pytest.mark.parametrize("gap", [" ", "\n"])
def test_words_to_avoid_are_found_with_better_ones(line, better, gap, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n" + line.format(gap))
    (problem,) = problems(page)
    assert problem.startswith(f"{page}:3: ")
    assert problem.endswith(f": write {better}")


def test_other_words_are_accepted(tmp_path):
    page = tmp_path / "page.md"
    page.write_text('Besides, an image and a step; "go on" is only mentioned.')
    assert list(problems(page)) == []


def test_docstrings_comments_and_messages_are_checked(tmp_path, capsys):
    code = tmp_path / "code.py"
    code.write_text('"""What it does."""\nx = f"{1} be{0}side"  # an{0}ew\n'.replace("{0}", ""))
    assert main([str(code)]) == 1
    assert [line.split(":")[1] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "2"]
    code.write_text('"""Return what it does."""\n')
    assert main([str(code)]) == 0


def test_headings_are_checked(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Where it is.\n\n## Where it is\n")
    assert [problem.split(":")[1] for problem in problems(page)] == ["3"]
