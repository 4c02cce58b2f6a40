"""The machinery of the book: stamps, the reader's notebook, and the way from an edit to the page."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat
import pytest

from tools import compat, generated, reader
from tools.book import needs_clean, state
from tools.chapters import (
    ROOT,
    Chapter,
    StaleChapterError,
    all_chapters,
    all_notebooks,
    imported_modules,
    module_files,
    pages_of,
    plain_python,
)
from tools.execute import joined
from tools.provenance import changed_code, deciding_code
from tools.reader import Context, SourceError, insert_facts, labelled_equations, to_markdown

CONTEXT = Context(
    equations={"one": "1.1", "two": "1.2"},
    citations={"su": {"author": "Su", "year": "2020", "url": "https://example.org/su"}},
    values={"gain": "0.52"},
    bound={"focal_evidence:soft gain": "0.61"}.__getitem__,
    facts={"time": "6 s on CPU"},
    notebooks={"focal"},
    labels={"far": "other"},
)


# ---------------------------------------------------------------- make


@pytest.fixture
def clone(tmp_path):
    """What `make` needs to install, with an environment that sees the packages of this one."""
    for name in ("tools", "lossbook", "pyproject.toml", "Makefile", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "requirements.lock").write_text("numpy\n")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/requirements.txt").write_text("numpy\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    site = next(tmp_path.glob(".venv/lib/python*/site-packages"))
    (site / "base.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return tmp_path


def make(root, target):
    command = ["make", f"PYTHON={sys.executable}", target]
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": ""}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


def test_a_failed_install_leaves_no_stamp_and_says_so(clone):
    done = make(clone, ".venv/.peers")
    assert done.returncode == 0, done.stderr
    assert "1 packages found" in done.stdout
    assert list(clone.glob(".venv/lib/python*/site-packages/lossbook-*.dist-info"))
    assert (clone / ".venv/.ready").exists()
    assert (clone / ".venv/.peers").exists()

    (clone / "benchmarks/requirements.txt").write_text("no-such-package-of-lossbook==1.0\n")
    done = make(clone, ".venv/.peers")
    assert done.returncode != 0
    assert "pip could not install everything that benchmarks/requirements.txt names" in done.stderr
    assert (clone / ".venv/.ready").exists()
    assert not (clone / ".venv/.peers").exists()

    (clone / "requirements.lock").write_text("numpy\nno-such-package-of-lossbook==1.0\n")
    for _ in range(2):  # the second call does not take the first one's environment for whole
        done = make(clone, ".venv/.ready")
        assert done.returncode != 0
        assert "No matching distribution found for no-such-package-of-lossbook==1.0" in done.stderr
        assert "pip could not install everything that requirements.lock names" in done.stderr
        assert "Traceback" not in done.stderr
        assert not (clone / ".venv/.ready").exists()


def test_no_recipe_hides_a_failure():
    """Without `set -o pipefail`, which make's shell need not have, a pipe ends with the status of its last command."""
    recipes = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("\t")]
    assert len(recipes) > 20
    assert not [line for line in recipes if " | " in line.replace("||", "")]


# ---------------------------------------------------------------- other versions of torch

COMPAT = {
    "date": "2026-11-30", "commit": "0123456789abcdef", "changed": False, "python": "3.11.7", "code": {},
    "torch": {
        "2.6.0": {
            "numpy": "1.26.4",
            "tests": {"a.py": {"passed": 4, "failed": 1}, "b.py": {"passed": 3, "failed": 0, "skipped": 2}},
        },
        "2.14.1": {"numpy": "2.4.6", "tests": {"a.py": {"passed": 9, "failed": 0, "skipped": 0}}},
    },
}  # fmt: skip


def test_the_oldest_a_middle_and_the_newest_are_chosen():
    versions = ["2.5.1", "2.6.0", "2.6.1", "2.7.0", "2.7.1", "2.8.0", "2.9.0", "2.10.0", "2.10.1", "2.11.0"]
    assert compat.choose(versions, "2.6", "2.11.0") == ["2.6.0", "2.9.0", "2.11.0"]
    assert compat.choose(versions, "2.6", "2.10.1") == ["2.6.0", "2.8.0", "2.10.1"], "pip may be held below the newest"
    assert compat.choose(versions, "2.11", "2.11.0") == ["2.11.0"]
    assert compat.minimum() in (ROOT / "pyproject.toml").read_text()


def test_every_outcome_is_counted_and_what_never_ends_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("LOSSBOOK_PER_TEST", "2")
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 0\n"
        "def test_odd(): pytest.skip('why')\n"
        "def test_endless():\n    while True: pass\n"
        "@pytest.fixture\ndef broken(): raise ValueError\n"
        "def test_error(broken): pass\n"
        "def test_last(): pass\n"
    )
    (tmp_path / "test_crash.py").write_text("import os\ndef test_it(): os._exit(7)\n")
    (tmp_path / "test_broken.py").write_text("import nowhere\n")
    python = Path(sys.executable)
    found, failures = compat.run_file(python, str(tmp_path / "test_some.py"))
    assert found == {"passed": 2, "failed": 3, "skipped": 1}
    assert failures == ["test_bad", "test_endless", "test_error"]
    found, failures = compat.run_file(python, str(tmp_path / "test_crash.py"))
    assert found == {"passed": 0, "failed": 1, "skipped": 0}
    assert "ends with status 7" in failures[0]
    found, _ = compat.run_file(python, str(tmp_path / "test_broken.py"))
    assert found == {"passed": 0, "failed": 1, "skipped": 0}


