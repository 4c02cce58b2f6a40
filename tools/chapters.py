"""The chapters of the book: where they are, what they depend on, whether their stored outputs are still true.

A page with cells is a MyST text notebook ``chapters/<slug>.md``; a chapter has three: itself, ``<slug>_evidence`` and
``<slug>_exercises``. Its executed form, ``chapters/<slug>.ipynb``, carries a stamp: digests of its code cells, of the
``lossbook`` modules that it imports (also indirectly) and of the files under ``data/`` that it read. If one of them
differs from what is there now, the outputs are stale.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import re
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

# jupytext, nbformat and yaml are imported where they are used: experiments need this module on machines without them.

ROOT = Path(__file__).resolve().parent.parent
SETUP_TAG = "lossbook-setup"
EXECUTE = "make book"
PREVIEW = "LOSSBOOK_PREVIEW"  # set while stale pages are built, too
CATALOGUES = "LOSSBOOK_CATALOGUES"  # set while the texts of the pages are collected, without what cells put into them
EVIDENCE, EXERCISES = "_evidence", "_exercises"  # behind a chapter's slug: its two further pages


def digest(text: str) -> str:
    """16 hex digits of the SHA-256 of a text, the same on every platform."""
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()[:16]


def read(path: Path) -> str:
    """A text file with plain newlines."""
    return path.read_text(encoding="utf-8")


def code_cells(notebook: Any) -> list[Any]:
    """The code cells of a notebook without the generated setup cell."""
    return [c for c in notebook.cells if c.cell_type == "code" and SETUP_TAG not in c.metadata.get("tags", [])]


@cache
def imported_modules(code: str, package: str = "") -> frozenset[str]:
    """Names of all the modules that a piece of code imports, also inside functions.

    ``from a import b`` yields ``a`` and ``a.b``, since ``b`` may be a module, and so does ``a.b`` behind ``import a``;
    ``package`` resolves relative imports.
    """
    nodes = list(ast.walk(ast.parse(code)))
    found: set[str] = set()
    bound: dict[str, str] = {}  # what `import` binds: `import a.b` the name a, `import a.b as c` the name c
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            bound |= {
                a.asname or a.name.split(".")[0]: a.name if a.asname else a.name.split(".")[0] for a in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = f"{package}.{base}".rstrip(".")
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            found.add(f"{bound[node.value.id]}.{node.attr}")
    return frozenset(found)


@cache
def lazy_names(code: str) -> dict[str, str]:
    """The table ``_EXPORTS`` of a package: the names that its ``__getattr__`` loads, each with its module."""
    for node in ast.parse(code).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "_EXPORTS" for target in targets):
            table: dict[str, str] = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            return table
    return {}


def module_files(
    code: str, root: Path, packages: tuple[str, ...] = ("lossbook",), *, package: str = ""
) -> tuple[str, ...]:
    """The files of ``packages`` that a piece of code imports, directly or not, relative to the root, sorted.

    ``package`` is the one that the code belongs to.
    """
    queue = set(imported_modules(code, package))
    seen: set[str] = set()
    files: set[str] = set()
    while queue:
        name = queue.pop()
        if name in seen or name.split(".")[0] not in packages:
            continue
        seen.add(name)
        queue.add(name.rpartition(".")[0])  # importing a module runs its package first
        stem = root.joinpath(*name.split("."))
        file = stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")
        if file.exists():
            files.add(file.relative_to(root).as_posix())
            queue |= imported_modules(read(file), name if stem.is_dir() else name.rpartition(".")[0])
            continue
        parent, _, last = name.rpartition(".")  # no module: a name in its package, which may come from another module
        if (init := root.joinpath(*parent.split("."), "__init__.py")).exists():
            lazy = lazy_names(read(init))
            queue |= {f"{parent}.{module}" for key, module in lazy.items() if last in (key, "*")}
    return tuple(sorted(files))


@cache
def parsed(text: str) -> Any:
    """A MyST text as a notebook; callers change copies only."""
    import jupytext

    return jupytext.reads(text, fmt="md:myst")


def plain_python(code: str) -> str:
    """The code without lines only IPython understands (``%magic``, ``!command``)."""
    return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in code.splitlines())


@dataclass(frozen=True)
class Chapter:
    """One page with cells and everything that can be known of it without executing it.

    A chapter has up to three: the chapter itself, its evidence and its exercises. They share the chapter's number.
    """

    slug: str
    number: int | None  # None: a page with cells that belongs to no chapter
    root: Path = ROOT

    @property
    def main(self) -> str:
        """The slug of the chapter that the page belongs to; its own for every other page."""
        ends = () if self.number is None else (EVIDENCE, EXERCISES)
        return next((self.slug.removesuffix(end) for end in ends if self.slug.endswith(end)), self.slug)

    @property
    def kind(self) -> str:
        """``chapter``, ``evidence`` or ``exercises``; ``page`` for what belongs to no chapter."""
        return "page" if self.number is None else self.slug.removeprefix(self.main).lstrip("_") or "chapter"

    @property
    def source_path(self) -> Path:
        return self.root / "chapters" / f"{self.slug}.md"

    @property
    def notebook_path(self) -> Path:
        return self.root / "chapters" / f"{self.slug}.ipynb"

    @cached_property
    def source(self) -> Any:
        """The source as a notebook, without outputs."""
        return copy.deepcopy(parsed(read(self.source_path)))

    @cached_property
    def notebook(self) -> Any | None:
        """The executed notebook, or None where there is none yet."""
        if not self.notebook_path.exists():
            return None
        import nbformat

        return nbformat.reads(read(self.notebook_path), as_version=4)

    def code_digest(self, notebook: Any | None = None) -> str:
        """Digest of the code cells of a notebook (of the source, if none is given)."""
        cells = code_cells(notebook or self.source)
        return digest("\n\x00".join(cell.source.strip() for cell in cells))

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The files of ``lossbook`` that the chapter imports, directly or not, relative to the root, sorted."""
        code = "\n".join(plain_python(c.source) for c in code_cells(self.source))
        return module_files(f"import lossbook.devices\n{code}", self.root)  # that one is the setup cell's

    @cached_property
    def package_digest(self) -> str:
        """Digest of the files in ``modules``; the setup cell of the notebook compares it with what is installed."""
        return digest("".join(read(self.root / name) for name in self.modules))

    def file_digests(self, names: list[str]) -> dict[str, str | None]:
        """Digests of files under the root; None for a file that does not exist."""
        return {n: digest(read(self.root / n)) if (self.root / n).exists() else None for n in names}

    def stale(self) -> str | None:
        """Why the stored outputs cannot be shown, or None if they are those of the code that is there."""
        if self.notebook is None:
            return "it has not been executed yet"
        if self.code_digest(self.notebook) != self.code_digest():
            return "its code cells differ from those of its notebook"
        stamp = self.notebook.metadata.get("lossbook")
        if not stamp:
            return "its notebook has no stamp"
        if stamp["code"] != self.code_digest():
            return "its code cells changed after they were executed"
        if stamp["modules"] != self.file_digests(list(self.modules)):
            old = stamp["modules"]
            new = self.file_digests(list(self.modules))
            changed = sorted(n for n in old.keys() | new.keys() if old.get(n) != new.get(n))
            return f"{', '.join(changed)} changed after it was executed"
        if stamp["files"] != (now := self.file_digests(list(stamp["files"]))):
            changed = sorted(n for n in now if now[n] != stamp["files"][n])
            return f"{', '.join(changed)} changed after it was executed"
        return None

    def require_fresh(self) -> None:
        """Raise with one line that names the command if the stored outputs are stale."""
        if reason := self.stale():
            raise StaleChapterError(f"chapters/{self.slug}.md is stale: {reason}. Run `{EXECUTE}` to execute it again.")


