"""Tables that the build writes into pages from what is there: questions and exercises, status of pages and functions.

``{stamp}`questions``` in the text of a page is replaced by :func:`questions`, and so on for each name in ``TABLES``.
Nothing is executed: sources, notebooks and records are read.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from tools import compat, gpu, project
from tools.chapters import ROOT, Chapter, all_chapters, all_notebooks, code_cells, config, pages_of, read
from tools.provenance import read_record
from tools.reader import FACT, TIMINGS

EXERCISE = re.compile(
    r"^:{3,}\{admonition\} Exercise (\d+\.\d+): (.+) \((easy|medium|hard), (\d+) minutes?\)$", re.MULTILINE
)
QUESTION = re.compile(
    r"^:{3,}\{admonition\} Question (\d+): (.+)\n:class: (?:dropdown question|question dropdown)\n([\s\S]*?)\n:{3,}$",
    re.MULTILINE,
)
EQUATION = re.compile(r":eq:`([\w-]+)`")
HEADER = re.compile(r"^(:{3,}\{admonition\} (Question|Exercise) ([\d.]+):.*)$", re.MULTILINE)


def title(page: Chapter) -> str:
    """The heading of a page."""
    found = re.search(r"^# (.+)$", read(page.source_path), re.MULTILINE)
    return found[1] if found else page.slug


def with_names(text: str, page: Chapter) -> str:
    """The text of a page with a name for each question and exercise, which the index leads to."""

    def named(match: re.Match[str]) -> str:
        number = match[3] if match[2] == "Exercise" else f"{page.number}.{match[3]}"
        return f"{match[1]}\n:name: {name_of(match[2], number)}"

    return HEADER.sub(named, text)


def name_of(kind: str, number: str) -> str:
    """The name of a question or exercise, for example ``exercise-3-1``."""
    return f"{kind.lower()}-{number.replace('.', '-')}"


GLOSSARY = re.compile(r":{3,}\{glossary\}\n([\s\S]*?)\n:{3,}")
# What holds no prose, or a link already: fences, formulas, roles, code, links, headings, directives, tables, emphasis.
CLOSED = (
    r"^ *(?P<fence>`{3,}|~{3,})[\s\S]*?^ *(?P=fence) *$|\$\$[\s\S]*?\$\$|\$[^$]+\$|\{[\w:-]+\}`[^`]+`|`+[^`]+`+"
    r"|\[[^\]]*\]\([^)]*\)|^#.*$|^ *:{3,}.*$|^ *:[\w-]+:.*$|^ *\|.*$|^\([\w:.-]+\)=$|\*+[^*\n]+\*+|<[^>\n]+>"
)
# Words of the glossary that also have a common meaning: a page links them by hand.
COMMON = {"row", "positive", "negative", "error", "lead", "fold", "score", "push", "ranking", "easy", "margin"}
COMMON |= {"hard sample"}


def words(root: Path = ROOT) -> dict[str, str]:
    """The words that pages link to the glossary, each with the entry that it leads to."""
    path = root / "chapters" / "notation.md"
    found = GLOSSARY.search(read(path)) if path.exists() else None
    entries = re.findall(r"^(\S.*)$", found[1], re.MULTILINE) if found else []
    return {word: entry for entry in entries for word in entry.split(", ") if word not in COMMON}


def link_words(text: str, table_of: dict[str, str], seen: set[str]) -> str:
    """A text whose first use of each word of the glossary is linked; ``seen`` has the entries that have one."""
    seen |= {m[1].strip().lower() for m in re.finditer(r"\{term\}`(?:[^`<]*<)?([^`>]+)>?`", text)}
    if not table_of:
        return text
    known = "|".join(sorted(map(re.escape, table_of), key=len, reverse=True))
    pattern = re.compile(rf"(?P<closed>{CLOSED})|(?<![\w-])(?P<word>{known})(?P<plural>s?)(?![\w-])", re.MULTILINE)

    def linked(match: re.Match[str]) -> str:
        entry = table_of.get(match["word"] or "")
        if entry is None or entry.lower() in seen:
            return match[0]
        seen.add(entry.lower())
        return f"{{term}}`{match[0]} <{entry}>`"

    return pattern.sub(linked, text)


def citation(page: Chapter) -> str:
    """The BibTeX entry of a chapter, in a box that opens."""
    about = yaml.safe_load(read(page.root / "CITATION.cff"))
    author = " and ".join(f"{{{each['name']}}}" for each in about["authors"])
    year = (project.released(page.root) or str(config(page.root)["copyright"]))[:4]
    return f"""::::{{admonition}} Cite this chapter
