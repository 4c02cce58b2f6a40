"""What every chapter must have: a verdict that runs, exercises that work, numbers from cells, checked claims."""

import ast
import base64
import re
import shutil
import subprocess
import sys

import nbformat
import pytest

from lossbook.plotting import LOSS
from tools import limits
from tools.chapters import ROOT, all_chapters, all_notebooks, code_cells, pages_of, plain_python
from tools.generated import EXERCISE, QUESTION, run_count
from tools.reader import CODE_SPAN, DISPLAY, ROLE, SETUP_TAG, _outside_fences, bound_value, insert_facts

CHAPTERS = pytest.mark.parametrize("chapter", all_chapters(), ids=lambda c: c.slug)
PARTS = pytest.mark.parametrize("chapter", [p for p in all_notebooks() if p.number], ids=lambda c: c.slug)
PAGES = pytest.mark.parametrize("chapter", all_notebooks(), ids=lambda c: c.slug)  # with those that are no chapters
SOLUTION = re.compile(r"^:::\{admonition\} Solution (\d+\.\d+).*\n:class: dropdown.*\n([\s\S]*?)\n:::$", re.MULTILINE)
PYTHON = re.compile(r"```python\n(.*?)\n```", re.DOTALL)


def source_text(chapter):
    return chapter.source_path.read_text(encoding="utf-8")


def tagged(chapter, tag):
    return [cell for cell in code_cells(chapter.source) if tag in limits.tags(cell)]


def part(chapter, kind):
    """The chapter's page of a kind."""
    (found,) = [page for page in pages_of(chapter) if page.kind == kind]
    return found


# ---------------------------------------------------------------- the anatomy


@CHAPTERS
def test_a_chapter_has_evidence_and_exercises_and_they_link_each_other(chapter):
    assert [page.kind for page in pages_of(chapter)] == ["chapter", "evidence", "exercises"]
    text = source_text(chapter)
    assert text.count(f"({chapter.slug}_evidence.md") >= 2, "the verdict and sentences of the text lead to the evidence"
    assert f"({chapter.slug}_exercises.md)" in text.split("{admonition} Question 3")[1], (
        "the end leads to the exercises"
    )
    for page in pages_of(chapter)[1:]:
        assert re.search(rf"\({chapter.slug}\.md[#)]", source_text(page)), "a way back to the chapter"
    assert source_text(part(chapter, "evidence")).split("\n# ")[1].startswith("Evidence: ")
    assert source_text(part(chapter, "exercises")).split("\n# ")[1].startswith("Exercises: ")


@CHAPTERS
def test_the_verdict_is_the_first_thing(chapter):
    first = chapter.source.cells[0].source
    assert re.match(r"# [^\n]+\n+:{3,}\{admonition\} [^\n]+\?\n:class: verdict\n", first)
    assert "```bash\npip install lossbook\n```" in first
    assert "{stamp}`time`" in first
    assert "minutes to read" in first
    assert re.search(r"\{(?:glue:text|bound)\}", first), "a verdict has numbers"
    assert "imports" in limits.tags(chapter.source.cells[1])
    assert "cover" in limits.tags(chapter.source.cells[2]), "a small picture follows"


def verdict_inputs(slug):
    """What the lines of code of each verdict speak of."""
    import torch

    rows, labels, size = 8, 20, 16
    torch.manual_seed(0)
    space = {
        "scores": torch.randn(rows, labels, requires_grad=True),
        "targets": (torch.rand(rows, labels) < 0.2).float(),
        "target": torch.randint(labels, (rows,)),
    }
    return space | VERDICTS.get(slug, lambda *_: {})(torch, rows, labels, size)


