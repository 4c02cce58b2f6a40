"""Build the pages: ``python -m tools.build [--clean] [--preview]``. Warnings are errors. Prints the page to open.

``--preview`` is for writing: stale pages are built too, with the outputs of those cells that did not change, numbers
that are not there yet are left open, and warnings are told and no errors.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tools.chapters import PREVIEW, ROOT, StaleChapterError, all_notebooks

# Not the script of that name, which knows the path where it was installed: this folder may have moved since.
JUPYTER_BOOK = (sys.executable, "-c", "from jupyter_book.cli.main import main; main()")


def build(
    root: Path = ROOT, output: Path | None = None, *, clean: bool = False, preview: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run jupyter-book on ``root`` and write to ``output/_build`` (default: ``root/_build``).

    Sphinx shows a warning only when it reads a page, so a second build of a page with a warning would succeed. After a
    failed build the next one therefore starts clean.
    """
    built = (output or (root / "_build" / "preview" if preview else root)) / "_build"
    failed = built / ".failed"
    if clean or failed.exists():
        shutil.rmtree(built, ignore_errors=True)
    try:
        for chapter in [] if preview else all_notebooks(root):  # the build would stop as well, but behind a traceback
            chapter.require_fresh()
    except StaleChapterError as error:
        return subprocess.CompletedProcess([], 1, stdout=str(error))
    command = [*JUPYTER_BOOK, "build", str(root), "--path-output", str(built.parent), "-q"]
    command += [] if preview else ["-W", "-n", "--keep-going"]
    environment = {**os.environ, PREVIEW: "1" if preview else ""}
    done = subprocess.run(
        command, cwd=root, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        built.mkdir(parents=True, exist_ok=True)
        failed.touch()
    return done


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clean", action="store_true", help="forget what earlier builds left")
    parser.add_argument("--preview", action="store_true", help="also pages that are stale; warnings are no errors")
    options = parser.parse_args()
    done = build(clean=options.clean, preview=options.preview)
    if done.returncode or options.preview:
        print(done.stdout, file=sys.stderr)
    if done.returncode:
        return 1
    folder = ROOT / "_build" / ("preview/_build/html" if options.preview else "html")
    print(f"The book is built. Open {folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