def test_the_table_tells_what_was_tried_and_what_changed_since(tmp_path):
    assert compat.table(tmp_path) == ""
    (tmp_path / "data/results").mkdir(parents=True)
    (tmp_path / "lossbook").mkdir()
    path = tmp_path / compat.RECORD
    path.write_text(json.dumps(COMPAT))
    about, _, *rows = compat.table(tmp_path).splitlines()
    assert about == "The tests of the losses on the CPU, Python 3.11.7, 2026-11-30, commit `0123456`."
    assert rows[2:] == ["| 2.6.0 | 1.26.4 | 7 | 1 | 2 |", "| 2.14.1 | 2.4.6 | 9 | 0 | 0 |"]
    (tmp_path / "lossbook/focal.py").write_text("x = 1\n")
    assert "**Outdated: `lossbook/focal.py` changed since.**" in compat.table(tmp_path)
    path.write_text(json.dumps({**COMPAT, "code": compat.code(tmp_path)}))
    assert "Outdated" not in compat.table(tmp_path)
    assert {"lossbook/focal.py", "lossbook/_fast/focal.py", "lossbook/_checks.py"} <= set(compat.code())


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("cc"), reason="needs a C compiler on Linux")
def test_a_library_of_a_gpu_can_be_stood_in_for(tmp_path):
    """The names that are asked for, with their versions, or the linker refuses the library."""
    (tmp_path / "map").write_text("libgpu.so.7 { global: *; };\n")
    gpu, torch = tmp_path / "libgpu.so.7", tmp_path / "libtorch_gpu.so"

    def cc(source, *options):
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-x", "none", *options]
        subprocess.run(list(map(str, command)), input=source, text=True, check=True)

    cc(
        "int count(void) { return 1; }",
        "-Wl,-soname,libgpu.so.7",
        f"-Wl,--version-script={tmp_path / 'map'}",
        "-o",
        gpu,
    )
    cc("int count(void); int ask(void) { return count(); }", gpu, "-Wl,-rpath,$ORIGIN", "-o", torch)
    gpu.unlink()
    load = [sys.executable, "-c", f"import ctypes; print(ctypes.CDLL({str(torch)!r}, mode=2).ask())"]
    assert "libgpu.so.7" in subprocess.run(load, capture_output=True, text=True).stderr
    compat.stand_in(tmp_path)
    done = subprocess.run(load, capture_output=True, text=True)
    assert done.stdout == f"{compat.NO_DEVICE}\n", done.stderr


# ---------------------------------------------------------------- MyST to Markdown


@pytest.mark.parametrize(
    ("myst", "markdown"),
    [
        ("plain *text* with $x$", "plain *text* with $x$"),
        ("$$\na = b\n$$ (one)", "$$\na = b \\tag{1.1}\n$$"),
        ("$$\na = b\n$$", "$$\na = b\n$$"),
        ("```{math}\n:label: two\na = b\n```", "$$\na = b \\tag{1.2}\n$$"),
        ("see {eq}`one` and {eq}`two`", "see (1.1) and (1.2)"),
        ("{cite:t}`su` says", "[Su (2020)](https://example.org/su) says"),
        ("it works {cite:p}`su`", "it works ([Su, 2020](https://example.org/su))"),
        ("reached {glue:text}`gain`.", "reached 0.52."),
        ("there {bound}`focal_evidence:soft gain`.", "there 0.61."),
        ("takes {stamp}`time`.", "takes 6 s on CPU."),
        ("{func}`~lossbook.focal.sigmoid_focal_loss`", "`sigmoid_focal_loss`"),
        ("{func}`lossbook.focal.sigmoid_focal_loss`", "`focal.sigmoid_focal_loss`"),
        ("{term}`score <scores>`", "score"),
        ("code `{eq}` stays", "code `{eq}` stays"),
        ("(target)=\n# Title", '<a id="target"></a>\n# Title'),
        ("[there](#target) and [elsewhere](#far)", "[there](#target) and [elsewhere](other.ipynb#far)"),
        ("[next](focal.md) and [words](notation.md#scores)", "[next](focal.ipynb) and [words](notation.md#scores)"),
        (":::{note}\nlook {eq}`one`\n:::", "> **Note**\n>\n> look (1.1)"),
        (":::{admonition} Title $x$\n:class: tip\nbody\n:::", "> **Title $x$**\n>\n> body"),
        (
            ":::{admonition} Solution\n:class: dropdown\n```python\nx = {}\n```\n:::",
            "<details><summary>Solution</summary>\n\n```python\nx = {}\n```\n\n</details>",
        ),
        ("````{note}\n```python\ny\n```\n````", "> **Note**\n>\n> ```python\n> y\n> ```"),
        ("```{figure} picture.png\n:alt: a cat\nCaption {eq}`one`\n```", "![a cat](picture.png)\n\n*Caption (1.1)*"),
        ("- item\n\n  :::{tip}\n  inner\n  :::", "- item\n\n  > **Tip**\n  >\n  > inner"),
        ("```python\n{eq}`one` $$a$$ (one)\n```", "```python\n{eq}`one` $$a$$ (one)\n```"),
    ],
)
def test_each_form_of_myst_becomes_markdown(myst, markdown):
    assert to_markdown(myst, CONTEXT) == markdown


