"""The advice of the page "Which loss should I use?" as predictions, and what the records say of each.

A prediction of ``data/advice.toml`` says that some methods are ahead of others in a metric, not ahead of them, or level
with them, on all tasks of a kind. There is a verdict for each task: the best method of either side, each with the
settings that validation data chose, is compared seed by seed. ``python -m experiments.advice`` prints all verdicts.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, median
from typing import Any

from lossbook.data import book_file
from lossbook.records import Estimate, Record

SMALL = 0.01
"""Sides are level where the difference is surely below one point; one is not ahead where its gain surely is."""


@dataclass(frozen=True)
class Verdict:
    """What one task says of a prediction.

    Attributes:
        task: The task.
        data: Its public data sets.
        difference: How far the first methods are ahead of the second ones; more is better.
        expects: ``ahead``, ``not ahead`` or ``level``.
    """

    task: str
    data: tuple[str, ...]
    difference: Estimate
    expects: str

    @property
    def sign(self) -> int:
        """1: clearly ahead, -1: clearly behind, 0: open."""
        return (self.difference.low > 0) - (self.difference.high < 0)

    @property
    def says(self) -> str:
        """``holds``, ``fails`` or ``open``."""
        if self.expects == "ahead":
            return {1: "holds", -1: "fails", 0: "open"}[self.sign]
        level = self.expects == "level"
        if self.difference.high < SMALL and (self.difference.low > -SMALL or not level):
            return "holds"
        against = self.sign == 1 or (level and self.sign == -1)
        return "fails" if against and abs(self.difference.mean) > SMALL else "open"


@dataclass(frozen=True)
class Prediction:
    """A statement of the page that records can refute.

    Attributes:
        name: How the page refers to it.
        text: The statement.
        expects: ``ahead``, ``not ahead`` or ``level``.
        places: Where to look: record, kind and goal of the tasks or their names, metric, both sides' methods.
        drawn_after: Whether the data sets it speaks of were sorted after they had been seen.
    """

    name: str
    text: str
    expects: str
    places: Sequence[Mapping[str, Any]]
    drawn_after: bool = False

    def verdicts(self) -> list[Verdict]:
        """One for each task that has the methods, in the order of the records."""
        return [verdict for place in self.places for verdict in _at(place, self.expects)]

    def counts(self) -> dict[str, int]:
        """How many tasks say ``holds``, ``fails`` and ``open``."""
        said = [verdict.says for verdict in self.verdicts()]
        return {word: said.count(word) for word in ("holds", "fails", "open")}

    @property
    def stands(self) -> bool:
        """Whether it holds more often than it fails; where all is open, it does not stand."""
        counts = self.counts()
        return counts["fails"] < counts["holds"]

    def brief(self) -> str:
        """Counts, data sets and the size of the difference, for a cell of the page's table."""
        verdicts = self.verdicts()
        counts = self.counts()
        points = [100 * verdict.difference.mean for verdict in verdicts]
        sets = sorted({re.sub("^(mulan|uci)-", "", name) for verdict in verdicts for name in verdict.data})
        seen = ", ".join(sets) if len(sets) > 2 else f"on {' and '.join(sets)} only"
        return (
            f"{counts['holds']} hold, {counts['open']} open, {counts['fails']} fail; "
            f"{median(points):+.1f} ({min(points):+.1f} to {max(points):+.1f}) points; {seen}"
        )


@cache
def _record(slug: str) -> Record:
    return Record.load(slug)


def _at(place: Mapping[str, Any], expects: str) -> Iterable[Verdict]:
    """The verdicts of one place."""
    record = _record(place["record"])
    for name in record.tasks:
        task = record.task(name)
        here = task["facts"].get("kind") == place["kind"] if "kind" in place else name in place["tasks"]
        if not here or ("goal" in place and task["facts"].get("goal") != place["goal"]):
            continue
        ahead, behind = (_best(record, name, place["metric"], place[side]) for side in ("ahead", "of"))
        difference = record.difference(name, ahead, place["metric"], behind)
        # test rows over training rows where both are drawn anew, as in the tables of chapter 5
        overlap = task["facts"].get("overlap", 1 / 3 if "table" in task["facts"] else 0.0)
        widened = difference.half_width * math.sqrt(1 + difference.n * overlap)
        yield Verdict(name, tuple(task["data"]), Estimate(difference.mean, widened, difference.n), expects)


def _best(record: Record, task: str, metric: str, methods: Sequence[str]) -> str:
    """The method that did best on validation data, where its rate was chosen too."""
    return max(methods, key=lambda method: record.validated(task, method))


@cache
def predictions() -> tuple[Prediction, ...]:
    """All predictions of the page, in its order.

    Example:
        >>> sorted({prediction.expects for prediction in predictions()})
        ['ahead', 'level', 'not ahead']
    """
    rows = tomllib.loads(book_file("advice.toml").read_text(encoding="utf-8"))["prediction"]
    return tuple(Prediction(**row) for row in rows)


def prediction(name: str) -> Prediction:
    """The prediction of that name."""
    found = {each.name: each for each in predictions()}
    if name not in found:
        raise KeyError(f"there is no prediction {name!r}; there are {', '.join(found)}")
    return found[name]


def leave_one_out() -> dict[str, int]:
    """How often advice that is formed on all data sets but one foretells that one.

    For each statement and each data set, the others vote: ahead, behind or level, whatever the page says. Statements
    seen on fewer than three data sets are left out, and those whose data sets were sorted after they had been seen.

    Returns:
        Where the data set left out shows a clear difference, how often the others foretold its direction (``right``),
        said level (``silent``) or foretold the other direction (``wrong``). Where it shows none, how often they said
        level (``level``) or foretold a difference (``alarm``).
    """
    found = dict.fromkeys(("right", "silent", "wrong", "level", "alarm"), 0)
    for each in predictions():
        votes = {} if each.drawn_after else _votes(each.verdicts())
        for name, vote in votes.items() if len(votes) > 2 else ():
            others = sum(other for key, other in votes.items() if key != name)
            foretold = (others > 0) - (others < 0)
            told = {vote: "right", 0: "silent", -vote: "wrong"} if vote else {0: "level"}
            found[told.get(foretold, "alarm")] += 1
    return found


def _votes(verdicts: Sequence[Verdict]) -> dict[tuple[str, ...], int]:
    """The sign of each data set: that of the mean of its tasks' signs."""
    by_data: dict[tuple[str, ...], list[int]] = {}
    for verdict in verdicts:
        by_data.setdefault(verdict.data, []).append(verdict.sign)
    return {data: (fmean(signs) > 0) - (fmean(signs) < 0) for data, signs in by_data.items()}