# What the lines of each verdict need beyond `scores` (8, 20), `targets` of 0 and 1 and `target`, a class a row.
VERDICTS = {
    "soft_labels": lambda torch, rows, labels, size: {
        "targets": torch.rand(rows, labels),
        "other": torch.randn(rows, labels),
        "x": torch.randn(rows, size),
    },
    "am_softmax": lambda torch, rows, labels, size: {
        "embeddings": torch.randn(rows, size, requires_grad=True),
        "embedding": torch.randn(rows, size, requires_grad=True),
        "size": size,
        "classes": labels,
        "targets": torch.randint(labels, (rows,)),
        "labels": torch.randint(labels, (rows,)),
    },
    "accuracy": lambda torch, rows, labels, size: {"step": 60, "steps": 100},
    "emo": lambda torch, rows, labels, size: {
        "targets": torch.randint(labels, (rows,)),
        "hidden": torch.randn(rows, size, requires_grad=True),
        "weight": torch.randn(labels, size, requires_grad=True),
        "vectors": torch.randn(labels, size),
        "embeddings": torch.randn(labels, size),
    },
    "spans": lambda torch, rows, labels, size: {
        "features": torch.randn(2, 6, size),
        "spans": [[(0, 1, 2), (2, 5, 5)], [(1, 0, 3)]],
        "lengths": torch.tensor([6, 4]),
        "length": 6,
        "num_types": 3,
        "size": size,
        "bias": torch.zeros(3, 1, 1, requires_grad=True),
        "target": torch.zeros(2, 3, 6, 6),
        "F": torch.nn.functional,
    },
}


@CHAPTERS
def test_the_lines_of_the_verdict_run(chapter):
    import torch

    space = verdict_inputs(chapter.slug)
    code = "\n".join(PYTHON.findall(chapter.source.cells[0].source))
    assert len(code.splitlines()) <= 12
    assert "from lossbook" in code
    exec(code, space)
    assert isinstance(space["loss"], torch.Tensor), "the lines end in a loss"
    assert space["loss"].isfinite().all()
    space["loss"].sum().backward()


@CHAPTERS
def test_there_are_three_questions_with_explained_answers(chapter):
    questions = QUESTION.findall(source_text(chapter))
    assert [number for number, *_ in questions] == ["1", "2", "3"]
    for _, title, answer in questions:
        assert title.endswith("?")
        assert len(answer.split()) >= 20, f"explain the answer: {title}"


@CHAPTERS
def test_one_figure_can_be_touched(chapter):
    (cell,) = tagged(chapter, "touch")
    assert f'touch("{chapter.slug}")' in cell.source
    assert {"hide-input", "nbval-ignore-output"} <= limits.tags(cell)


@CHAPTERS
def test_the_formula_is_shown_as_the_package_has_it(chapter):
    outputs = [output for cell in code_cells(chapter.notebook) for output in cell.outputs]
    shown = [limits.listing(output) for output in outputs if limits.listing(output)]
    assert shown, "show_source(lossbook....)"
    assert max(map(len, shown)) <= 25


# ---------------------------------------------------------------- limits


@PARTS
def test_limits(chapter):
    assert limits.size(chapter).passed(chapter.kind) == []


@PARTS
def test_one_sentence_a_line(chapter):
    assert limits.sentences_inside(chapter) == []


@PARTS
def test_claims_and_setting_up_are_out_of_sight(chapter):
    """The text of a chapter says what its claims check; on the evidence page they are folded."""
    for cell in code_cells(chapter.source):
        if re.search(r"^ *claim\(", cell.source, re.MULTILINE) and "exercise" not in limits.tags(cell):
            allowed = {"remove-cell"} if chapter.kind == "chapter" else {"remove-cell", "hide-cell", "hide-input"}
            assert limits.tags(cell) & allowed, cell.source[:80]
    for cell in tagged(chapter, "imports"):
        assert limits.tags(cell) & limits.FOLDED