@pytest.mark.parametrize(
    ("myst", "message"),
    [
        ("{eq}`three`", "no equation is called 'three'"),
        ("$$\na\n$$ (three)", "no equation is called 'three'"),
        ("{cite:t}`lin`", "no reference is called 'lin'"),
        ("{glue:text}`loss`", "no value is called 'loss'"),
        ("{numref}`x`", "role {numref} has no form"),
        (":::{mermaid}\nx\n:::", "directive {mermaid} has no form"),
        (":::{note}\nnever closed", "never closed"),
        ("::: note\nx\n:::", "colon fence without a directive"),
    ],
)
def test_what_a_notebook_cannot_show_is_an_error_with_its_place(myst, message):
    with pytest.raises(
        SourceError, match="chapters/x.md, cell 3: .*" + message.replace("{", r"\{").replace("}", r"\}")
    ):
        to_markdown(myst, CONTEXT, "chapters/x.md, cell 3")


def test_labels_inside_code_are_not_equations():
    assert labelled_equations("$$a$$ (one)\n\n```python\n$$b$$ (no)\n```\n\n:::{note}\n$$c$$ (two)\n:::") == [
        "one",
        "two",
    ]


def test_facts_are_inserted_by_name():
    assert insert_facts("{stamp}`time`, {stamp}`time`", {"time": "6 s"}) == "6 s, 6 s"
    with pytest.raises(KeyError):
        insert_facts("{stamp}`speed`", {"time": "6 s"})


ASKED = """# A page

:::{admonition} Question 1: Is $x$ more than `y`?
:class: dropdown question

It is.

- really
:::

:::{admonition} Exercise 3.2: a sum (by hand) (medium, 10 minutes)
Add.
:::

:::{admonition} Solution 3.2
:class: dropdown
Done.
:::
"""


def test_questions_and_exercises_are_found_and_named():
    assert generated.QUESTION.findall(ASKED) == [("1", "Is $x$ more than `y`?", "\nIt is.\n\n- really")]
    assert generated.EXERCISE.findall(ASKED) == [("3.2", "a sum (by hand)", "medium", "10")]
    named = generated.with_names(ASKED, Chapter("focal", 3))
    assert "than `y`?\n:name: question-3-1\n:class: dropdown question\n" in named
    assert "10 minutes)\n:name: exercise-3-2\nAdd." in named
    assert "name: solution" not in named


def test_figures_are_counted_over_the_pages_of_a_chapter(tmp_path):
    (tmp_path / "chapters").mkdir()
    for slug, text in {"tiny": "*Figure: a*\n\n*Figure 2*\n\n*Figure: b*", "tiny_evidence": "*Figure: c*"}.items():
        (tmp_path / f"chapters/{slug}.md").write_text(TINY.replace("slug: tiny", f"slug: {slug}") + f"\n{text}\n")
    (tmp_path / "_toc.yml").write_text(
        "root: index\nparts:\n- numbered: true\n  chapters:\n  - file: chapters/tiny\n    sections:\n"
        "    - file: chapters/tiny_evidence\n"
    )
    (tmp_path / "index.md").write_text("# A book\n")
    first, second = all_notebooks(tmp_path)
    text = reader.number_captions("*Figure: a*\n\n*Figure: b*", reader.caption_numbers(first))
    assert text == "*Figure 1.1: a*\n\n*Figure 1.2: b*"
    assert reader.number_captions("*Figure: c*", reader.caption_numbers(second)) == "*Figure 1.3: c*"


def test_the_first_use_of_a_word_leads_to_the_glossary():
    table = {"log loss": "log loss", "BCE": "binary cross-entropy, BCE", "entropy": "entropy", "fold": "fold"}
    text = (
        "# The log loss\n\n:::{note} BCE\n$BCE$ and `BCE` and [BCE](x.md), **entropy**, cross-entropy, entropys\n"
        "```python\nBCE\n```\nTwo log losses: BCE, BCE and {term}`folds <fold>`; a fold.\n:::\n"
    )
    linked = generated.link_words(text.replace("log losses", "BCEs"), table, set())
    assert "Two {term}`BCEs <binary cross-entropy, BCE>`: BCE, BCE and {term}`folds <fold>`; a fold." in linked
    assert linked.count("{term}") == 3
    assert "cross-entropy, {term}`entropys <entropy>`" in linked
    assert "cross-entropy" in generated.words()
    assert not generated.COMMON & generated.words().keys()


