"""Reads the records of the experiments: means with intervals, paired differences, tables and pictures.

A record is a file ``data/results/<slug>.json`` that ``python -m experiments.<slug>`` wrote. It holds every run, in the
form that :func:`unpacked` reads. The chapters and the page "Results at scale" make their tables from it, and the
records travel with the package.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lossbook._extras import require
from lossbook.claims import typeset
from lossbook.data import load_record
from lossbook.metrics import PairedDifference, paired_difference
from lossbook.plotting import COLORS, INK, LOSS

MARKERS = {"-": "o", "--": "s", "-.": "D", ":": "^"}  # a loss and its relatives share a colour
MANY = 24  # rows of a picture: above it the methods of a task share a row


@dataclass(frozen=True)
class Estimate(PairedDifference):
    """A mean over seeds and its 95 % interval, ``mean - half_width`` to ``mean + half_width``.

    The interval is Student's: ``half_width = t * s / sqrt(n)`` with the sample standard deviation ``s`` of ``n`` values
    and the 97.5 % quantile ``t`` for ``n - 1`` degrees of freedom. It tells how sure the mean is over the seeds of this
    experiment, and nothing of other data.

    Attributes:
        mean: The mean. NaN if a run diverged.
        half_width: Half the interval's width. NaN for a single value.
        n: How many values.

    Example:
        >>> e = Estimate.of([0.61, 0.62, 0.64]) * 100
        >>> f"{e:.1f}"
        '62.3 ± 3.8'
        >>> e.low < 60 < e.high
        True
    """

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from one value a seed.

        Raises:
            ValueError: There is no value.
        """
        found = paired_difference(values, [0.0] * len(values))
        return cls(found.mean, found.half_width, found.n)

    def __mul__(self, factor: float) -> Estimate:
        return Estimate(self.mean * factor, self.half_width * abs(factor), self.n)

    __rmul__ = __mul__

    def __format__(self, spec: str) -> str:
        if math.isnan(self.mean):
            return "diverged"
        spec = spec or ".3g"
        interval = "" if math.isnan(self.half_width) else f" ± {self.half_width:{spec.lstrip('+')}}"
        return f"{self.mean:{spec}}{interval}"


@dataclass(frozen=True)
class Table:
    """A table that notebooks show as HTML and ``print`` as text, its numbers :func:`~lossbook.claims.typeset`.

    Attributes:
        header: The names of the columns.
        rows: The rows, each with as many texts as the header. The first is the row's name.
        caption: What is shown, one line.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str

    def _lines(self) -> list[list[str]]:
        """Header and rows as they are shown."""
        return [[typeset(text) for text in row] for row in (self.header, *self.rows)]

    def __str__(self) -> str:
        shown = self._lines()
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        lines = [
            "  ".join(
                text.ljust(width) if i == 0 else text.rjust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in shown
        ]
        return "\n".join([*lines, typeset(self.caption)])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            first = f'<th scope="{"col" if tag == "th" else "row"}">{html.escape(cells[0])}</th>'
            scope = ' scope="col"' if tag == "th" else ""
            return f"<tr>{first}{''.join(f'<{tag}{scope}>{html.escape(c)}</{tag}>' for c in cells[1:])}</tr>"

        header, *rows = self._lines()
        body = "\n".join(row(cells, "td") for cells in rows)
        return (
            f'<table class="record">\n<caption>{html.escape(typeset(self.caption))}</caption>\n'
            f"<thead>{row(header, 'th')}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"
        )


def unpacked(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the file of a record holds, with its runs one by one under ``runs``.

    The file has a line for each method of a task. Beside ``grid`` and ``chosen`` it holds the columns of ``tuning``,
    with a value for each setting of the grid and each tuning seed, and of ``final``, with one for each seed. Where not
    all runs were made in the first of the record's environments there is a column ``environment``.

    Args:
        document: The parsed file. If it has ``runs`` already, it comes back as it is.

    Example:
        >>> columns = {"seconds": [2.0, 2.1], "metrics": {"accuracy": [0.8, 0.9]}}
        >>> method = {"grid": [{"lr": 0.1}], "chosen": {"lr": 0.1}, "final": columns}
        >>> task = {"name": "iris", "tuning_seeds": [101], "seeds": [1, 2], "methods": {"BCE": method}}
        >>> [(run["seed"], run["metrics"]) for run in unpacked({"tasks": [task]})["runs"]]
        [(1, {'accuracy': 0.8}), (2, {'accuracy': 0.9})]
    """
    if "runs" in document:
        return document
    tasks, runs = [], []
    for task in document["tasks"]:
        methods = {}
        for method, found in task["methods"].items():
            methods[method] = {key: value for key, value in found.items() if key not in ("tuning", "final")}
            plans = {
                "tuning": [(settings, seed) for settings in found["grid"] for seed in task["tuning_seeds"]],
                "final": [(found["chosen"], seed) for seed in task["seeds"]],
            }
            for part, plan in plans.items():
                if part not in found:
                    continue  # a grid of one needs no tuning
                columns = {"environment": [0] * len(plan), **found[part]}
                runs += [
                    {
                        **{"task": task["name"], "method": method, "settings": settings, "seed": seed},
                        "final": part == "final",
                        "metrics": {name: values[i] for name, values in columns["metrics"].items()},
                        **{name: columns[name][i] for name in ("seconds", "environment")},
                    }
                    for i, (settings, seed) in enumerate(plan)
                ]
        tasks.append({**task, "methods": methods})
    return {**document, "tasks": tasks, "runs": runs}


