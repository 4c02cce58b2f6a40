"""`python -m tools.new_chapter`: what it writes passes lint and tests, and its pages run."""

import os
import shutil
import subprocess
import sys

import pytest

from lossbook.data._fetch import find
from lossbook.data._registry import public_sets
from tools import new_chapter
from tools.chapters import ROOT, all_notebooks
from tools.provenance import read_record

TOC = """format: jb-book
root: index
parts:
- caption: Chapters
  numbered: true
  chapters:
"""


def run(root, *command):
    environment = {**os.environ, "PYTHONPATH": str(root), "LOSSBOOK_DEVICE": "cpu"}
    return subprocess.run([sys.executable, "-m", *command], cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A book whose only chapter is the new one; what it said; its files."""
    root = tmp_path_factory.mktemp("new")
    for name in ("tools", "lossbook", "experiments", "data", "_config.yml", "references.bib", "pyproject.toml"):
        ignored = shutil.ignore_patterns("__pycache__", "runs")
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name, **({"ignore": ignored} if (ROOT / name).is_dir() else {}))
    (root / "index.md").write_text("# A book\n")
    (root / "_toc.yml").write_text(TOC.replace("\n  chapters:", "\n  chapters: []"))
    done = run(root, "tools.new_chapter", "top_k")
    assert done.returncode == 0, done.stderr
    told, toc = done.stdout.split("Left to do by hand:")
    lines = toc.splitlines()
    start = next(i for i, line in enumerate(lines) if "- file: chapters/top_k" in line)
    (root / "_toc.yml").write_text(TOC + "\n".join(lines[start : start + 6]) + "\n")
    return root, done.stdout, [line.removeprefix("wrote ").strip() for line in told.strip().splitlines()]


def test_it_says_what_it_wrote_and_what_is_left(book):
    root, told, files = book
    assert len(files) == len(new_chapter.FILES) + 1
    assert all((root / name).exists() for name in files)
    assert [page.slug for page in all_notebooks(root)] == ["top_k", "top_k_evidence", "top_k_exercises"]
    for named in ("index.md", "references.bib", "lossbook/__init__.py", "lossbook/plotting.py", "benchmarks/top_k.py"):
        assert named in told
        assert (ROOT / named).exists() or "top_k" in named
    text = "".join((root / name).read_text(encoding="utf-8") for name in files if not name.endswith(".png"))
    assert "«" not in text
    assert "TopKLoss" in text


def test_the_files_pass_lint(book):
    root, _, files = book
    python = [name for name in files if name.endswith(".py")]
    for command in (("ruff", "check"), ("ruff", "format", "--check"), ("mypy",)):
        done = run(root, *command, *(python if command[0] == "ruff" else (n for n in python if "test" not in n)))
        assert done.returncode == 0, done.stdout


def test_the_tests_pass(book):
    root, *_ = book
    done = run(root, "pytest", "-q", "-p", "no:cacheprovider", "tests/test_top_k.py", "lossbook/top_k.py")
    assert done.returncode == 0, done.stdout
    assert "18 passed" in done.stdout or "passed" in done.stdout


def test_the_pages_run(book):
    root, *_ = book
    done = run(root, "tools.execute", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    for page in all_notebooks(root):
        assert page.stale() is None
    text = (root / "chapters/top_k.ipynb").read_text(encoding="utf-8")
    assert "There is no record yet: `python -m experiments.top_k` makes it." in text
    assert "still open" in (root / "chapters/top_k_exercises.ipynb").read_text(encoding="utf-8")


@pytest.mark.skipif(not all(map(find, public_sets()["uci-car"].files)), reason="the table car is not here")
def test_the_experiment_runs(book):
    root, *_ = book
    done = run(root, "experiments.top_k", "--scale", "smoke")
    assert done.returncode == 0, done.stderr
    record = read_record(root / "experiments/runs/top_k_smoke.json")
    assert set(record["tasks"][0]["methods"]) == {"cross-entropy", "top k"}


def test_nothing_that_is_there_is_touched(book):
    root, *_ = book
    module = root / "lossbook/top_k.py"
    before = module.read_text()
    try:
        module.write_text("MINE = 1\n")
        (root / "tests/test_top_k.py").rename(root / "kept")
        done = run(root, "tools.new_chapter", "top_k")
        assert module.read_text() == "MINE = 1\n"
        assert "left alone  lossbook/top_k.py" in done.stdout
        assert "wrote       tests/test_top_k.py" in done.stdout
        assert (root / "kept").read_text() == (root / "tests/test_top_k.py").read_text()
    finally:
        module.write_text(before)


@pytest.mark.parametrize("slug", ["Spans", "2k", "top-k", "class", "../x"])
def test_a_name_that_python_cannot_import_is_refused(slug, capsys):
    with pytest.raises(SystemExit):
        new_chapter.main([slug])
    assert "a slug is small letters, digits and underscores" in capsys.readouterr().err