def looks(tree):
    """Of Python code: each name of a loss that gets a label or a key, with the expressions that colour it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            given = {word.arg: word.value for word in node.keywords if word.arg}
            if isinstance(label := given.get("label"), ast.Constant):
                yield label.value, [given[key] for key in ("c", "color", "linestyle", "ls") if key in given]
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and re.match(r"COLORS\b|['\"]#", ast.unparse(value)):
                    yield key.value, [value]


@PAGES
def test_one_loss_has_one_colour_everywhere(chapter):
    for cell in code_cells(chapter.source):
        for name, colours in looks(ast.parse(plain_python(cell.source))):
            if name in LOSS:
                for colour in colours:
                    assert f"LOSS['{name}']" in ast.unparse(colour), f"{name} is drawn in {ast.unparse(colour)}"


# ---------------------------------------------------------------- exercises


def exercises():
    """Chapter, number, stub, checks and solution of every exercise."""
    for chapter in [page for page in all_notebooks() if page.kind == "exercises"]:
        solutions = {number: "\n".join(PYTHON.findall(body)) for number, body in SOLUTION.findall(source_text(chapter))}
        for cell in tagged(chapter, "exercise"):
            number = re.search(r'with exercise\("([\d.]+)"', cell.source).group(1)
            stub, checks = re.split(r"^(?=with exercise)", cell.source, maxsplit=1, flags=re.MULTILINE)
            yield pytest.param(chapter, number, stub, checks, solutions.get(number, ""), id=f"{chapter.slug}-{number}")


def attempt(chapter, code, checks):
    """Run code and checks in a fresh namespace that has the chapter's imports; say whether the exercise is solved."""
    space: dict = {}
    for cell in tagged(chapter, "imports"):
        exec(cell.source, space)
    exec(code, space)
    exec(re.sub(r"^(with exercise\([^)]*\)):", r"\1 as status:", checks, count=1), space)
    return space["status"].solved


@pytest.mark.parametrize(("chapter", "number", "stub", "checks", "solution"), list(exercises()))
def test_the_stub_fails_and_the_solution_passes(chapter, number, stub, checks, solution, capsys):
    assert attempt(chapter, stub, checks) is False
    assert "still open" in capsys.readouterr().out
    assert solution, f"exercise {number} has no solution"
    assert attempt(chapter, stub + "\n" + solution, checks) is True


@CHAPTERS
def test_there_are_five_exercises_or_more_each_with_text_stub_and_solution(chapter):
    page = part(chapter, "exercises")
    text = source_text(page)
    numbers = [number for number, *_ in EXERCISE.findall(text)]
    assert numbers == [f"{chapter.number}.{i}" for i in range(1, len(numbers) + 1)]
    assert len(numbers) == text.count("{admonition} Exercise") >= 5, "each with its difficulty and minutes"
    assert numbers == [number for number, _ in SOLUTION.findall(text)]
    assert numbers == [re.search(r'with exercise\("([\d.]+)"', c.source).group(1) for c in tagged(page, "exercise")]
    assert "{admonition} Exercise" not in source_text(chapter)


# ---------------------------------------------------------------- truth


@PAGES
def test_numbers_in_prose_come_from_cells(chapter):
    """A result has a decimal point or a percent sign; in prose it may stand only through {glue} or {stamp}."""
    for cell in chapter.source.cells:
        if cell.cell_type != "markdown":
            continue
        prose = "\n".join(part for _, part in _outside_fences(cell.source))
        prose = "\n".join(line for line in prose.split("\n") if not line.startswith((":::", "#")))
        for taken in (DISPLAY, ROLE, CODE_SPAN):
            prose = taken.sub(" ", prose)
        prose = re.sub(r"\$[^$]+\$", " ", insert_facts(prose, {}))
        typed = re.findall(r"[^\s]*\d\.\d[^\s]*|\d+(?:\.\d+)? ?(?:%|percent\b)", prose)
        assert not typed, f"bind these to a cell with glue: {typed}"


@CHAPTERS
def test_claims_are_checked_cells(chapter):
    pages = [chapter, part(chapter, "evidence")]
    printed = [o.text for page in pages for c in code_cells(page.notebook) for o in c.outputs if "text" in o]
    assert sum(text.count("✓") for text in printed) >= 6


@PAGES
def test_a_page_that_shows_a_record_says_where_it_comes_from(chapter):
    code = "\n".join(cell.source for cell in code_cells(chapter.source))
    text = source_text(chapter)
    for slug in re.findall(r'Record\.load\("(\w+)"', code):
        assert f"{{stamp}}`record{'' if slug == chapter.main else '_' + slug}`" in text
    if chapter.kind == "chapter":
        assert f'Record.load("{chapter.slug}"' in code


