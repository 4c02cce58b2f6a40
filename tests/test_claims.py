"""Claims, glued numbers as MyST-NB reads them, and shown sources."""

import ast
import builtins
import importlib
import inspect

import nbformat
import numpy as np
import pytest
import torch
from myst_nb.core.variables import format_plain_text
from myst_nb.ext.glue import extract_glue_data_cell
from nbclient import NotebookClient

from lossbook import claims
from lossbook.claims import ClaimError, as_text, claim, glue, show_source, typeset
from lossbook.training import Runs


@pytest.mark.parametrize("true", [True, np.True_, np.array(True), torch.tensor(True)])
def test_a_claim_that_holds(capsys, true):
    claim("it is more", true, ours=0.51999, runs=Runs((0.5, 0.6)), count=3)
    assert capsys.readouterr().out == "✓ it is more (ours = 0.52, runs = 0.55 ± 0.07 (2 seeds), count = 3)\n"


def test_a_claim_without_numbers(capsys):
    claim("it is so", True)
    assert capsys.readouterr().out == "✓ it is so\n"


@pytest.mark.parametrize("false", [False, np.False_, np.array(False), torch.tensor(False)])
def test_a_claim_that_does_not_hold(capsys, false):
    with pytest.raises(ClaimError, match=r"^does not hold: it is more \(a = 0.1, b = 1e−09\)$") as caught:
        claim("it is more", false, a=0.1, b=1e-9)
    assert isinstance(caught.value, AssertionError)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("condition", "got"),
    [
        (1, "int 1"),
        (None, "NoneType None"),
        ("yes", "str 'yes'"),
        (np.array([True]), r"array of shape \(1,\)"),
        (np.array([True, True]), r"array of shape \(2,\)"),
        (torch.tensor([True]), r"bool tensor of shape \(1,\)"),
        (torch.tensor(1.0), "float 1.0"),
        (np.float64(1.0), r"float64 np.float64\(1.0\)"),
    ],
)
def test_a_claim_needs_one_truth_value(condition, got):
    with pytest.raises(TypeError, match=f"condition must be one truth value, got {got}"):
        claim("it is so", condition)


@pytest.mark.parametrize(
    ("value", "fmt", "text"),
    [
        (0.123456, None, "0.123"),
        (np.float32(0.5), None, "0.5"),
        (torch.tensor(0.25), ".2f", "0.25"),
        (np.array(7), None, "7"),
        (2297, None, "2,297"),
        (np.int64(-12345), None, "−12,345"),
        (12345, ",", "12,345"),
        (-0.04, "+.1f", "0.0"),
        (-1.5, ".1f", "−1.5"),
        (float("-inf"), None, "−inf"),
        ("0.50", None, "0.50"),
        (True, None, "True"),
        (Runs((0.5, 0.6)), ".1%", "55.0% ± 7.1% (2 seeds)"),
    ],
)
def test_text_of_a_value(value, fmt, text):
    assert as_text(value, fmt) == text
    assert glue("name", value, fmt) == text  # outside a notebook: the text and nothing else


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("-0.0 ± 0.2", "0.0 ± 0.2"),
        ("+0.00", "0.00"),
        ("-40000", "−40,000"),
        ("-0", "0"),
        ("-0.04 to -0.0", "−0.04 to 0.0"),
        ("(-5.3 to +3.0)", "(−5.3 to +3.0)"),
        ("-1.608e-06", "−1.608e−06"),
        ("10000 of 43410", "10,000 of 43,410"),
        ("256 x 32000 x 128", "256 × 32,000 × 128"),
        # as they are: names, ranges, dates, versions, numbers of posts and papers, code
        *[
            (text, text)
            for text in ("tmc2007-500", "0.1-0.3", "2026-11-30", "arXiv 2009.14119", "x[:, -i]", "post 8888")
        ],
        *[(text, text) for text in ("1234567.5 s", "+0.04", "a - 1", "v1-10000", "98,304", "0123456a")],
    ],
)
def test_numbers_are_set_as_in_a_book(text, shown):
    assert typeset(text) == shown
    assert typeset(shown) == shown


def test_glue_outside_a_notebook_shows_nothing(capsys):
    assert glue("x", 0.5, ".2f") == "0.50"
    assert capsys.readouterr().out == ""


def test_what_is_sent_to_the_notebook(monkeypatch):
    import IPython.display

    sent = []
    monkeypatch.setattr(claims, "_in_notebook", lambda: True)
    monkeypatch.setattr(IPython.display, "display", lambda *args, **options: sent.append((*args, options)))
    assert glue("x", 0.5, ".2f") is None
    show_source(sample)
    assert sent[0] == (
        {"application/papermill.record/text/plain": "'0.50'"},
        {"raw": True, "metadata": {"scrapbook": {"name": "x", "mime_prefix": "application/papermill.record/"}}},
    )
    shown, options = sent[1]
    assert shown.data == (
        "```python\ndef sample(x):\n    # stays: log(0) would be -inf\n    return x + 1  # stays too\n```"
    )
    assert options == {}


