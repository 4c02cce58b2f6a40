"""Execute the chapters whose stored outputs are stale and write the readers' notebooks.

``python -m tools.execute`` executes what is stale, ``--all`` everything, ``--jobs 2`` two at a time, ``--check`` only
tells. A chapter that fails leaves its old notebook untouched.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from tqdm.auto import tqdm

from lossbook.touch import stored
from tools.chapters import ROOT, Chapter, StaleChapterError, all_notebooks, code_cells, read
from tools.reader import TIMINGS, SourceError, bound_pages, check_text, setup_cell, write_notebook

# Runs before a chapter's cells: notes which files under data/ the chapter reads, and keeps progress bars one line long.
BEFORE = """
import sys as _sys
_opened = set()
_sys.addaudithook(lambda event, args: _opened.add(str(args[0])) if event == "open" else None)
"""
# Runs after them: what the stamp records.
AFTER = """
import json as _json, platform as _platform, pathlib as _pathlib, sys as _sys
import numpy as _numpy, torch as _torch, lossbook as _lossbook
from lossbook.devices import best_device as _best, describe_device as _describe
_root = _pathlib.Path(_lossbook.__file__).resolve().parent.parent
def _inside(paths, folder):
    found = {_pathlib.Path(p).resolve() for p in paths if not p.isdigit()}
    return sorted(p.relative_to(_root).as_posix() for p in found if p.is_relative_to(_root / folder))
