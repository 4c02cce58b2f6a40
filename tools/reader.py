"""The reader's notebook: a chapter for Jupyter, Colab and GitHub, where MyST is not understood.

:func:`to_markdown` turns the MyST of a chapter into plain Markdown and TeX: equations carry the numbers they have on
the page, references to them, citations, values and admonitions are written out. What it does not know is an error, so
that no role or directive is ever left over. :func:`build_notebook` puts the setup cell in front and fixes the cells'
ids.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import yaml
from pybtex.database import parse_string

from tools import project
from tools.chapters import ROOT, SETUP_TAG, Chapter, all_notebooks, digest, read
from tools.provenance import record_sentence

ADMONITIONS = {"admonition", "caution", "danger", "hint", "important", "note", "seealso", "tip", "warning"}
TIMINGS = Path("data/results/timings.json")

FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|:{3,}|~{3,})(?P<info>.*)$")
DIRECTIVE = re.compile(r"^\{(?P<name>[\w:-]+)\} *(?P<argument>.*)$")
OPTION = re.compile(r"^:(?P<key>[\w-]+):(?: +(?P<value>.*))?$")
DISPLAY = re.compile(r"\$\$(?P<tex>.+?)\$\$(?: *\((?P<label>[\w:-]+)\))?", re.DOTALL)
ROLE = re.compile(r"\{(?P<name>[a-z][\w:.-]*)\}`(?P<text>[^`]+)`")
CODE_SPAN = re.compile(r"(?<!\})(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
TITLE_TARGET = re.compile(r"^(?P<title>.*?) *<(?P<target>[^>]+)>$", re.DOTALL)
PAGE_LINK = re.compile(r"\]\((?P<slug>\w+)\.md(?P<anchor>#[\w-]+)?\)")
LABEL = re.compile(r"^\((?P<label>[\w:.-]+)\)=\s*$", re.MULTILINE)
LABEL_LINK = re.compile(r"\]\(#(?P<label>[\w:.-]+)\)")
FACT = re.compile(r"\{stamp\}`(?P<name>\w+)`")
BOUND = re.compile(r"\{bound\}`(?P<page>\w+):(?P<name>[^`]+)`")
CAPTION = re.compile(r"^\*Figure: ", re.MULTILINE)  # a line of its own under a figure
LATER = "…"  # stands for a number of another page until that page is executed


class SourceError(Exception):
    """A chapter's source holds something that cannot be written in a reader's notebook."""


@dataclass
class Context:
    """What references resolve to."""

    equations: dict[str, str]
    citations: dict[str, dict[str, str]] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    bound: Callable[[str], str] = lambda reference: LATER
    facts: dict[str, str] = field(default_factory=dict)
    notebooks: set[str] = field(default_factory=set)
    labels: dict[str, str] = field(default_factory=dict)  # of headings on other pages: the page of each


# ---------------------------------------------------------------- what references resolve to


def labelled_equations(text: str) -> list[str]:
    """The labels of the numbered equations of a MyST text, in order."""
    found = []
    for line_start, body in _outside_fences(text):
        found += [(line_start, m.start(), m["label"]) for m in DISPLAY.finditer(body) if m["label"]]
    return [label for *_, label in sorted(found)]


def equation_numbers(chapters: list[Chapter]) -> dict[str, str]:
    """Label to number, ``(chapter.equation)`` as on the pages: a chapter's evidence and exercises count on."""
    numbers: dict[str, str] = {}
    counts: dict[int | str, int] = {}
    for chapter in chapters:
        own = chapter.slug if chapter.number is None else chapter.number
        text = "\n\n".join(c.source for c in chapter.source.cells if c.cell_type == "markdown")
        for label in labelled_equations(text):
            if label in numbers:
                raise SourceError(f"chapters/{chapter.slug}.md: the equation label {label!r} is given twice")
            counts[own] = counts.get(own, 0) + 1
            numbers[label] = f"{chapter.number}.{counts[own]}"
    return numbers


def caption_numbers(chapter: Chapter) -> Iterator[str]:
    """The numbers of a page's figures, in order: a chapter's evidence and exercises count on."""
    before = 0
    for page in all_notebooks(chapter.root):
        if page.slug == chapter.slug:
            break
        if page.number is not None and page.number == chapter.number:
            before += sum(len(CAPTION.findall(c.source)) for c in page.source.cells if c.cell_type == "markdown")
    own = "" if chapter.number is None else f"{chapter.number}."
    return (f"{own}{i}" for i in itertools.count(before + 1))