@pytest.mark.parametrize("name", ["", "a:b", "a::b"])
def test_glue_names(name):
    with pytest.raises(ValueError, match="name must be some text without a colon"):
        glue(name, 1)


def test_outside_ipython(monkeypatch, capsys):
    real = builtins.__import__

    def without_ipython(name, *args, **kwargs):
        if name.startswith("IPython"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_ipython)
    assert glue("x", 3) == "3"
    show_source(sample)
    assert "return" in capsys.readouterr().out


def sample(x):
    """Gone.

    All of it.
    """
    # stays: log(0) would be -inf
    return x + 1  # stays too


def test_source_without_docstring_with_comments(capsys):
    show_source(sample)
    expected = "def sample(x):\n    # stays: log(0) would be -inf\n    return x + 1  # stays too\n"
    assert capsys.readouterr().out == expected


NESTED = '''\
class A:
    """Gone."""

    b = """stays"""

    def f(self):
        """Gone: one line."""
        return 1

    def g(self):
        """The whole body."""

    async def h(self): "stays, on the line of its def"
'''


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            NESTED,
            'class A:\n\n    b = """stays"""\n\n    def f(self):\n        return 1\n\n    def g(self):\n        ...\n\n'
            '    async def h(self): "stays, on the line of its def"',
        ),
        ("x = 1\n", "x = 1"),
        ('def f():\n    """Not\n    here."""\n    "no docstring"', 'def f():\n    "no docstring"'),
    ],
)
def test_without_docstrings(source, expected):
    assert claims.without_docstrings(source) == expected


@pytest.fixture(scope="module")
def cells():
    """The executed cells of a notebook that glues and shows."""
    sources = [
        "from lossbook.claims import glue, show_source\nfrom lossbook.claims import as_text",
        "texts = {'half': '0.50', 'tuple': '1,000', 'exp': '1e-5', 'text': \"it's\"}\n"
        "for name, value in texts.items():\n    glue(name, value)",
        "glue('number', 0.5, '.2f')",
        "show_source(as_text)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    NotebookClient(notebook, kernel_name="python3", timeout=120).execute()
    return notebook.cells


def test_the_page_reads_glued_text_as_it_is(cells):
    shown = {}
    for cell in cells[1:3]:
        shown |= {
            name: format_plain_text(output["data"]["text/plain"], "s") for name, output in extract_glue_data_cell(cell)
        }
        assert cell.outputs == []  # nothing is left to see on the page
    assert shown == {"half": "0.50", "tuple": "1,000", "exp": "1e−5", "text": "it's", "number": "0.50"}


def test_source_is_shown_as_markdown(cells):
    (output,) = cells[3].outputs
    markdown = output["data"]["text/markdown"]
    assert markdown.startswith("```python\ndef as_text(value: object, fmt: str | None = None) -> str:\n    if ")
    assert markdown.endswith("\n```")
    assert '"""' not in markdown
    assert " at 0x" not in output["data"]["text/plain"]


LONG = """def f(scores: Tensor, targets: Tensor, *, gamma: float = 2.0, alpha: float | None = None, reduction: str = "mean") -> Tensor:
    if (gamma == 2.0 and alpha is None and reduction == "mean") or (gamma == 1.0 and alpha is not None):
        first = function_of_many("a text (with a bracket, and a comma)", scores, targets, gamma, alpha)[0]  # why
    # a long comment, with (brackets) and, commas, which nobody can break at the right place, stays as long as it is
    return torch.where(scores > 0, torch.nn.functional.softplus(scores, beta=gamma), scores).sum(dim=-1).mean()"""  # noqa: E501


def test_long_lines_are_broken_where_a_reader_expects_it():
    narrowed = claims.narrow(LONG)
    assert ast.dump(ast.parse(narrowed)) == ast.dump(ast.parse(LONG))
    assert [line for line in narrowed.splitlines() if len(line) > 88] == [LONG.splitlines()[3]]
    assert narrowed.startswith(
        "def f(\n    scores: Tensor,\n    targets: Tensor,\n    *,\n    gamma: float = 2.0,\n"
        '    alpha: float | None = None,\n    reduction: str = "mean",\n) -> Tensor:\n'
    )
    assert "        # why\n        first = function_of_many" in narrowed
    assert claims.narrow(narrowed) == narrowed
    assert claims.narrow("x = 1") == "x = 1"


@pytest.mark.parametrize("slug", ["multilabel_softmax", "soft_labels", "focal", "am_softmax", "accuracy", "emo"])
def test_every_loss_of_the_package_can_be_shown_in_88_columns(slug):
    module = importlib.import_module(f"lossbook.{slug}")
    for name in module.__all__:
        source = claims.without_docstrings(inspect.getsource(getattr(module, name)))
        long = [line for line in claims.narrow(source).splitlines() if len(line) > 88]
        assert not [line for line in long if line.lstrip()[0] not in '#f"'], name  # comments and texts stay whole