@CHAPTERS
def test_at_least_six_cells_are_compared_exactly(chapter):
    compared = [
        c
        for page in (chapter, part(chapter, "evidence"))
        for c in code_cells(page.notebook)
        if "nbval-ignore-output" not in limits.tags(c)
        and any(o.output_type == "stream" and o.name == "stdout" for o in c.outputs)
    ]
    assert len(compared) >= 6


def figures_of(chapter):
    """The cells whose stored outputs hold a picture."""
    pairs = zip(code_cells(chapter.source), code_cells(chapter.notebook), strict=True)
    return [source for source, stored in pairs if any("image/png" in o.get("data", {}) for o in stored.outputs)]


@CHAPTERS
def test_there_are_four_figures(chapter):
    assert len(figures_of(chapter)) >= 4


@PAGES
def test_every_figure_has_alt_text(chapter):
    for source in figures_of(chapter):
        alt = source.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert len(alt) > 60, f"say in `mystnb: image: alt` what is to be seen in: {source.source[:80]}"


@PARTS
def test_text_in_figures_can_be_read_on_a_phone(chapter):
    """Of 390 pixels a figure has 358: at most 6 inches wide, 11 points or more are 9 pixels or more there."""
    for cell in code_cells(chapter.notebook):
        for output in cell.outputs:
            if picture := output.get("data", {}).get("image/png"):
                width = int.from_bytes(base64.b64decode(picture)[16:20], "big")
                assert width <= 6.15 * 144, f"{width / 144:.2f} inches: {cell.source[:80]}"
    for cell in code_cells(chapter.source):
        for node in ast.walk(ast.parse(plain_python(cell.source))):
            if isinstance(node, ast.keyword) and node.arg in ("fontsize", "labelsize"):
                small = isinstance(node.value, ast.Constant) and node.value.value in (*range(11), "small", "x-small")
                assert not small, f"{ast.unparse(node)} in {cell.source[:80]}"


@CHAPTERS
def test_one_figure_is_the_cover(chapter):
    (cover,) = [i for i, c in enumerate(code_cells(chapter.source)) if "cover" in limits.tags(c)]
    assert any("image/png" in o.get("data", {}) for o in code_cells(chapter.notebook)[cover].outputs)


def test_links_to_headings_lead_somewhere_in_the_readers_notebooks():
    texts = {c.notebook_path.name: "".join(cell.source for cell in c.notebook.cells) for c in all_notebooks()}
    anchors = {name: set(re.findall(r'<a id="([\w:.-]+)"', text)) for name, text in texts.items()}
    links = [
        (name, page or name, label)
        for name, text in texts.items()
        for page, label in re.findall(r"\]\((\w+\.ipynb)?#([\w:.-]+)\)", text)
    ]
    assert len(links) > 50
    assert not [link for link in links if link[2] not in anchors[link[1]]]


@PAGES
def test_no_cell_leaves_an_error_or_a_progress_bar(chapter):
    for cell in code_cells(chapter.notebook):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


# ---------------------------------------------------------------- nbval sees a wrong loss


def nbval(notebook, package_root):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-current-env",
        "-q",
        "-p",
        "no:cacheprovider",
        str(notebook),
    ]
    environment = {
        "PYTHONPATH": str(package_root),
        "PATH": "/usr/bin:/bin",
        "HOME": str(package_root),
        "LOSSBOOK_DEVICE": "cpu",
    }
    return subprocess.run(command, cwd=package_root, env=environment, capture_output=True, text=True)


