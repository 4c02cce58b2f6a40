"""How long the chapters are: ``python -m tools.limits [SLUG ...]`` prints a table and fails where a limit is passed.

A chapter is read to its end if it is short. What proves it stands on its evidence page, which has no limit but time.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tools.chapters import Chapter, all_chapters, code_cells, pages_of, read
from tools.reader import CODE_SPAN, DISPLAY, FENCE, ROLE, TIMINGS, _outside_fences

WORDS, LINES, FIGURES, COLUMNS, SCREENS = 2800, 200, 8, 88, 20
SECONDS = {"chapter": 60, "evidence": 120, "exercises": 60}
FOLDED = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
GONE = {"hide-cell", "hide-output", "remove-cell", "remove-output"}
# A sentence ends inside a line: a full stop, a space and a capital, where the word before is no abbreviation.
INSIDE = re.compile(r"(?P<word>[^\s(]+)[.?!][*_)\"]*\s+(?=[*_(\"]*[A-Z])")
ABBREVIATIONS = {"e.g", "i.e", "cf", "al", "vs", "Fig", "fig", "Eq", "eq", "no", "No", "Dr", "St", "1", "2", "3"}


@dataclass(frozen=True)
class Size:
    """What the limits count on one page."""

    words: int
    lines: int
    figures: int
    columns: int
    seconds: float | None

    def passed(self, kind: str) -> list[str]:
        """The limits that a page of a kind passes, in words."""
        found = []
        if kind == "chapter":
            counts = {"words": (self.words, WORDS), "lines of code": (self.lines, LINES)}
            counts |= {"figures": (self.figures, FIGURES), "columns": (self.columns, COLUMNS)}
            found = [f"{count} {what}, at most {limit}" for what, (count, limit) in counts.items() if count > limit]
        if self.seconds is not None and self.seconds > SECONDS[kind]:
            found.append(f"{self.seconds:.0f} s, at most {SECONDS[kind]} s")
        return found


def tags(cell: Any) -> set[str]:
    """The tags of a cell."""
    return set(cell.metadata.get("tags", []))


def plain(text: str) -> str:
    """The prose of a MyST text: no code, no displayed formulas, an inline formula or a role as one word."""
    prose = "\n".join(part for _, part in _outside_fences(text))
    prose = "\n".join(line for line in prose.split("\n") if not re.match(r" *:(?:class|name|label|alt):", line))
    prose = re.sub(r"^ *(?:`{3,}|:{3,})(?:\{[\w-]+\})?", "", prose, flags=re.MULTILINE)
    prose = re.sub(r"^\([\w:.-]+\)=$", "", prose, flags=re.MULTILINE)
    prose = CODE_SPAN.sub(" code ", ROLE.sub(" role ", DISPLAY.sub("\n", prose)))
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"\$[^$]+\$", " formula ", prose))


def prose_of(chapter: Chapter) -> Iterator[str]:
    """The texts of a page's cells, as :func:`plain` leaves them."""
    for cell in chapter.source.cells:
        if cell.cell_type == "markdown":
            yield plain(cell.source)


def fenced(text: str) -> list[str]:
    """The lines of code that a text shows in verbatim fences, also inside of admonitions."""
    found: list[str] = []
    closing = ""
    for line in text.split("\n"):
        match = FENCE.match(line)
        if closing:
            closing = "" if line.strip() == closing else closing
            found += [line] if closing and line.strip() else []
        elif match and match["fence"][0] != ":" and not match["info"].strip().startswith("{"):
            closing = match["fence"]
    return found


def listing(output: Any) -> list[str]:
    """The lines of a listing that ``show_source`` shows, none for any other output."""
    text = output.get("data", {}).get("text/markdown", "")
    return [line for line in text.split("\n")[1:-1] if line] if text.startswith("```python\n") else []


def listings(stored: Any) -> list[str]:
    """The lines of the listings that a cell shows."""
    return [line for output in stored.outputs for line in listing(output)]


def size(chapter: Chapter) -> Size:
    """What a reader of a page meets; listings and figures are those of the stored outputs."""
    words = sum(len(re.findall(r"\w[\w'’.-]*", prose)) for prose in prose_of(chapter))
    text = "\n\n".join(cell.source for cell in chapter.source.cells if cell.cell_type == "markdown")
    lines, figures = fenced(text), 0
    cells = code_cells(chapter.source)
    stored = code_cells(chapter.notebook) if chapter.notebook else []
    for i, cell in enumerate(cells):
        if not tags(cell) & FOLDED:
            lines += [line for line in cell.source.split("\n") if line.strip()]
        if i < len(stored) and not tags(cell) & GONE:
            lines += listings(stored[i])
            figures += any("image/png" in output.get("data", {}) for output in stored[i].outputs)
    path = chapter.root / TIMINGS
    times = json.loads(read(path)).get(chapter.slug, {}) if path.exists() else {}
    return Size(words, len(lines), figures, max(map(len, lines), default=0), times.get("cpu", {}).get("seconds"))


def sentences_inside(chapter: Chapter) -> list[str]:
    """The lines of a page's source that hold more than one sentence."""
    found = []
    for prose in prose_of(chapter):
        for line in prose.split("\n"):
            ends = [match for match in INSIDE.finditer(line) if match["word"].strip("*_") not in ABBREVIATIONS]
            if ends and not line.lstrip().startswith(("|", "#")):
                found.append(line.strip())
    return found


HEADER = ("page", "words", "lines", "figures", "columns", "seconds", " several sentences")


def row(*cells: object) -> str:
    """A row of the table that is printed."""
    return f"{cells[0]:32}" + "".join(f"{cell!s:>9}" for cell in cells[1:])


def main(slugs: list[str]) -> int:
    """Entry point. With slugs, only these pages, each with its lines that hold several sentences."""
    print(row(*HEADER))
    status = 0
    for page in [page for chapter in all_chapters() for page in pages_of(chapter)]:
        if slugs and page.slug not in slugs:
            continue
        own, several = size(page), sentences_inside(page)
        seconds = "-" if own.seconds is None else f"{own.seconds:.0f}"
        stale = "  stale: listings and figures are the old ones" if page.stale() else ""
        print(row(page.slug, own.words, own.lines, own.figures, own.columns, seconds, len(several)) + stale)
        for line in own.passed(page.kind) + (several if slugs else []):
            print(f"    {line}")
        status |= bool(own.passed(page.kind))
    print(f"limits of a chapter: {WORDS} words, {LINES} lines, {FIGURES} figures, {COLUMNS} columns")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