def test_a_function_is_told_with_its_equations_tests_and_benchmark(tmp_path):
    for folder in ("lossbook", "tests", "data/results", "chapters"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "lossbook/tiny.py").write_text(
        '__all__ = ["Twice", "twice"]\n\ndef twice(x):\n    """Doubles.\n\n    Equation :eq:`a-b` of the chapter."""\n'
    )
    (tmp_path / "tests/test_tiny.py").write_text("def test_a():\n    twice(1)\n\n\ndef test_b():\n    not_twice(1)\n")
    mode = {"threads": 1, "busy": False, "ratios": {"ours / plain": {"ratio": 0.51234}}}
    rows = [
        {"loss": "twice", "scores": scores, "peak_bytes": {"ours": 1, "plain": 4}, "modes": [mode]} for scores in (9, 5)
    ]
    (tmp_path / "data/results/bench_tiny.json").write_text(json.dumps({"cases": rows}))
    (tmp_path / "chapters/tiny.md").write_text(TINY)
    (tmp_path / "index.md").write_text("# A book\n")
    toc = "root: index\nparts:\n- numbered: true\n  chapters:\n  - file: chapters/tiny\n"
    (tmp_path / "_toc.yml").write_text(toc)
    (row,) = generated.functions(tmp_path).splitlines()[2:]
    assert row == "| {func}`~lossbook.tiny.twice` | {eq}`a-b` | 1 | 0.51 | 0.25 |"
    assert generated.status(tmp_path).startswith("0 pages")
    assert generated.insert("{stamp}`functions`, {stamp}`time`", tmp_path).endswith("|, {stamp}`time`")
    assert tmp_path / "tests/test_tiny.py" in set(generated.sources("{stamp}`functions`", tmp_path))


def test_imports_are_found_wherever_they_stand():
    code = "import a.b\ndef f():\n    from c import d\nfrom . import e\nfrom .f import g\n"
    assert imported_modules(code, "p") == {"a.b", "c", "c.d", "p", "p.e", "p.f", "p.f.g"}
    code = "import a, a.b, c.d as e\na.f(a.b.g, e.h, i.j)\n"
    assert imported_modules(code) == {"a", "a.b", "a.f", "c.d", "c.d.h"}
    assert plain_python("%matplotlib inline\n!ls\nx = 5 % 3") == "\n\nx = 5 % 3"


LAZY = {
    "p/__init__.py": "import importlib\n_EXPORTS: dict[str, str] = {'f': 'one', 'F': 'one', 'g': 'two'}\n",
    "p/one.py": "from p._fast import one as fast\n\ndef f(): pass\n",
    "p/two.py": "from ._fast import two as fast\nimport p\nh = p.f\n",
    "p/three.py": "",
    "p/_fast/__init__.py": "",
    "p/_fast/one.py": "from p import _checks\n",
    "p/_fast/two.py": "",
    "p/_checks.py": "",
    "experiments/two.py": "from p import g\n",
}
ONE = {"p/__init__.py", "p/one.py", "p/_fast/__init__.py", "p/_fast/one.py", "p/_checks.py"}
TWO = ONE | {"p/two.py", "p/_fast/two.py"}


@pytest.mark.parametrize(
    ("code", "files"),
    [
        ("import p", {"p/__init__.py"}),
        ("from p import missing", {"p/__init__.py"}),
        ("from p import three", {"p/__init__.py", "p/three.py"}),
        ("from p import f", ONE),
        ("from p.one import f", ONE),
        ("import p\np.F()", ONE),
        ("import p as q\nq.f()", ONE),
        ("def later():\n    from p import g", TWO),
        ("from p import *", TWO),
    ],
)
def test_a_lazy_name_leads_to_its_module_and_the_fast_roads(tmp_path, code, files):
    for name, text in LAZY.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert set(module_files(code, tmp_path, ("p",))) == files


def test_records_follow_lazy_names(tmp_path):
    for name, text in LAZY.items():
        (tmp_path / name.replace("p/", "lossbook/")).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name.replace("p/", "lossbook/")).write_text(re.sub(r"\bp\b", "lossbook", text))
    record = {"slug": "two", "code": deciding_code("two", tmp_path)}
    assert "lossbook/_fast/two.py" in record["code"]
    assert changed_code(record, tmp_path) == []
    (tmp_path / "lossbook/_fast/two.py").write_text("x = 1\n")
    assert changed_code(record, tmp_path) == ["lossbook/_fast/two.py"]


# ---------------------------------------------------------------- the committed chapters


@pytest.mark.parametrize("chapter", all_notebooks(), ids=lambda c: c.slug)
class TestCommittedChapter:
    def test_is_fresh(self, chapter):
        assert chapter.stale() is None

    def test_notebook_is_what_the_source_gives(self, chapter):
        made = nbformat.writes(reader.build_notebook(chapter, chapter.notebook)) + "\n"
        assert made == chapter.notebook_path.read_text(encoding="utf-8"), "run `make book` and commit the notebook"

    def test_knows_its_slug(self, chapter):
        assert chapter.source.metadata["slug"] == chapter.slug

    def test_notebook_has_no_myst_left(self, chapter):
        text = "\n".join(c.source for c in chapter.notebook.cells if c.cell_type == "markdown")
        prose = "\n".join(part for _, part in reader._outside_fences(text))
        assert not reader.ROLE.search(prose)
        assert ":::" not in prose
        assert "```{" not in text

    def test_records_where_it_ran(self, chapter):
        stamp = chapter.notebook.metadata["lossbook"]
        assert stamp["device"]
        assert stamp["seconds"] > 0
        assert set(stamp["versions"]) == {"python", "torch", "numpy"}


