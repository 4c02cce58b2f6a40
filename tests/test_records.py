"""Means, intervals, paired differences, tables and pictures from records, and what the build says of a record."""

import html.parser
import json
import math

import numpy as np
import pytest
from scipy import stats

from lossbook import records
from lossbook.plotting import INK, LOSS
from lossbook.records import Estimate, Record, Table, plot_differences
from tools import provenance
from tools.provenance import bare, changed_code, deciding_code, record_sentence

VALUES = {
    ("yeast", "BCE"): [0.50, 0.52, 0.51, 0.49, 0.50],
    ("yeast", "focal"): [0.60, 0.61, 0.62, 0.59, 0.61],
    ("yeast", "ASL"): [0.51, 0.50, 0.52, 0.50, 0.49],
    ("bibtex", "BCE"): [0.40, 0.41, 0.42, 0.40, 0.41],
    ("bibtex", "focal"): [0.30, 0.32, 0.31, 0.33, 0.30],
}


def document(values=VALUES, **more):
    runs = [
        {
            "task": task,
            "method": method,
            "settings": {"lr": 0.1},
            "seed": seed,
            "final": True,
            "metrics": {"f1": value, "perplexity": 20 + seed},
            "seconds": 30.0,
            "environment": 0,
        }
        for (task, method), found in values.items()
        for seed, value in enumerate(found, start=1)
    ]
    tuning = {**runs[0], "final": False, "seed": 101, "metrics": {"f1": 0.99}}
    tasks = list(dict.fromkeys(task for task, _ in values))
    return {
        "slug": "focal",
        "scale": "cpu",
        "baseline": "BCE",
        "metrics": {"f1": "micro-F1", "perplexity": "perplexity"},
        "date": "2026-01-02",
        "commit": "0123456789abcdef",
        "changed": False,
        "code": {},
        "seconds": 30.0 * len(runs),
        "environments": [
            {"machine": {"device": "cpu", "cpu": "Some CPU", "threads": 1}, "versions": {"torch": "2.13.0+cpu"}}
        ],
        "tasks": [
            {"name": name, "methods": {"BCE": {"grid": [{"lr": 0.1}], "chosen": {"lr": 0.1}}}, "facts": {"rows": 7}}
            for name in tasks
        ],
        "runs": [tuning, *runs],
        **more,
    }


@pytest.fixture
def record():
    return Record(document())


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(0).normal(size=7)
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    e = Estimate.of(list(values))
    assert (e.low, e.high, e.n) == (pytest.approx(low), pytest.approx(high), 7)
    for scaled in (e * -2, -2 * e):
        assert (scaled.low, scaled.high) == (pytest.approx(-2 * high), pytest.approx(-2 * low))


def test_estimates_of_one_value_of_none_and_of_a_diverged_run():
    one = Estimate.of([0.5])
    assert (one.mean, one.n) == (0.5, 1)
    assert f"{one:.2f}" == "0.50"
    assert math.isnan(one.low)
    with pytest.raises(ValueError, match="at least one"):
        Estimate.of([])
    assert str(Estimate.of([0.5, math.nan])) == "diverged"
    assert f"{Estimate(1.25, 0.5, 3):+.1f}" == "+1.2 ± 0.5"


def test_results_and_paired_differences(record):
    assert record.tasks == ["yeast", "bibtex"]
    assert record.methods("bibtex") == ["BCE", "focal"]
    assert record.values("yeast", "BCE", "f1") == VALUES["yeast", "BCE"]  # the tuning run is not among them
    assert record.result("yeast", "focal", "f1").mean == pytest.approx(0.606)
    gap = np.subtract(VALUES["yeast", "focal"], VALUES["yeast", "BCE"])
    difference = record.difference("yeast", "focal", "f1")
    assert difference.mean == pytest.approx(gap.mean())
    assert difference.half_width == pytest.approx(stats.t.ppf(0.975, 4) * stats.sem(gap))
    assert record.difference("yeast", "BCE", "f1", "focal").mean == pytest.approx(-gap.mean())
    assert record.chosen("yeast", "BCE") == {"lr": 0.1}
    assert record.task("yeast")["facts"] == {"rows": 7}


def test_differences_are_paired_by_seed_not_by_place():
    shuffled = document()
    shuffled["runs"].reverse()
    a, b = Record(document()), Record(shuffled)
    assert a.values("yeast", "focal", "f1") == b.values("yeast", "focal", "f1")
    assert a.difference("yeast", "focal", "f1") == b.difference("yeast", "focal", "f1")


def test_unknown_names_are_errors(record):
    with pytest.raises(KeyError, match="no task 'iris'; there are 'yeast', 'bibtex'"):
        record.task("iris")
    with pytest.raises(KeyError, match="no 'f2' of 'BCE' on 'yeast'"):
        record.values("yeast", "BCE", "f2")
    with pytest.raises(FileNotFoundError, match="make experiments"):
        Record.load("no_such_chapter")