:class: dropdown cite

```bibtex
@incollection{{lossbook_{page.slug},
  author    = {{{author}}},
  title     = {{{{{title(page)}}}}},
  booktitle = {{{{{about["title"]}}}}},
  chapter   = {{{page.number}}},
  year      = {{{year}}},
  note      = {{Version {project.version(page.root)}}},
  url       = {{{project.urls(page.root)["Documentation"]}chapters/{page.slug}.html}}
}}
```
::::"""


def table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def questions(root: Path = ROOT) -> str:
    """All questions and exercises, chapter by chapter."""
    parts = []
    for chapter in all_chapters(root):
        asked = QUESTION.findall(read(chapter.source_path))
        tasks = [task for page in pages_of(chapter) for task in EXERCISE.findall(read(page.source_path))]
        if not asked and not tasks:
            continue
        minutes = sum(int(task[3]) for task in tasks)
        parts.append(f"## {chapter.number}. {title(chapter)}")
        if asked:
            links = [f"{n}. [{text}](#{name_of('Question', f'{chapter.number}.{n}')})" for n, text, _ in asked]
            parts.append("\n".join(links))
        if tasks:
            lines = [
                f"- [{n} {text}](#{name_of('Exercise', n)}): {how}, {time} minutes" for n, text, how, time in tasks
            ]
            parts.append("\n".join([f"{len(tasks)} exercises, {minutes} minutes in all:\n", *lines]))
    return "\n\n".join(parts) or "There are none yet."


def claims(page: Chapter) -> int:
    """How many claims the cells of a page checked when they ran."""
    outputs = [output for cell in code_cells(page.notebook) for output in cell.outputs] if page.notebook else []
    return sum(output.get("text", "").count("✓") for output in outputs)


def compared(page: Chapter) -> int:
    """How many cells nbval runs again and compares."""
    cells = code_cells(page.notebook) if page.notebook else []
    return sum("nbval-ignore-output" not in cell.metadata.get("tags", []) for cell in cells)


def status(root: Path = ROOT) -> str:
    """Of each page with cells: when and where it ran, how long, what was compared, claimed and asked."""
    times = json.loads(read(root / TIMINGS)) if (root / TIMINGS).exists() else {}
    pages = [page for page in all_notebooks(root) if page.notebook and "lossbook" in page.notebook.metadata]
    stamps = [page.notebook.metadata["lossbook"] for page in pages if page.notebook]
    devices = sorted({stamp["device"] for stamp in stamps})
    versions = sorted({", ".join(f"{name} {v}" for name, v in stamp["versions"].items()) for stamp in stamps})
    header = ["page", "executed", "seconds", "cells compared", "claims", "exercises"]
    if len(devices) > 1:
        header.insert(2, "device")
    rows: list[tuple[object, ...]] = []
    sums = [0, 0, 0]
    for page, stamp in zip(pages, stamps, strict=True):
        date = max((record["date"] for record in times.get(page.slug, {}).values()), default="")
        counts = [round(stamp["seconds"]), compared(page), claims(page)]
        sums = [total + count for total, count in zip(sums, counts, strict=True)]
        tasks = len(EXERCISE.findall(read(page.source_path)))
        device = [stamp["device"]] if len(devices) > 1 else []
        link = f"[{title(page)}]({page.slug}.md)"
        rows.append((link, date, *device, *(count or "" for count in (*counts, tasks))))
    about = (
        f"{len(rows)} pages with {sums[1]} compared cells and {sums[2]} checked claims ran in {sums[0]} seconds on "
        f"{' or '.join(devices)}, with {'; or '.join(versions)}."
    )
    return f"{about}\n\n{table(tuple(header), rows)}"


def functions_of(slug: str, root: Path) -> dict[str, list[str]]:
    """The public functions of a module, each with the labels of the equations that its docstring names."""
    tree = ast.parse(read(root / "lossbook" / f"{slug}.py"))
    public: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            public = ast.literal_eval(node.value)
    rooms = [read(path) for path in sorted((root / "lossbook").glob("*.py"))]
    nodes = {n.name: n for room in rooms for n in ast.parse(room).body if isinstance(n, ast.FunctionDef)}
    return {
        name: list(dict.fromkeys(EQUATION.findall(ast.get_docstring(nodes[name]) or "")))
        for name in public
        if name in nodes
    }


def test_bodies(root: Path) -> list[str]:
    """The sources of all test functions."""
    found = []
    for path in sorted((root / "tests").glob("test_*.py")):
        text = read(path)
        lines = text.splitlines()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found.append("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    return found


def bench(slug: str, name: str, root: Path) -> dict[str, Any] | None:
    """The row of a function's benchmark at its largest shape, or None where it has none."""
    path = root / "data" / "results" / f"bench_{slug}.json"
    rows = json.loads(read(path))["cases"] if path.exists() else []
    own = [row for row in rows if row.get("loss") == name and "modes" in row and "plain" in row["peak_bytes"]]
    return max(own, key=lambda row: row["scores"], default=None)