# ---------------------------------------------------------------- from an edit to the page, on a book of one chapter

TINY = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
slug: tiny
---

# A tiny chapter

The answer of $f$ is {glue:text}`answer`, by

$$
f(x) = 2 x .
$$ (tiny-f)

```{code-cell} ipython3
from lossbook.claims import glue
from lossbook.data import book_file
from lossbook.tiny import f

offset = int(open(book_file("offset.txt")).read())
glue("answer", str(f(20) + offset))
f(20) + offset
```
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A copy of the machinery around a book of one small chapter, executed once."""
    root = tmp_path_factory.mktemp("tiny")
    names = "tools lossbook _static _templates _config.yml references.bib pyproject.toml CITATION.cff CHANGELOG.md"
    for name in names.split():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, root / name)
    (root / "chapters").mkdir()
    (root / "data/results").mkdir(parents=True)
    (root / "data/offset.txt").write_text("2")
    (root / "lossbook/tiny.py").write_text("from lossbook import _helper\n\n\ndef f(x):\n    return _helper.TWO * x\n")
    (root / "lossbook/_helper.py").write_text("TWO = 2\n")
    (root / "chapters/tiny.md").write_text(TINY)
    (root / "index.md").write_text("# Tiny book\n\nSee the [chapter](chapters/tiny.md).\n")
    (root / "_toc.yml").write_text(
        "format: jb-book\nroot: index\n"
        "parts:\n- caption: Chapters\n  numbered: true\n  chapters:\n  - file: chapters/tiny\n"
    )
    run(root, "tools.execute", check=True)
    return root


def run(root, module, *arguments, check=False):
    environment = {**os.environ, "PYTHONPATH": str(root), "LOSSBOOK_DEVICE": "cpu"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=check)


def page(root):
    return (root / "_build/html/chapters/tiny.html").read_text(encoding="utf-8")


def test_an_edit_of_the_package_reaches_page_and_notebook(tiny):
    modules = set(Chapter("tiny", 1, tiny).modules)
    assert {f"lossbook/{name}.py" for name in ("__init__", "_helper", "claims", "data/__init__", "tiny")} <= modules
    assert not {"lossbook/focal.py", "lossbook/metrics.py"} & modules
    assert run(tiny, "tools.build").returncode == 0
    assert "<strong>42</strong>" in page(tiny) or ">42<" in page(tiny)
    helper = tiny / "lossbook/_helper.py"
    before = helper.read_text()
    try:
        helper.write_text("TWO = 3\n")
        stopped = run(tiny, "tools.build")
        assert stopped.returncode == 1
        line = "chapters/tiny.md is stale: lossbook/_helper.py changed after it was executed. Run `make book`"
        assert stopped.stderr.startswith(line)
        assert len(stopped.stderr.splitlines()) == 1
        program = [Path(sys.executable).with_name("jupyter-book"), "build", tiny, "-q"]
        stopped = subprocess.run(program, cwd=tiny, capture_output=True, text=True)
        assert stopped.returncode != 0, "the build stops by itself, too"
        assert line in stopped.stdout + stopped.stderr
        assert run(tiny, "tools.execute", "--check").returncode == 1
        run(tiny, "tools.execute", check=True)
        assert run(tiny, "tools.build").returncode == 0
        assert ">62<" in page(tiny)
        assert "is 62, by" in (tiny / "chapters/tiny.ipynb").read_text()
    finally:
        helper.write_text(before)
        run(tiny, "tools.execute", check=True)


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        (
            "chapters/tiny.md",
            "f(20) + offset\n```",
            "f(21) + offset\n```",
            "its code cells differ from those of its notebook",
        ),
        ("data/offset.txt", "2", "3", "data/offset.txt changed after it was executed"),
        ("lossbook/tiny.py", "return", "return 1 +", "lossbook/tiny.py changed after it was executed"),
        ("chapters/tiny.ipynb", '"code": "', '"code": "0', "its code cells changed after they were executed"),
        ("chapters/tiny.ipynb", '"lossbook": {', '"stripped": {', "its notebook has no stamp"),
        ("chapters/tiny.ipynb", None, None, "it has not been executed yet"),
    ],
)
def test_every_cause_of_staleness_is_told(tiny, file, old, new, reason):
    path = tiny / file
    before = path.read_text()
    try:
        if old is None:
            path.unlink()
        else:
            assert old in before
            path.write_text(before.replace(old, new))
        with pytest.raises(StaleChapterError, match=f"chapters/tiny.md is stale: {reason}. Run `make book`"):
            Chapter("tiny", 1, tiny).require_fresh()
    finally:
        path.write_text(before)
    assert Chapter("tiny", 1, tiny).stale() is None


def test_an_edit_that_a_chapter_does_not_touch_leaves_it_fresh(tiny):
    (tiny / "lossbook/unrelated.py").write_text("x = 1\n")
    (tiny / "data/unrelated.txt").write_text("x")
    assert Chapter("tiny", 1, tiny).stale() is None


def test_pieces_of_one_stream_are_joined():
    def piece(text, name="stdout"):
        return nbformat.v4.new_output("stream", name=name, text=text)

    shown = nbformat.v4.new_output("display_data", {"text/plain": "a"})
    outputs = [piece("one\n"), piece("two\n"), piece("!", "stderr"), piece("three\n"), shown, piece("four\n")]
    found = [(output.get("name"), output.get("text")) for output in joined(outputs)]
    assert found == [
        *[("stdout", "one\ntwo\n"), ("stderr", "!"), ("stdout", "three\n")],
        *[(None, None), ("stdout", "four\n")],
    ]
    assert joined([]) == []


def test_an_edit_of_prose_renews_the_notebook_without_executing(tiny):
    source = tiny / "chapters/tiny.md"
    before = source.read_text()
    try:
        source.write_text(before.replace("# A tiny chapter", "# A small chapter"))
        done = run(tiny, "tools.execute", check=True)
        assert "text of the notebook renewed" in done.stderr
        assert "executing" not in done.stderr
        assert "# A small chapter" in (tiny / "chapters/tiny.ipynb").read_text()
    finally:
        source.write_text(before)
        run(tiny, "tools.execute", check=True)


def test_the_page_marks_a_record_whose_code_has_changed(tiny):
    """Told by the build alone: neither the page's text nor what it executed has changed."""
    source, experiment = tiny / "chapters/tiny.md", tiny / "experiments/tiny.py"
    before = source.read_text()
    experiment.parent.mkdir()
    experiment.write_text("from lossbook.tiny import f\n\nX = f(1)\n")
    record = {
        "slug": "tiny", "scale": "cpu", "baseline": "a", "metrics": {}, "tasks": [], "runs": [], "seconds": 90,
        "date": "2026-01-02", "commit": None, "changed": None, "code": deciding_code("tiny", tiny),
        "environments": [{"machine": {"device": "cuda", "gpu": "NVIDIA H200"}, "versions": {"torch": "2.11.0"}}],
    }  # fmt: skip
    (tiny / "data/results/tiny.json").write_text(json.dumps(record))
    try:
        source.write_text(before + "\n{stamp}`record`\n")
        run(tiny, "tools.execute", check=True)
        assert run(tiny, "tools.build").returncode == 0
        assert "on NVIDIA H200, torch 2.11.0, 2026-01-02, no commit." in page(tiny)
        assert "Outdated" not in page(tiny)
        experiment.write_text("from lossbook.tiny import f\n\nX = f(1)  # a remark\n")
        assert run(tiny, "tools.build").returncode == 0
        assert "Outdated" not in page(tiny)
        experiment.write_text("from lossbook.tiny import f\n\nX = f(2)\n")
        assert run(tiny, "tools.build").returncode == 0
        assert "<strong>Outdated: <code" in page(tiny)
        assert "experiments/tiny.py" in page(tiny)
        assert "Outdated" not in (tiny / "chapters/tiny.ipynb").read_text()
        run(tiny, "tools.execute", check=True)
        assert "**Outdated: `experiments/tiny.py` changed" in (tiny / "chapters/tiny.ipynb").read_text()
    finally:
        shutil.rmtree(experiment.parent)
        source.write_text(before)
        run(tiny, "tools.execute", check=True)