def test_the_record_in_full_size_is_preferred(monkeypatch):
    there = {"focal": document(date="small"), "focal_gpu": document(date="full")}
    monkeypatch.setattr(records, "load_record", there.get)
    assert Record.load("focal").document["date"] == "full"
    del there["focal_gpu"]
    assert Record.load("focal").document["date"] == "small"


def test_a_table_marks_only_sure_differences(record):
    table = record.table("yeast")
    assert table.header == ("yeast", "micro-F1", "perplexity")
    assert table.rows == (
        ("BCE", "50.4 ± 1.4", "23.0 ± 2.0"),
        ("focal", "60.6 ± 1.4 ↑", "23.0 ± 2.0"),
        ("ASL", "50.4 ± 1.4", "23.0 ± 2.0"),
    )
    assert "5 seeds" in table.caption
    assert "in percent" not in table.caption  # one of the two is no share
    assert "in percent" in record.table("yeast", ["f1"]).caption
    down = record.table("yeast", ["f1"], baseline="focal")
    assert [row[1][-1] for row in down.rows] == ["↓", "4", "↓"]


def test_a_plain_metric_is_not_shown_in_percent(monkeypatch):
    assert Record(document()).table("yeast", ["f1"]).rows[0] == ("BCE", "50.4 ± 1.4")
    monkeypatch.setattr(records, "load_record", {"focal": document()}.get)
    plain = Record.load("focal", plain=("f1",))
    assert plain.table("yeast", ["f1"]).rows[0] == ("BCE", "0.504 ± 0.014")
    assert "percent" not in plot_differences(plain, "f1").axes[0].get_xlabel()


def test_a_table_shows_the_metrics_that_a_task_has():
    part = document()
    for run in part["runs"]:
        if run["task"] == "bibtex":
            del run["metrics"]["perplexity"]
    assert Record(part).table("bibtex").header == ("bibtex", "micro-F1")
    assert len(Record(part).table("yeast").header) == 3


def test_an_overview_leaves_empty_what_was_not_measured(record):
    table = record.overview("f1")
    assert table.header == ("micro-F1", "BCE", "focal", "ASL")
    assert [row[0] for row in table.rows] == ["yeast", "bibtex"]
    assert table.rows[1][2].endswith("↓")
    assert table.rows[1][3] == ""
    assert record.overview("f1", ["bibtex"]).header == ("micro-F1", "BCE", "focal")


def test_a_table_as_text_and_as_html():
    table = Table(("a & b", "F1"), (("<x>", "1"), ("long name", "22")), "caption <1>")
    assert str(table).splitlines() == ["a & b      F1", "<x>         1", "long name  22", "caption <1>"]
    assert repr(table) == str(table)
    found = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, *[v for k, v in attrs if k == "scope"]))

        def handle_data(self, data):
            if data.strip():
                found.append(data)

    Reader().feed(table._repr_html_())
    assert ("th", "row") in found
    assert ("th", "col") in found
    assert [x for x in found if isinstance(x, str)] == [
        "caption <1>", "a & b", "F1", "<x>", "1", "long name", "22",
    ]  # fmt: skip


def test_a_table_sets_its_numbers_as_in_a_book():
    table = Table(("-1 x", "F1"), (("a-1", "-0.4 ± 0.3"), ("20000 x 8", "-0.0")), "of 10000 rows")
    assert str(table).splitlines() == [
        "−1 x                F1",
        "a-1         −0.4 ± 0.3",
        "20,000 × 8         0.0",
        "of 10,000 rows",
    ]
    for text in ("−1 x", "−0.4 ± 0.3", "20,000 × 8", ">0.0<", "of 10,000 rows"):
        assert text in table._repr_html_()
    assert table.rows[1] == ("20000 x 8", "-0.0")  # as they were given


def test_the_picture_shows_each_difference(record):
    figure = plot_differences(record, "f1")
    ax = figure.axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["yeast", "focal", "ASL", "bibtex", "focal"]
    dots = [c.lines[0].get_xdata()[0] for c in ax.containers]
    expected = [record.difference(t, m, "f1").mean * 100 for t, m in (("yeast", "focal"), ("yeast", "ASL"))]
    assert dots[:2] == pytest.approx(expected)
    assert dots[2] < 0
    assert ax.get_xlabel() == "micro-F1,\ndifference to BCE, percentage points"
    assert plot_differences(record, "perplexity").axes[0].get_xlabel() == "perplexity,\ndifference to BCE"