print(_json.dumps({
    "files": _inside(_opened, "data"),
    "modules": _inside([getattr(m, "__file__", None) or "" for m in list(_sys.modules.values())], "lossbook"),
    "kind": _best().type,
    "device": _describe(),
    "versions": {
        "python": _platform.python_version(),
        "torch": _torch.__version__.split("+")[0],
        "numpy": _numpy.__version__,
    },
}))
"""
PROGRESS = re.compile(r"\d+%\|")


def execute(chapter: Chapter, timeout: int = 1800) -> tuple[Any, dict[str, Any]]:
    """Run the chapter in a fresh kernel; return the notebook with outputs and stamp, and the record of its time."""
    notebook = nbformat.v4.new_notebook()
    before, after = nbformat.v4.new_code_cell(BEFORE), nbformat.v4.new_code_cell(AFTER)
    setup = setup_cell(chapter)
    body = [nbformat.from_dict(dict(cell)) for cell in chapter.source.cells]
    notebook.cells = [before, setup, *body, after]
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(chapter.source_path.parent)}},
    )
    started = time.perf_counter()
    with client.setup_kernel(), tqdm(notebook.cells, desc=chapter.slug, unit="cell", file=sys.stderr) as bar:
        for i, cell in enumerate(bar):
            client.execute_cell(cell, i)
    seconds = time.perf_counter() - started

    facts = json.loads(after.outputs[0]["text"])
    hidden = set(facts["modules"]) - set(chapter.modules)
    if hidden:
        raise SourceError(f"chapters/{chapter.slug}.md loads {sorted(hidden)} in a way that its imports do not show")
    notebook.cells = [setup, *body]
    for count, cell in enumerate(code for code in notebook.cells if code.cell_type == "code"):
        cell.execution_count = count + 1
        shown = joined([output for output in cell.outputs if not is_progress(output)])
        cell.outputs = [tidy(output, chapter, count) for output in shown]
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = count + 1
        cell.metadata.pop("execution", None)
    notebook.metadata["lossbook"] = {
        "code": chapter.code_digest(),
        "modules": chapter.file_digests(list(chapter.modules)),
        "files": chapter.file_digests(facts["files"]),
        "device": facts["device"],
        "versions": facts["versions"],
        "seconds": round(seconds, 1),
    }
    record = {
        "seconds": round(seconds, 1),
        "device": facts["device"],
        "versions": facts["versions"],
        "date": date.today().isoformat(),
    }
    return notebook, {facts["kind"]: record}


def known_seconds(slug: str) -> float:
    """How long a page took the last time, 60 s if nobody knows."""
    times = json.loads(read(ROOT / TIMINGS)) if (ROOT / TIMINGS).exists() else {}
    return max((record["seconds"] for record in times.get(slug, {}).values()), default=60.0)


def is_progress(output: Any) -> bool:
    """Whether an output is nothing but progress bars: they are for the one who waits, not for the page."""
    if output.get("output_type") != "stream" or output.get("name") != "stderr":
        return False
    lines = re.split(r"[\r\n]|\x1b\[\w+", output.text)  # carriage returns and cursor movements redraw a bar
    return all(not line.strip() or PROGRESS.search(line) for line in lines)


def joined(outputs: list[Any]) -> list[Any]:
    """The outputs with neighbouring pieces of one stream as one: where a kernel cuts a stream is chance."""
    whole: list[Any] = []
    for output in outputs:
        last = whole[-1] if whole else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last["text"] += output.text
        else:
            whole.append(output)
    return whole


def tidy(output: Any, chapter: Chapter, count: int) -> Any:
    """An output as it is stored; a warning of a cell is told to the one who runs this."""
    if output.get("output_type") == "stream" and output.get("name") == "stderr":
        print(f"{chapter.slug}, code cell {count} warns: {output.text.strip()}", file=sys.stderr)
    data = output.get("data", {})
    if "text/html" in data:
        data["text/html"] = stored("".join(data["text/html"]))  # a figure to touch: the page brings its scripts
    return output


def record_time(chapter: Chapter, record: dict[str, Any]) -> None:
    """Keep the chapter's time on this kind of device in ``data/results/timings.json``."""
    path = chapter.root / TIMINGS
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone(path.parent):
        times = json.loads(read(path)) if path.exists() else {}
        times.setdefault(chapter.slug, {}).update(record)
        path.write_text(json.dumps(times, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process that asks for the folder has it at this moment."""
    if sys.platform == "win32":
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def side_by_side(slugs: list[str], jobs: int) -> int:
    """Execute pages in processes of their own, ``jobs`` at a time; 1 if one failed."""

    def run(slug: str) -> int:
        return subprocess.run([sys.executable, "-m", "tools.execute", slug, "--alone"]).returncode

    with ThreadPoolExecutor(jobs) as pool:
        return max(pool.map(run, slugs), default=0)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; the exit status is 1 if a chapter failed or, with ``--check``, is stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slugs", nargs="*", help="chapters to execute (default: the stale ones)")
    parser.add_argument("--all", action="store_true", help="execute every chapter, stale or not")
    parser.add_argument("--jobs", type=int, default=1, help="how many pages to execute at the same time (default: 1)")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # a page of --jobs: texts come later
    parser.add_argument("--time", action="store_true", help="keep the time on this device and leave the notebook alone")
    parser.add_argument("--check", action="store_true", help="execute nothing; fail if a chapter is stale")
    options = parser.parse_args(arguments)
    chapters = all_notebooks()
    unknown = set(options.slugs) - {c.slug for c in chapters}
    if unknown:
        parser.error(f"no such chapter: {', '.join(sorted(unknown))}; there are {', '.join(c.slug for c in chapters)}")
    executed: set[str] = set()
    if options.jobs > 1 and not options.check and not options.time:
        slugs = options.slugs or [page.slug for page in chapters if options.all or page.stale()]
        if status := side_by_side(sorted(slugs, key=lambda slug: -known_seconds(slug)), options.jobs):
            return status
        chapters, executed = [], set(slugs)
    try:
        for chapter in chapters:
            if options.check:
                chapter.require_fresh()
                continue
            wanted = options.all or chapter.slug in options.slugs
            reason = "asked for" if wanted else None if options.slugs else chapter.stale()
            if reason:
                check_text(chapter)  # an error there is told before the cells run, not after
                print(f"{chapter.slug}: executing, {reason}", file=sys.stderr)
                try:
                    notebook, record = execute(chapter)
                except CellExecutionError as error:
                    print(f"{chapter.slug}: a cell failed, the old notebook is kept.\n{error}", file=sys.stderr)
                    return 1
                record_time(chapter, record)
                if not options.time:
                    write_notebook(chapter, notebook, alone=True)
                    executed.add(chapter.slug)
        # Texts at last: a page may show numbers of any other page.
        for chapter in [] if options.check or options.alone or options.time else all_notebooks():
            told = {chapter.slug, *bound_pages(read(chapter.source_path))}
            if (options.slugs and not told & executed) or (chapter.slug not in executed and chapter.stale()):
                continue
            if write_notebook(chapter, chapter.notebook) and chapter.slug not in executed:
                print(f"{chapter.slug}: text of the notebook renewed", file=sys.stderr)
    except (SourceError, StaleChapterError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())


__all__ = ["code_cells", "execute", "main", "record_time"]