@pytest.fixture(scope="module")
def book(tiny):
    """The small book, built, with a page that cites and one that lists a module's functions."""
    (tiny / "chapters/listing.md").write_text(
        "# Listing\n\n{stamp}`compat`\n\n```{eval-rst}\n.. automodule:: lossbook.tiny\n```\n"
    )
    (tiny / "index.md").write_text(
        "# Tiny book\n\nSee {doc}`chapters/tiny` and {eq}`tiny-f` by {cite:t}`su2020multilabel`.\n\n"
        "```{bibliography}\n```\n"
    )
    (tiny / "_toc.yml").write_text((tiny / "_toc.yml").read_text() + "  - file: chapters/listing\n")
    made = run(tiny, "tools.book")
    assert made.returncode == 0, made.stderr
    assert made.stdout.startswith("The book is built.")
    return tiny


def built(root, name):
    return (root / "_build/html" / name).read_text(encoding="utf-8")


def test_an_unchanged_book_is_left_alone(book):
    def files():
        return {path: path.stat().st_mtime_ns for path in (book / "_build").rglob("*") if path.is_file()}

    before = files()
    (book / "docs").mkdir()
    (book / "docs/x.py").write_text("no page depends on it")
    again = run(book, "tools.book", check=True)
    assert again.stdout.startswith("Nothing has changed since the book was built.")
    assert files() == before