def test_a_task_without_the_baseline_is_left_out_of_the_picture():
    values = {**VALUES, ("alone", "focal"): [0.1, 0.2]}
    figure = plot_differences(Record(document(values)), "f1")
    assert "alone" not in [t.get_text() for t in figure.axes[0].get_yticklabels()]


def test_the_picture_of_many_tasks_and_of_one():
    values = {(f"t{i}", m): [0.1 * j, 0.2, 0.3] for i in range(13) for j, m in enumerate(("BCE", "a", "b"))}
    figure = plot_differences(Record(document(values)), "f1")
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [f"t{i}" for i in range(13)]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b"]
    one = plot_differences(Record(document(values)), "f1", ["t3"], baseline="a")
    assert [t.get_text() for t in one.axes[0].get_yticklabels()] == ["BCE", "b"]


def test_a_loss_has_its_look_and_what_is_none_is_grey():
    values = {("t", m): [0.1, 0.2, 0.3] for m in ("BCE", "BCE, mixup", "letter counts", "min-cos")}
    figure = plot_differences(Record(document(values)), "f1")
    points = [container.lines[0] for container in figure.axes[0].containers]
    assert [point.get_color() for point in points] == [LOSS["BCE, mixup"]["color"], INK, LOSS["short form"]["color"]]
    assert [point.get_marker() for point in points] == ["D", "o", "o"]
    assert figure.get_size_inches()[0] == 6


def test_a_diverged_run_leaves_a_gap_in_the_picture_and_a_word_in_the_table():
    values = {**VALUES, ("yeast", "focal"): [0.6, None, 0.6, 0.6, 0.6]}
    broken = Record(document(values))
    assert broken.table("yeast", ["f1"]).rows[1] == ("focal", "diverged")
    assert len(plot_differences(broken, "f1", ["yeast"]).axes[0].containers) == 1


# ---------------------------------------------------------------- where a record comes from


def test_bare_code_has_no_comments_and_no_docstrings():
    code = '"""Module."""\n\n# why\ndef f(x):  # how\n    """Doc\n    string."""\n    return "# no comment"\n'
    assert bare(code) == 'def f(x):\n    return "# no comment"'
    assert bare(code) == bare(code.replace("why", "because").replace("Doc", "Other"))
    assert bare(code) != bare(code.replace("no comment", "text"))
    assert bare("f(\n    a,\n    [\n        b, c\n    ],\n)") == "f(a, [b, c])"  # a formatter's breaks decide nothing
    assert bare('def f(): "one line"\nx = 1') == 'def f(): "one line"\nx = 1'


@pytest.fixture
def book(tmp_path):
    """A small book with one experiment."""
    files = {
        "experiments/focal.py": "import torch\nfrom lossbook.focal import loss\nfrom experiments.shared import x\n",
        "experiments/shared.py": "x = 1\n",
        "lossbook/__init__.py": "version = 1\n",
        "lossbook/focal.py": "from lossbook._common import check\n\ndef loss(): return 1\n",
        "lossbook/_common.py": "check = 1\n",
        "lossbook/emo.py": "other = 1\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def put_record(book, name="focal", **more):
    path = book / "data" / "results" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(code=deciding_code("focal", book), **more)), encoding="utf-8")


def test_the_deciding_code_is_what_the_experiment_imports(book):
    assert set(deciding_code("focal", book)) == {
        "experiments/focal.py",
        "experiments/shared.py",
        "lossbook/_common.py",
        "lossbook/focal.py",
    }


@pytest.mark.parametrize("name", ["experiments/focal.py", "experiments/shared.py", "lossbook/_common.py"])
def test_a_record_of_other_code_is_marked(book, name):
    put_record(book)
    assert "Outdated" not in record_sentence("focal", book)
    path = book / name
    original = path.read_text()
    path.write_text(original + "# a remark\n")
    assert "Outdated" not in record_sentence("focal", book)
    path.write_text(original + "y = 2\n")
    assert f"**Outdated: `{name}` changed after these runs." in record_sentence("focal", book)
    assert changed_code(document(code=deciding_code("focal", book)), book) == []


def test_what_the_pages_say_of_a_record(book):
    assert "no record yet: `python -m experiments.focal`" in record_sentence("focal", book)
    put_record(book)
    sentence = record_sentence("focal", book)
    assert sentence == (
        "Record `data/results/focal.json`: 26 runs at scale cpu, 12 minutes of computing on Some CPU, 1 thread a run, "
        "torch 2.13.0, 2026-01-02, commit `0123456`."
    )
    put_record(book, changed=True)
    assert "commit `0123456` with changes that were not committed" in record_sentence("focal", book)
    put_record(book, name="focal_gpu", scale="gpu")
    assert "focal_gpu.json" in record_sentence("focal", book)
    assert provenance.record_path("focal", book).name == "focal_gpu.json"