def functions(root: Path = ROOT) -> str:
    """Of each public function of the losses: its equations, its tests, its time and memory beside the plain formula."""
    rows: list[tuple[object, ...]] = []
    bodies = test_bodies(root)
    for chapter in all_chapters(root):
        for name, labels in functions_of(chapter.slug, root).items():
            row, said = bench(chapter.slug, name, root), ("", "")
            if row:
                quiet = next(mode for mode in row["modes"] if mode["threads"] == 1 and not mode["busy"])
                memory = row["peak_bytes"]["ours"] / row["peak_bytes"]["plain"]
                said = (f"{quiet['ratios']['ours / plain']['ratio']:.2g}", f"{memory:.2g}")
            equations = ", ".join(f"{{eq}}`{label}`" for label in labels)
            link = f"{{func}}`~lossbook.{chapter.slug}.{name}`"
            tests = sum(name in body and bool(re.search(rf"\b{name}\b", body)) for body in bodies)
            rows.append((link, equations, tests, *said))
    return table(("function", "equations", "tests", "time", "memory"), rows)


def claim_count(root: Path = ROOT) -> str:
    """How many claims all pages check."""
    return f"{sum(map(claims, all_notebooks(root))):,}"


def run_count(root: Path = ROOT) -> str:
    """How many runs the records of the experiments hold."""
    own = [root / "data" / "results" / f"{path.stem}.json" for path in (root / "experiments").glob("*.py")]
    return f"{sum(len(read_record(path)['runs']) for path in own if path.exists()):,}"


TABLES: dict[str, Callable[[Path], str]] = {
    "compat": compat.table,
    "gpu": gpu.table,
    "questions": questions,
    "status": status,
    "functions": functions,
    "claim_count": claim_count,
    "run_count": run_count,
}


def insert(text: str, root: Path = ROOT) -> str:
    """The text of a page with its tables."""
    return FACT.sub(lambda m: TABLES[m["name"]](root) if m["name"] in TABLES else m[0], text)


def sources(text: str, root: Path = ROOT) -> Iterator[Path]:
    """The files that the tables of a text depend on."""
    named = {match["name"] for match in FACT.finditer(text)} & TABLES.keys()
    if "compat" in named:
        yield from map(root.joinpath, (str(compat.RECORD), *compat.code(root)))
    if "gpu" in named:
        yield root / gpu.RECORD
    if "run_count" in named:
        yield from (root / "data" / "results").glob("*.json")
    if named & {"questions", "status", "functions", "claim_count"}:
        for page in all_notebooks(root):
            yield from (page.source_path, page.notebook_path)
    if "status" in named:
        yield root / TIMINGS
    if "functions" in named:
        yield from (root / "lossbook").glob("*.py")
        yield from (root / "tests").glob("test_*.py")
        yield from (root / "data" / "results").glob("bench_*.json")
