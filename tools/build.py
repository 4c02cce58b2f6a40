"""Build the pages: ``python -m tools.build [--clean]``. Warnings are errors. Prints the page to open."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from tools.chapters import ROOT, StaleChapterError, all_notebooks


def build(root: Path = ROOT, output: Path | None = None, *, clean: bool = False) -> subprocess.CompletedProcess[str]:
    """Run jupyter-book on ``root`` and write to ``output/_build`` (default: ``root/_build``).

    Sphinx shows a warning only when it reads a page, so a second build of a page with a warning would succeed. After a
    failed build the next one therefore starts clean.
    """
    built = (output or root) / "_build"
    failed = built / ".failed"
    if clean or failed.exists():
        shutil.rmtree(built, ignore_errors=True)
    try:
        for chapter in all_notebooks(root):  # the build would stop as well, but behind a traceback
            chapter.require_fresh()
    except StaleChapterError as error:
        return subprocess.CompletedProcess([], 1, stdout=str(error))
    program = str(Path(sys.executable).with_name("jupyter-book"))
    command = [program, "build", str(root), "--path-output", str(built.parent), "-W", "-n", "--keep-going", "-q"]
    done = subprocess.run(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        built.mkdir(parents=True, exist_ok=True)
        failed.touch()
    return done


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clean", action="store_true", help="forget what earlier builds left")
    done = build(clean=parser.parse_args().clean)
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        return 1
    print(f"The book is built. Open {ROOT / '_build' / 'html' / 'index.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