class Record:
    """The record of an experiment (see the module's text). Its numbers are those of the final runs, on test data.

    Args:
        document: What the file holds, :func:`unpacked` or as it is.
        plain: Metrics never shown in percent, though all their values lie between 0 and 1, such as temperatures.

    Example:
        >>> run = {"task": "yeast", "final": True, "settings": {}, "environment": 0, "seconds": 1.0}
        >>> runs = [
        ...     {**run, "method": method, "seed": seed, "metrics": {"accuracy": value + seed / 100}}
        ...     for method, value in {"BCE": 0.5, "focal": 0.6}.items()
        ...     for seed in (1, 2)
        ... ]
        >>> head = {"baseline": "BCE", "metrics": {"accuracy": "accuracy"}, "tasks": [{"name": "yeast"}]}
        >>> record = Record({**head, "runs": runs})
        >>> print(f"{record.difference('yeast', 'focal', 'accuracy') * 100:+.1f}")
        +10.0 ± 0.0
    """

    def __init__(self, document: Mapping[str, Any], *, plain: Collection[str] = ()) -> None:
        self.document = unpacked(document)
        self.plain = frozenset(plain)
        self._values: dict[tuple[str, str, str], dict[int, float]] = {}
        self._tuning: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        for run in self.document["runs"]:
            if not run["final"]:
                self._tuning.setdefault((run["task"], run["method"]), []).append(run)
                continue
            for metric, value in run["metrics"].items():
                found = self._values.setdefault((run["task"], run["method"], metric), {})
                found[run["seed"]] = math.nan if value is None else float(value)

    @classmethod
    def load(cls, slug: str, *, plain: Collection[str] = ()) -> Record:
        """The record of a chapter's experiment: the one in full size where there is one, else the one for CPUs.

        Args:
            slug: The chapter.
            plain: As in :class:`Record`.

        Raises:
            FileNotFoundError: No record was made yet.
        """
        document = load_record(f"{slug}_gpu") or load_record(slug)
        if document is None:
            raise FileNotFoundError(f"there is no record of the experiment {slug!r}: make experiments writes it")
        return cls(document, plain=plain)

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, each one data set."""
        return [task["name"] for task in self.document["tasks"]]

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return str(self.document["baseline"])

    @property
    def metrics(self) -> dict[str, str]:
        """The metrics, each with its name for readers."""
        return dict(self.document["metrics"])

    def methods(self, task: str) -> list[str]:
        """The methods of a task, in the record's order."""
        return list(dict.fromkeys(method for name, method, _ in self._values if name == task))

    def task(self, name: str) -> dict[str, Any]:
        """What the record says of a task: data digests, seeds, grids, facts."""
        for task in self.document["tasks"]:
            if task["name"] == name:
                return dict(task)
        raise KeyError(f"the record has no task {name!r}; there are {', '.join(map(repr, self.tasks))}")

    def chosen(self, task: str, method: str) -> dict[str, Any]:
        """The settings that validation data chose."""
        return dict(self.task(task)["methods"][method]["chosen"])

    def validated(self, task: str, method: str) -> float:
        """The mean score on validation data that chose the settings; -inf where nothing was tuned or a run diverged."""
        about, chosen = self.task(task), self.chosen(task, method)
        tuning = self._tuning.get((task, method), [])
        own = [run["metrics"][about["score"]] for run in tuning if run["settings"] == chosen]
        return statistics.fmean(own) if own and None not in own else -math.inf

    def _by_seed(self, task: str, method: str, metric: str) -> dict[int, float]:
        try:
            return self._values[task, method, metric]
        except KeyError:
            raise KeyError(f"the record has no {metric!r} of {method!r} on {task!r}") from None

    def values(self, task: str, method: str, metric: str) -> list[float]:
        """One value a seed, in the order of the seeds. NaN where a run diverged."""
        found = self._by_seed(task, method, metric)
        return [found[seed] for seed in sorted(found)]

    def result(self, task: str, method: str, metric: str) -> Estimate:
        """Mean and interval over the seeds."""
        return Estimate.of(self.values(task, method, metric))

    def difference(self, task: str, method: str, metric: str, baseline: str | None = None) -> Estimate:
        """Mean and interval of the differences to ``baseline``, seed by seed.

        Args:
            task: The task.
            method: The method.
            metric: The metric.
            baseline: The other method, the record's own baseline if None.
        """
        own = self._by_seed(task, method, metric)
        other = self._by_seed(task, self.baseline if baseline is None else baseline, metric)
        return Estimate.of([own[seed] - other[seed] for seed in sorted(own.keys() & other.keys())])

    def is_share(self, metric: str) -> bool:
        """Whether a metric is shown in percent: all its values lie between 0 and 1, and it is not ``plain``."""
        if metric in self.plain:
            return False
        found = [v for (_, _, name), values in self._values.items() if name == metric for v in values.values()]
        return all(math.isnan(v) or 0 <= v <= 1 for v in found)

    def _cell(self, task: str, method: str, metric: str, baseline: str) -> str:
        """A result as text, with an arrow if it surely differs from the baseline."""
        share = self.is_share(metric)
        result = self.result(task, method, metric) * (100 if share else 1)
        text = f"{result:.{1 if share or abs(result.mean) >= 10 else 3}f}"
        if method == baseline or (task, baseline, metric) not in self._values:
            return text
        difference = self.difference(task, method, metric, baseline)
        return text + (" ↑" if difference.low > 0 else " ↓" if difference.high < 0 else "")

    def _caption(self, metrics: Collection[str], baseline: str, tasks: Collection[str]) -> str:
        counts = sorted({len(v) for (task, _, m), v in self._values.items() if m in metrics and task in tasks})
        percent = "in percent; " if all(map(self.is_share, metrics)) else ""
        return (
            f"{percent}mean ± 95 % interval over {' or '.join(map(str, counts))} seeds; an arrow where the paired "
            f"interval of the difference to {baseline} leaves out 0"
        )

    def table(self, task: str, metrics: Sequence[str] | None = None, *, baseline: str | None = None) -> Table:
        """The methods of one task against the metrics.

        Args:
            task: The task.
            metrics: The metrics to show, all that the task has if None.
            baseline: What the arrows compare with, the record's own baseline if None.
        """
        own = {metric for name, _, metric in self._values if name == task}
        shown = [metric for metric in self.metrics if metric in own] if metrics is None else list(metrics)
        other = self.baseline if baseline is None else baseline
        rows = [(m, *(self._cell(task, m, metric, other) for metric in shown)) for m in self.methods(task)]
        caption = f"{task}, {self._caption(shown, other, [task])}"
        return Table((task, *(self.metrics[metric] for metric in shown)), tuple(rows), caption)

    def overview(self, metric: str, tasks: Sequence[str] | None = None, *, baseline: str | None = None) -> Table:
        """One metric: the tasks against the methods. A method that a task does not have is left empty.

        Args:
            metric: The metric.
            tasks: The tasks to show, all if None.
            baseline: What the arrows compare with, the record's own baseline if None.
        """
        shown = self.tasks if tasks is None else list(tasks)
        other = self.baseline if baseline is None else baseline
        methods = list(dict.fromkeys(method for task in shown for method in self.methods(task)))
        rows = [
            (t, *(self._cell(t, m, metric, other) if (t, m, metric) in self._values else "" for m in methods))
            for t in shown
        ]
        name = self.metrics[metric]
        return Table((name, *methods), tuple(rows), f"{name}, {self._caption([metric], other, shown)}")

    def about(self) -> str:
        """Where the numbers come from, in one line."""
        record = self.document
        devices = []
        for environment in record["environments"]:
            machine = environment["machine"]
            threads = machine.get("threads", 0)
            devices.append(
                machine.get("gpu") or f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''} a run"
            )
        torch = sorted({environment["versions"]["torch"].split("+")[0] for environment in record["environments"]})
        return (
            f"{len(record['runs']):,} runs at scale {record['scale']}, {record['seconds'] / 60:.0f} minutes of "
            f"computing on {' and '.join(dict.fromkeys(devices))}, torch {' and '.join(torch)}, {record['date']}"
        )