def number_captions(text: str, numbers: Iterator[str]) -> str:
    """A text whose captions, the lines ``*Figure: ...*``, have their numbers."""
    return CAPTION.sub(lambda m: f"*Figure {next(numbers)}: ", text)


def citations(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """Key to author, year and link of every entry of ``references.bib``."""
    found = {}
    for key, entry in parse_string(read(root / "references.bib"), "bibtex").entries.items():
        missing = {"author", "year", "url"} - {*entry.fields, *entry.persons}
        if missing:
            raise SourceError(f"references.bib: the entry {key} has no {' and no '.join(sorted(missing))}")
        names = [" ".join([*p.prelast_names, *p.last_names]) for p in entry.persons["author"]]
        author = names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else f"{names[0]} et al."
        found[key] = {"author": author, "year": entry.fields["year"], "url": entry.fields["url"]}
    return found


def glued_values(notebook: Any) -> dict[str, str]:
    """The values that the notebook's cells bound to names."""
    values = {}
    for cell in notebook.cells if notebook else []:
        for output in cell.get("outputs", []):
            bound = output.get("metadata", {}).get("scrapbook")
            if bound:
                text = output["data"][f"{bound['mime_prefix']}text/plain"]
                values[bound["name"]] = str(ast.literal_eval(text))
    return values


@cache
def _values_of(path: Path, changed: int) -> dict[str, str]:
    return glued_values(nbformat.reads(read(path), as_version=4))


def bound_value(reference: str, root: Path, where: str) -> str:
    """The value that a cell of another page bound to a name: ``{bound}`page:name``` in a text is replaced by it."""
    page, _, name = reference.partition(":")
    path = root / "chapters" / f"{page}.ipynb"
    if not path.exists():
        raise SourceError(f"{where}: {{bound}}`{reference}`: there is no notebook chapters/{page}.ipynb")
    values = _values_of(path, path.stat().st_mtime_ns)
    if name not in values:
        raise SourceError(f"{where}: {{bound}}`{reference}`: no cell of chapters/{page}.md glues {name!r}")
    return values[name]


def insert_bound(text: str, root: Path, where: str) -> str:
    """The text with the numbers of other pages in the place of its ``{bound}`` roles."""
    return BOUND.sub(lambda m: bound_value(f"{m['page']}:{m['name']}", root, where), text)


def bound_pages(text: str) -> set[str]:
    """The slugs of the pages whose numbers a text shows."""
    return {match["page"] for match in BOUND.finditer(text)}


def execution_facts(chapter: Chapter) -> dict[str, str]:
    """What is known of the chapter's execution and of the records: ``{stamp}`time`` in a text is replaced by it.

    ``record`` is the sentence on the record of the page's chapter, ``record_<slug>`` on that of another one.
    """
    path = chapter.root / TIMINGS
    times = json.loads(read(path)).get(chapter.slug, {}) if path.exists() else {}
    known = [f"{record['seconds']:.0f} s on {record['device']}" for _, record in sorted(times.items())]
    sentences = {fact: record_sentence(slug, chapter.root) for fact, slug in records_told(chapter).items()}
    return {"time": "; ".join(known), **sentences}


def records_told(chapter: Chapter) -> dict[str, str]:
    """The names of the records that a page speaks of, each with the slug of its experiment."""
    facts = {match["name"] for match in FACT.finditer(read(chapter.source_path))}
    slugs = {path.stem for path in (chapter.root / "experiments").glob("*.py")}
    named = {"record": chapter.main, **{f"record_{slug}": slug for slug in slugs}}
    return {fact: slug for fact, slug in named.items() if fact in facts and slug in slugs}


def insert_facts(text: str, facts: dict[str, str]) -> str:
    """The text with its ``{stamp}`` roles replaced."""
    return FACT.sub(lambda m: facts[m["name"]], text)


def context_for(chapter: Chapter, notebook: Any, *, alone: bool = False) -> Context:
    """What references in a chapter resolve to, with the values of an executed notebook.

    ``alone`` leaves open the numbers of other pages, which may not be executed yet.
    """
    chapters = all_notebooks(chapter.root)
    where = f"chapters/{chapter.slug}.md"
    bound = (lambda reference: LATER) if alone else (lambda reference: bound_value(reference, chapter.root, where))
    return Context(
        bound=bound,
        equations=equation_numbers(chapters),
        citations=citations(chapter.root),
        values=glued_values(notebook),
        facts=execution_facts(chapter),
        notebooks={c.slug for c in chapters},
        labels={
            label: other.slug
            for other in chapters
            if other.slug != chapter.slug
            for label in LABEL.findall(read(other.source_path))
        },
    )


# ---------------------------------------------------------------- MyST to Markdown


def _outside_fences(text: str) -> Iterator[tuple[int, str]]:
    """The parts of a text that are not inside a verbatim fence, each with the number of its first line."""
    part: list[str] = []
    start, closing = 0, ""
    for i, line in enumerate(text.split("\n")):
        match = FENCE.match(line)
        if closing:
            if line.strip() == closing:
                closing, start, part = "", i + 1, []
        elif match and match["fence"][0] != ":" and not DIRECTIVE.match(match["info"].strip()):
            yield start, "\n".join(part)
            closing = match["fence"]
        else:
            part.append(line)
    if not closing:
        yield start, "\n".join(part)


def to_markdown(text: str, context: Context, where: str = "the text") -> str:
    """MyST as plain Markdown."""
    out: list[str] = []
    prose: list[str] = []
    lines = text.split("\n")
    i = 0

    def flush() -> None:
        if prose:
            out.append(_inline("\n".join(prose), context, where))
            prose.clear()

    while i < len(lines):
        match = FENCE.match(lines[i])
        if not match:
            prose.append(lines[i])
            i += 1
            continue
        end = _closing(lines, i, match["fence"])
        if end is None:
            raise SourceError(f"{where}: the fence {lines[i].strip()!r} is never closed")
        flush()
        body = [line.removeprefix(match["indent"]) for line in lines[i + 1 : end]]
        directive = DIRECTIVE.match(match["info"].strip())
        if directive:
            block = _directive(directive["name"], directive["argument"], body, context, where)
        elif match["fence"][0] == ":":
            raise SourceError(f"{where}: a colon fence without a directive: {lines[i].strip()!r}")
        else:
            block = "\n".join([match["fence"] + match["info"], *body, match["fence"]])
        out.append("\n".join(match["indent"] + line if line else line for line in block.split("\n")))
        i = end + 1
    flush()
    return "\n".join(out)


def _closing(lines: list[str], start: int, fence: str) -> int | None:
    """The line that closes the fence opened at ``start``: as many marks or more, nothing else."""
    for i in range(start + 1, len(lines)):
        mark = lines[i].strip()
        if mark and set(mark) == {fence[0]} and len(mark) >= len(fence):
            return i
    return None


def _options(body: list[str]) -> tuple[dict[str, str], list[str]]:
    """The options at the head of a directive and the rest of its body."""
    if body and body[0].strip() == "---":
        end = body.index("---", 1)
        loaded = yaml.safe_load("\n".join(body[1:end])) or {}
        return {str(k): str(v) for k, v in loaded.items()}, body[end + 1 :]
    options: dict[str, str] = {}
    while body and (match := OPTION.match(body[0])):
        options[match["key"]] = match["value"] or ""
        body = body[1:]
    return options, body


def _directive(name: str, argument: str, body: list[str], context: Context, where: str) -> str:
    options, content = _options(body)
    text = "\n".join(content).strip("\n")
    if name == "math":
        label = f" ({options['label']})" if "label" in options else ""
        return _inline(f"$$\n{text}\n$${label}", context, where)
    if name in ("figure", "image"):
        picture = f"![{options.get('alt', '')}]({argument})"
        return picture + (f"\n\n*{to_markdown(text, context, where)}*" if text else "")
    if name in ADMONITIONS:
        title = _inline(argument, context, where) if argument else name.capitalize()
        inner = to_markdown(text, context, where)
        if "dropdown" in options.get("class", "").split():
            return f"<details><summary>{title}</summary>\n\n{inner}\n\n</details>"
        quoted = [f"> {line}".rstrip() for line in f"**{title}**\n\n{inner}".split("\n")]
        return "\n".join(quoted)
    raise SourceError(f"{where}: the directive {{{name}}} has no form in a reader's notebook")


def _inline(text: str, context: Context, where: str) -> str:
    """Equations, roles and links of a text without fences; code spans stay as they are."""
    kept: list[str] = []

    def keep(found: str) -> str:
        kept.append(found)
        return f"\x00{len(kept) - 1}\x00"

    text = LABEL.sub(lambda m: keep(f'<a id="{m["label"]}"></a>'), text)
    text = LABEL_LINK.sub(lambda m: _to_label(m["label"], context), text)
    text = DISPLAY.sub(lambda m: keep(_equation(m, context, where)), text)
    text = ROLE.sub(lambda m: keep(_role(m["name"], m["text"], context, where)), text)
    text = CODE_SPAN.sub(lambda m: keep(m[0]), text)
    text = PAGE_LINK.sub(
        lambda m: f"]({m['slug']}.{'ipynb' if m['slug'] in context.notebooks else 'md'}{m['anchor'] or ''})", text
    )
    while "\x00" in text:
        text = re.sub(r"\x00(\d+)\x00", lambda m: kept[int(m[1])], text)
    return text


def _to_label(label: str, context: Context) -> str:
    """The end of a link to a labelled heading, which may stand on another page."""
    page = context.labels.get(label)
    return f"]({f'{page}.ipynb' if page else ''}#{label})"


def _equation(match: re.Match[str], context: Context, where: str) -> str:
    tex, label = match["tex"].strip(), match["label"]
    if label is None:
        return f"$$\n{tex}\n$$"
    return f"$$\n{tex} \\tag{{{_lookup(context.equations, label, 'equation', where)}}}\n$$"


def _lookup(table: dict[str, Any], key: str, what: str, where: str) -> Any:
    if key not in table:
        raise SourceError(f"{where}: no {what} is called {key!r}")
    return table[key]


def _role(name: str, text: str, context: Context, where: str) -> str:
    split = TITLE_TARGET.match(text)
    title, target = (split["title"], split["target"]) if split else ("", text)
    if name == "eq":
        return f"({_lookup(context.equations, target, 'equation', where)})"
    if name == "glue:text":
        return str(_lookup(context.values, target.split(":")[0], "value", where))
    if name == "bound":
        return context.bound(target)
    if name == "stamp":
        return str(_lookup(context.facts, target, "fact of the execution", where))
    if name in ("cite:p", "cite:t", "cite"):
        entries = [_lookup(context.citations, key.strip(), "reference", where) for key in text.split(",")]
        form: Callable[[dict[str, str]], str] = (
            (lambda e: f"[{e['author']} ({e['year']})]({e['url']})")
            if name == "cite:t"
            else (lambda e: f"[{e['author']}, {e['year']}]({e['url']})")
        )
        joined = "; ".join(form(e) for e in entries)
        return joined if name == "cite:t" else f"({joined})"
    if name.removeprefix("py:") in ("func", "class", "mod", "meth", "attr", "data"):
        short = target.split(".")[-1] if target.startswith("~") else target.removeprefix("lossbook.")
        return f"`{title or short}`"
    if name == "term":
        return title or target
    raise SourceError(f"{where}: the role {{{name}}} has no form in a reader's notebook")


# ---------------------------------------------------------------- the notebook

SETUP = """# @title Setup: run this cell first
# It checks that the installed lossbook is the one this notebook was made with. On Colab it installs what is missing.
import hashlib
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

URL, REF = "{url}", "{ref}"
MODULES = {modules}
DIGEST = "{digest}"


def source(ref):
    return f"lossbook @ git+{{URL}}@{{ref}}"


def git(*words):
    done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    return done.stdout if done.returncode == 0 else None


def install(*packages, options=()):
    import numpy
    import torch

    keep = pathlib.Path("lossbook-constraints.txt")  # torch and numpy stay exactly as they are
    keep.write_text(f"torch=={{torch.__version__}}\\nnumpy=={{numpy.__version__}}\\n")
    pip = [sys.executable, "-m", "pip", "install", "-q", "-c", str(keep), *options, *packages]
    try:
        done = subprocess.run(pip, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    finally:
        keep.unlink()
    if done.returncode == 0:
        return
    if source(REF) in packages and git("ls-remote", "--exit-code", URL, REF) is None:
        raise RuntimeError(f"lossbook cannot be installed: {{REF}} of {{URL}} cannot be reached. Is the network on?")
    raise RuntimeError(f"pip could not install {{', '.join(packages)}}: {{done.stderr.strip()[-300:]}}")


def installed():
    found = importlib.util.find_spec("lossbook")
    return found is not None and found.origin is not None  # a folder of that name is no package


def digest_of(read):
    return hashlib.sha256("".join(read(name) or "" for name in MODULES).encode()).hexdigest()[:16]


def commit_of_notebook(folder):
    \"""The last commit whose modules are those that this notebook was made with, or None.\"""
    with tempfile.TemporaryDirectory() as clone:
        if not (folder / ".git").exists():
            folder = clone
            git("clone", "--quiet", "--bare", URL, clone)
        for commit in (git("-C", str(folder), "rev-list", "--all", "--", *MODULES) or "").split():
            if digest_of(lambda name: git("-C", str(folder), "show", f"{{commit}}:{{name}}")) == DIGEST:
                return commit


on_colab = importlib.util.find_spec("google") and importlib.util.find_spec("google.colab")
if on_colab:
    needed = {{"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}}
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        install(*missing)
    if not installed():
        install(source(REF), options=["--no-deps"])
        importlib.invalidate_caches()

if not installed():
    raise RuntimeError(f'lossbook is not installed. In a clone: `make book`; elsewhere: pip install "{{source(REF)}}"')

import lossbook

folder = pathlib.Path(lossbook.__file__).parent.parent
if digest_of(lambda name: p.read_text(encoding="utf-8") if (p := folder / name).exists() else "") != DIGEST:
    try:
        commit = commit_of_notebook(folder)
    except (OSError, subprocess.SubprocessError):  # git is missing, or does not answer
        commit = None
    text = f"The installed lossbook {{lossbook.__version__}} is not the one this notebook was made with ({version}"
    text += f", commit {{commit[:10]}}). " if commit else f"). No commit that {{URL}} shows has its modules. "
    if (folder / ".git").exists():
        raise RuntimeError(text + "`make book` makes the notebook anew.")
    text += f'Restart the kernel after: pip install --force-reinstall --no-deps "{{source(commit or REF)}}"'
    raise RuntimeError(text if commit else f"{{text}}, and take the notebook from {{REF}}, too.")

from lossbook.devices import describe_environment

print(describe_environment())"""


def setup_cell(chapter: Chapter) -> Any:
    """The notebook's first cell: installs lossbook on Colab and checks that it is the notebook's."""
    source = SETUP.format(
        url=project.urls(chapter.root)["Repository"],
        ref=project.ref(chapter.root),
        modules="[\n" + "".join(f'    "{m}",\n' for m in chapter.modules) + "]",
        digest=chapter.package_digest,
        version=project.version(chapter.root),
    )
    cell = nbformat.v4.new_code_cell(source)
    cell.metadata = {"tags": [SETUP_TAG, "nbval-ignore-output"], "cellView": "form", "jupyter": {"source_hidden": True}}
    return cell


class _Anything(dict[str, str]):
    """A table in which everything is found: values before the cells that make them have run."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> str:
        return LATER


def check_text(chapter: Chapter) -> None:
    """Raise :class:`SourceError` where the text holds what no notebook can show; numbers are taken on trust."""
    context = context_for(chapter, None, alone=True)
    context.values = _Anything()
    for position, cell in enumerate(chapter.source.cells, start=1):
        if cell.cell_type == "markdown":
            to_markdown(cell.source, context, f"chapters/{chapter.slug}.md, cell {position}")


def build_notebook(chapter: Chapter, executed: Any, *, alone: bool = False) -> Any:
    """The reader's notebook: the text of the source, the outputs of ``executed`` and its stamp."""
    context, captions = context_for(chapter, executed, alone=alone), caption_numbers(chapter)
    stored = iter(code_cells_with_setup(executed))
    setup = setup_cell(chapter)
    first = next(stored)
    setup.outputs, setup.execution_count = first.outputs, first.execution_count
    cells = [setup]
    for position, cell in enumerate(chapter.source.cells, start=1):
        where = f"chapters/{chapter.slug}.md, cell {position}"
        if cell.cell_type == "markdown":
            source = number_captions(cell.source, captions)
            cells.append(nbformat.v4.new_markdown_cell(to_markdown(source, context, where)))
        else:
            new = nbformat.v4.new_code_cell(cell.source, metadata=cell.metadata)
            done = next(stored)
            new.outputs, new.execution_count = done.outputs, done.execution_count
            cells.append(new)
    for i, cell in enumerate(cells):
        cell.id = f"{chapter.slug.replace('_', '-')}-{i:03d}"
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
        "colab": {"provenance": [], "toc_visible": True},
        "lossbook": executed.metadata["lossbook"],
    }
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.validate(notebook)
    return notebook


def code_cells_with_setup(notebook: Any) -> list[Any]:
    """All code cells, the setup cell first."""
    return [c for c in notebook.cells if c.cell_type == "code"]


def write_notebook(chapter: Chapter, executed: Any, *, alone: bool = False) -> bool:
    """Write the reader's notebook if it differs from what is there; say whether it did."""
    text = nbformat.writes(build_notebook(chapter, executed, alone=alone)) + "\n"
    if chapter.notebook_path.exists() and digest(read(chapter.notebook_path)) == digest(text):
        return False
    partial = chapter.notebook_path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(chapter.notebook_path)
    return True