# file, old, new, the page that shows it, what it shows; a page's own text and what others show of it apart, since the
# second lets the build start clean and would hide that the first is not seen
EDITS = {
    "text": [("chapters/tiny.md", "The answer of", "The response of", "chapters/tiny.html", "The response of")],
    "module": [("lossbook/_helper.py", "TWO = 2", "TWO = 3", "chapters/tiny.html", ">62<")],
    "data": [("data/offset.txt", "2", "5", "chapters/tiny.html", ">45<")],
    "docstring": [
        ("lossbook/tiny.py", "def f(x):\n", 'def f(x):\n    """Twice."""\n', "chapters/listing.html", "Twice.")
    ],
    "title and number": [
        ("chapters/tiny.md", "# A tiny", "# A small", "chapters/listing.html", "A small chapter"),
        ("chapters/tiny.md", "The answer", "$$\nx\n$$ (first)\n\nThe answer", "index.html", "(1.2)"),
    ],
    "style": [("_static/book.css", "/* The theme", "/* New. The theme", "_static/book.css", "/* New. The theme")],
    "the rest": [
        ("_config.yml", "html_title: lossbook", "html_title: another", "index.html", "another</title>"),
        ("pyproject.toml", 'Documentation = "', 'Documentation = "https://new.', "index.html", 'canonical" href="https://new.'),
        ("pyproject.toml", 'Repository = "', 'Repository = "https://other.', "index.html", 'href="https://other.'),
        ("_toc.yml", "caption: Chapters", "caption: Portions", "chapters/tiny.html", ">Portions<"),
        ("references.bib", "{Su, Jianlin}", "{Liang, Jianlin}", "index.html", "Liang"),
        ("tools/paired.py", "(cell.source", "(cell.source.replace('The ', 'Edited ')", "chapters/tiny.html", "Edited "),
    ],
}  # fmt: skip


@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
def test_every_edit_reaches_the_page(book, edits):
    before = {file: (book / file).read_text() for file, *_ in edits}
    try:
        for file, old, new, page, shown in edits:
            assert shown not in built(book, page)
            text = (book / file).read_text()
            assert old in text
            (book / file).write_text(text.replace(old, new, 1))
        made = run(book, "tools.book")
        assert made.returncode == 0, made.stderr
        for *_, page, shown in edits:
            assert shown in built(book, page)
    finally:
        for file, text in before.items():
            (book / file).write_text(text)


@pytest.mark.parametrize(
    "file", ["requirements.lock", "pyproject.toml", "_static/book.css", "tools/paired.py", "new.md"]
)
def test_what_sphinx_does_not_follow_starts_clean(tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    before = state(tmp_path)
    assert state(tmp_path) == before
    (tmp_path / file).write_text("x")
    assert state(tmp_path) != before
    assert needs_clean(before, state(tmp_path))
    assert needs_clean({}, before)


def test_an_installed_package_starts_clean(tmp_path, monkeypatch):
    before = state(tmp_path)
    (tmp_path / "other").mkdir()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "other")})
    assert needs_clean(before, state(tmp_path))


def test_the_record_of_the_versions_of_torch_reaches_its_page(book):
    assert "<table" not in built(book, "chapters/listing.html"), "no record, no table"
    path = book / compat.RECORD
    path.write_text(json.dumps(COMPAT))
    try:
        made = run(book, "tools.book")
        assert made.returncode == 0, made.stderr
        page = re.sub(r"<[^>]+>|\s+", " ", built(book, "chapters/listing.html"))
        assert re.search(
            r"torch +NumPy +passed +failed +skipped +2\.6\.0 +1\.26\.4 +7 +1 +2 +2\.14\.1 +2\.4\.6 +9 +0 +0", page
        )
    finally:
        path.unlink()


def test_a_lost_page_and_a_failed_build_are_made_good(book):
    run(book, "tools.book", check=True)
    (book / "_build/html/index.html").unlink()
    assert run(book, "tools.book", check=True).stdout.startswith("The book is built.")
    assert (book / "_build/html/index.html").exists()
    index, before = book / "index.md", (book / "index.md").read_text()
    try:
        index.write_text(before + "\n{eq}`nowhere`\n")
        for _ in range(2):
            failed = run(book, "tools.book")
            assert failed.returncode == 1
            assert "nowhere" in failed.stderr
    finally:
        index.write_text(before)
    assert run(book, "tools.book", check=True).stdout.startswith("The book is built.")


def test_a_page_with_cells_that_is_no_chapter_is_executed_too(tiny):
    toc, before = tiny / "_toc.yml", (tiny / "_toc.yml").read_text()
    more = tiny / "chapters/more.md"
    more.write_text(TINY.replace("slug: tiny", "slug: more").replace(" (tiny-f)", "").replace("tiny chapter", "page"))
    toc.write_text(before + "- caption: More\n  chapters:\n  - file: chapters/more\n")
    try:
        assert [page.number for page in all_notebooks(tiny)] == [1, None]
        assert [chapter.slug for chapter in all_chapters(tiny)] == ["tiny"]
        assert "chapters/more.md is stale: it has not been executed yet" in run(tiny, "tools.build").stderr
        run(tiny, "tools.execute", check=True)
        assert run(tiny, "tools.build").returncode == 0
        html = (tiny / "_build/html/chapters/more.html").read_text()
        assert ">42<" in html
        assert "blob/main/chapters/more.ipynb" in html
    finally:
        toc.write_text(before)
        more.unlink()
        more.with_suffix(".ipynb").unlink(missing_ok=True)