class StaleChapterError(Exception):
    """The stored outputs of a chapter are not those of its present code."""


def is_notebook_source(path: Path) -> bool:
    """Whether a page is a text notebook: its front matter names a kernel."""
    text = read(path)
    return text.startswith("---\n") and "\nkernelspec:" in text.split("\n---\n", 1)[0]


def toc_pages(root: Path = ROOT) -> list[tuple[str, int | None]]:
    """The pages of the book in reading order, each with its number where its part is numbered."""
    import yaml

    toc = yaml.safe_load(read(root / "_toc.yml"))
    pages: list[tuple[str, int | None]] = [(toc["root"], None)]
    number = 0
    for part in toc["parts"]:
        for entry in part["chapters"]:
            number += bool(part.get("numbered"))
            own = [entry["file"], *(section["file"] for section in entry.get("sections", []))]
            pages += [(file, number if part.get("numbered") else None) for file in own]
    return pages


def all_notebooks(root: Path = ROOT) -> list[Chapter]:
    """All pages with cells, in the order of the table of contents."""
    pages = [((root / page).with_suffix(".md"), number) for page, number in toc_pages(root)]
    return [Chapter(path.stem, number, root) for path, number in pages if is_notebook_source(path)]


def all_chapters(root: Path = ROOT) -> list[Chapter]:
    """The chapters themselves, without evidence and exercises, and without pages such as "Results at scale"."""
    return [page for page in all_notebooks(root) if page.kind == "chapter"]


def pages_of(chapter: Chapter) -> list[Chapter]:
    """The pages of a chapter that are there: itself, its evidence, its exercises, in this order."""
    return [page for page in all_notebooks(chapter.root) if page.number and page.main == chapter.main]


def config(root: Path = ROOT) -> dict[str, Any]:
    """The book's ``_config.yml``."""
    import yaml

    loaded: dict[str, Any] = yaml.safe_load(read(root / "_config.yml"))
    return loaded