@CHAPTERS
def test_nbval_fails_when_a_sign_in_the_loss_is_flipped(chapter, tmp_path):
    """On copies of chapter and evidence without the cells that train, whose outputs are not compared."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "lossbook", tmp_path / "lossbook", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "data", tmp_path / "data")
    needed = {"lossbook-live", "nbval-ignore-output", SETUP_TAG}
    copies = tmp_path / "copies"
    copies.mkdir()
    for page in (chapter, part(chapter, "evidence")):
        notebook = nbformat.from_dict(page.notebook)
        notebook.cells = [c for c in notebook.cells if c.cell_type == "code" and not needed & limits.tags(c)]
        nbformat.write(notebook, copies / f"{page.slug}.ipynb")

    unchanged = nbval(copies, tmp_path)
    assert unchanged.returncode == 0, unchanged.stdout[-3000:]

    module = tmp_path / "lossbook" / f"{chapter.slug}.py"
    text = module.read_text(encoding="utf-8")
    sign = FLIPS[chapter.slug]
    assert text.count(sign[0]) >= 1
    module.write_text(text.replace(*sign), encoding="utf-8")
    flipped = nbval(copies, tmp_path)
    assert flipped.returncode == 1, flipped.stdout[-3000:]
    assert re.search(r"\d+ failed", flipped.stdout)
    assert "Cell outputs differ" in flipped.stdout


# For each chapter a piece of its module and the same with a sign turned round.
FLIPS: dict[str, tuple[str, str]] = {
    "multilabel_softmax": ("torch.log1p(neg) + torch.log1p(pos)", "torch.log1p(neg) - torch.log1p(pos)"),
    "accuracy": ("(s.gather(-1, t.unsqueeze(-1)) - s) / sigma", "(s - s.gather(-1, t.unsqueeze(-1))) / sigma"),
    "am_softmax": ("softplus(rest - scale", "softplus(rest + scale"),
    "soft_labels": ("sigmoid(2 * (check_scores", "sigmoid(-2 * (check_scores"),
    "emo": ("(c_m.squeeze(-1) + (p", "(c_m.squeeze(-1) - (p"),
    "focal": ("math.log((1 - m) / m)", "math.log(m / (1 - m))"),
    "spans": ("softplus(-s) - (1 - t) * log_rest", "softplus(-s) + (1 - t) * log_rest"),
}


def test_the_page_results_counts_the_runs_of_the_front_page():
    assert bound_value("results:all_runs", ROOT, "a test") == run_count()


# ---------------------------------------------------------------- the page that leads to a loss

CHOOSING = (ROOT / "chapters" / "choosing.md").read_text(encoding="utf-8")
LINES = sorted(set(re.findall(r"`([^`]*\w\([^`]*\))`", CHOOSING)))


def bench(kind="float"):
    """What the lines of code of the page speak of, with the imports that it shows; labels of a kind."""
    space: dict = {}
    exec("\n".join(PYTHON.findall(CHOOSING)), space)
    torch, rows, n, size = space["torch"], 4, 6, 3
    index = torch.tensor([[0, 3], [1, -100], [2, 5], [4, -100]])
    t = torch.zeros(rows, n + 1).scatter(1, index % (n + 1), 1)[:, :n]
    t = t.to(getattr(torch, kind))
    space |= {
        "s": torch.randn(rows, n) + 2 * t.float(),
        "r": torch.randn(rows, n),
        "t": t,
        "index": index,
        "x": torch.randn(rows, 2),
    }
    space |= {"y": torch.arange(rows), "e": torch.randn(rows, size), "h": torch.randn(rows, size), "size": size}
    space |= {"weight": torch.randn(n, size), "vectors": torch.randn(n, size), "groups": n, "w": torch.tensor(3.0)}
    exec("classifier = CosineClassifier(size, groups)", space)
    return space


@pytest.mark.parametrize("kind", ["bool", "int64", "float32"])
@pytest.mark.parametrize("line", LINES)
def test_the_lines_of_the_choosing_page_run(line, kind):
    space = bench(kind)
    before = set(space)
    exec(f"result = {line}" if "=" not in line.split("(")[0] else line, space)
    made = [space[name] for name in ("result", *(set(space) - before)) if name in space]
    assert all(x.isfinite().all() for x in made if isinstance(x, space["torch"].Tensor))


def test_the_choosing_page_uses_every_import_and_links_every_chapter():
    (imports,) = PYTHON.findall(CHOOSING)
    table = CHOOSING[CHOOSING.index(imports) + len(imports) :]
    for name in re.findall(r"\b[a-z]\w*_\w+|CosineClassifier|mixup\b", re.sub(r"from \S+ import", "", imports)):
        assert name in table or name in ("torch",), name
    for chapter in all_chapters():
        assert f"({chapter.slug}.md)" in table