def test_a_page_shows_the_numbers_of_another(tiny):
    """The page that is executed first may take numbers from those behind it, and is built anew when they change."""
    toc, before = tiny / "_toc.yml", (tiny / "_toc.yml").read_text()
    source, evidence, index = tiny / "chapters/tiny.md", tiny / "chapters/tiny_evidence.md", tiny / "index.md"
    kept, front, helper = source.read_text(), index.read_text(), tiny / "lossbook/_helper.py"
    cells = "from lossbook.claims import glue\nfrom lossbook.tiny import f\n\nglue('far', f(500))\n"
    head, _, _ = TINY.replace("slug: tiny", "slug: tiny_evidence").partition("# A tiny")
    evidence.write_text(
        f"{head}# Evidence\n\n$$ y $$ (tiny-y)\n\n{{bound}}`tiny:answer` again.\n\n"
        f"```{{code-cell}} ipython3\n{cells}```\n"
    )
    sections = "    sections:\n    - file: chapters/tiny_evidence\n"
    try:
        toc.write_text(before.replace("  - file: chapters/tiny\n", "  - file: chapters/tiny\n" + sections))
        pages = all_notebooks(tiny)
        assert [(page.number, page.kind, page.main) for page in pages] == [
            (1, "chapter", "tiny"),
            (1, "evidence", "tiny"),
        ]
        assert [page.slug for page in pages_of(all_chapters(tiny)[0])] == ["tiny", "tiny_evidence"]
        source.write_text(kept + "\nFar is {bound}`tiny_evidence:far`, see {eq}`tiny-y`.\n")
        index.write_text(front + "\nFrom afar {bound}`tiny_evidence:far`.\n")
        run(tiny, "tools.execute", check=True)
        assert "Far is 1,000, see (1.2)." in (tiny / "chapters/tiny.ipynb").read_text()
        assert "42 again." in (tiny / "chapters/tiny_evidence.ipynb").read_text()
        done = run(tiny, "tools.build")
        assert done.returncode == 0, done.stderr
        assert "Far is 1,000, see" in page(tiny)
        assert "From afar 1,000" in built(tiny, "index.html")
        numbers = re.findall(r'class="eqno">\(([\d.]+)\)', page(tiny) + built(tiny, "chapters/tiny_evidence.html"))
        assert numbers == ["1.1", "1.2"]
        helper.write_text("TWO = 3\n")
        run(tiny, "tools.execute", "tiny_evidence", check=True)
        assert "Far is 1,000" in (tiny / "chapters/tiny.ipynb").read_text(), "a stale page is left alone"
        run(tiny, "tools.execute", check=True)
        assert "Far is 1,500" in (tiny / "chapters/tiny.ipynb").read_text()
        assert run(tiny, "tools.build").returncode == 0
        assert "Far is 1,500" in page(tiny)
        assert "From afar 1,500" in built(tiny, "index.html")
        for name in ("tiny", "tiny_evidence"):
            (tiny / f"chapters/{name}.ipynb").unlink()
        run(tiny, "tools.execute", "--jobs", "2", check=True)
        assert "Far is 1,500" in (tiny / "chapters/tiny.ipynb").read_text()
        assert {"tiny", "tiny_evidence"} <= set(json.loads((tiny / reader.TIMINGS).read_text()))
        source.write_text(kept + "\nFar is {bound}`tiny_evidence:near`.\n")
        message = "chapters/tiny.md: {bound}`tiny_evidence:near`: no cell of chapters/tiny_evidence.md glues 'near'"
        assert message in run(tiny, "tools.execute").stderr
        assert message in run(tiny, "tools.build").stderr
    finally:
        helper.write_text("TWO = 2\n")
        toc.write_text(before)
        source.write_text(kept)
        index.write_text(front)
        evidence.unlink()
        evidence.with_suffix(".ipynb").unlink(missing_ok=True)
        run(tiny, "tools.execute", check=True)


def test_an_error_in_the_text_is_told_before_the_cells_run(tiny):
    source = tiny / "chapters/tiny.md"
    before = source.read_text()
    try:
        source.write_text(before.replace("f(20) + offset\n```", "1 / 0\n```") + "\n{numref}`x` {glue:text}`later`\n")
        done = run(tiny, "tools.execute")
        assert "chapters/tiny.md, cell 3: the role {numref} has no form in a reader's notebook" in done.stderr
        assert "executing" not in done.stderr
    finally:
        source.write_text(before)


def test_a_failing_chapter_keeps_its_old_notebook(tiny):
    source, notebook = tiny / "chapters/tiny.md", tiny / "chapters/tiny.ipynb"
    before, kept = source.read_text(), notebook.read_text()
    try:
        source.write_text(before.replace("f(20) + offset\n```", "f(20) / 0\n```"))
        done = run(tiny, "tools.execute")
        assert done.returncode == 1
        assert "a cell failed, the old notebook is kept" in done.stderr
        assert "ZeroDivisionError" in done.stderr
        assert notebook.read_text() == kept
    finally:
        source.write_text(before)


def test_an_unknown_chapter_is_named(tiny):
    done = run(tiny, "tools.execute", "huge")
    assert done.returncode == 2
    assert "no such chapter: huge; there are tiny" in done.stderr


def test_a_reference_without_a_link_is_named(tmp_path):
    (tmp_path / "references.bib").write_text("@misc{su2020, author = {Su, J}, year = {2020}}", encoding="utf-8")
    with pytest.raises(SourceError, match=r"references.bib: the entry su2020 has no url"):
        reader.citations(tmp_path)