def plot_differences(
    record: Record, metric: str, tasks: Sequence[str] | None = None, *, baseline: str | None = None
) -> Any:
    """Draw how far each method is from the baseline: a dot for the paired mean, a bar for its 95 % interval.

    A loss has its look of ``lossbook.plotting.LOSS``; the picture is 6 inches wide.

    Args:
        record: The record.
        metric: The metric. Shares are drawn in percentage points.
        tasks: The tasks, all if None. Those without the baseline are left out.
        baseline: The method to compare with, the record's own baseline if None.

    Returns:
        The matplotlib figure.
    """
    pyplot = require("matplotlib.pyplot", "plots")
    other = record.baseline if baseline is None else baseline
    factor = 100 if record.is_share(metric) else 1
    groups = []
    for task in record.tasks if tasks is None else tasks:
        methods = [m for m in record.methods(task) if m != other]
        if other in record.methods(task) and methods:
            groups.append((task, [(m, record.difference(task, m, metric, other) * factor) for m in methods]))
    names = list(dict.fromkeys(method for _, found in groups for method, _ in found))
    dense = sum(len(found) for _, found in groups) > MANY
    known = {name: LOSS[name]["color"] for name in names if name in LOSS}
    # rows have names; where methods share a row, colours tell those that are no loss of the book apart
    free = [color for color in [INK, *COLORS.values()] if color not in known.values()] if dense else [INK]
    colors = {**dict(zip([name for name in names if name not in known], free * len(names), strict=False)), **known}
    heading = 0 if dense or len(groups) == 1 else 1

    ticks: list[tuple[float, str]] = []
    y = 0.0
    points = []
    for task, found in groups:
        if dense:
            step = 0.8 / len(found)
            points += [(y + (i - (len(found) - 1) / 2) * step, m, e) for i, (m, e) in enumerate(found)]
            ticks.append((y, task))
            y += 1.2
        else:
            if heading:
                ticks.append((y, task))
                y += 1
            points += [(y + i, m, e) for i, (m, e) in enumerate(found)]
            ticks += [(y + i, m) for i, (m, _) in enumerate(found)]
            y += len(found) + 0.4 * heading
    figure, ax = pyplot.subplots(figsize=(6.0, 1.3 + (0.36 if dense else 0.3) * y))
    ax.axvline(0, color=INK, linewidth=1)
    drawn: set[str] = set()
    for place, method, estimate in points:
        if not math.isnan(estimate.mean):
            ax.errorbar(
                estimate.mean,
                place,
                xerr=estimate.half_width,
                fmt=MARKERS.get(LOSS.get(method, {}).get("linestyle", "-"), "o"),
                markersize=5,
                capsize=2,
                color=colors[method],
                label=method if dense and method not in drawn else None,
            )
            drawn.add(method)
    ax.set_ylim(y - 0.4, -0.8)
    ax.set_yticks([place for place, _ in ticks], [text for _, text in ticks])
    ax.tick_params(axis="y", length=0)
    for (_, text), label in zip(ticks, ax.get_yticklabels(), strict=True):
        if heading and any(text == task for task, _ in groups):
            label.set_fontweight("bold")
    unit = ", percentage points" if factor == 100 else ""
    ax.set_xlabel(f"{record.metrics[metric]},\ndifference to {other}{unit}")
    if dense:
        figure.legend(loc="outside upper left", ncols=min(2, len(names)))
    return figure
