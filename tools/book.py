"""Make the book where something has changed since the last time: ``python -m tools.book``, which is ``make book``.

Every file of the repository that a page may depend on is compared with what the last successful build saw, and the
pages with what it left. If nothing differs, there is nothing to do. Else stale chapters are executed and Sphinx reads
what changed. It does so well for one page's own text, but not for what other pages show of it (titles, numbers of
equations, names) nor for the program itself: then the build starts clean.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tools.install import AGAIN, FULL, cannot_write

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = {"_build", "dist", "docs", "shared", "__pycache__", "_static/covers", "experiments/runs"}
# What Sphinx follows by itself.
PAGES = ("chapters/", "lossbook/", "data/", "experiments/", "tests/", "locale/", "index.md")
# Headings, labels, and names of Python: what other pages show of a page or a module.
SHOWN_ELSEWHERE = re.compile(
    r"^#+ .*|^ *(?:async )?(?:def|class) \w+|^.*\([\w:.-]+\)=?$|^ *:(?:label|name):.*|^\*Figure: |^:+\{admonition\}.*",
    re.MULTILINE,
)


def files(root: Path) -> Iterator[Path]:
    """The files that the pages may depend on: all but hidden ones and what is made."""
    for folder, names, found in os.walk(root):
        here = Path(folder).relative_to(root)
        names[:] = [n for n in names if n[0] != "." and n not in LEFT_OUT and (here / n).as_posix() not in LEFT_OUT]
        yield from (Path(folder, name) for name in found if name[0] != ".")


def fingerprint(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def inputs(root: Path) -> dict[str, str]:
    """Each file with its digest; ``environment`` stands for Python and the packages that are installed."""
    packages = "\n".join([sys.version, *sorted(os.listdir(sysconfig.get_paths()["purelib"]))])
    seen = {path.relative_to(root).as_posix(): fingerprint(path.read_bytes()) for path in files(root)}
    return {"environment": fingerprint(packages.encode()), **dict(sorted(seen.items()))}


def shared(root: Path) -> str:
    """Digest of what the pages show of each other."""
    texts = {p.relative_to(root).as_posix(): p for p in files(root) if p.suffix in (".md", ".py")}
    texts = {name: path for name, path in texts.items() if name.startswith(PAGES) and not name.startswith("tests/")}
    shown = [(name, SHOWN_ELSEWHERE.findall(path.read_text(encoding="utf-8"))) for name, path in sorted(texts.items())]
    shown += [("", sorted(p.relative_to(root).as_posix() for p in (root / "locale").rglob("*.po")))]  # the languages
    return fingerprint(json.dumps(shown).encode())


def outputs(root: Path) -> str:
    """Digest of the list of the built files with their sizes and times."""
    built = root / "_build" / "html"
    found = sorted((path.relative_to(built).as_posix(), path.stat()) for path in built.rglob("*") if path.is_file())
    return fingerprint(json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]).encode())


def needs_clean(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether a change lies outside what Sphinx follows from page to page."""
    before, now = old.get("inputs", {}), new["inputs"]
    changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    return (
        old.get("shared") != new["shared"]
        or old.get("outputs") != new["outputs"]
        or not all(name.startswith(PAGES) for name in changed)
    )


def state(root: Path) -> dict[str, Any]:
    """What is there now, to be compared with what the last build left."""
    return {"inputs": inputs(root), "shared": shared(root), "outputs": outputs(root)}


def make(root: Path = ROOT) -> int:
    """Execute and build what is not up to date; the exit status."""
    if reason := cannot_write(root):
        print(reason, file=sys.stderr)
        return 1
    page = root / "_build" / "html" / "index.html"
    stamp = root / "_build" / ".built.json"
    old = json.loads(stamp.read_text(encoding="utf-8")) if stamp.exists() else {}
    if old and old == state(root):
        print(f"Nothing has changed since the book was built. Open {page}")
        return 0
    from tools import build, execute, project  # what they import takes seconds

    if status := execute.main([]):
        return status
    project.main(root)  # the line on speed in README.md follows the page "Speed and memory"
    new = state(root)  # before Sphinx reads: an edit from here on is seen the next time
    stamp.unlink(missing_ok=True)
    done = build.build(root, clean=needs_clean(old, new))
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        if os.strerror(errno.ENOSPC) in done.stdout:
            print(f"The pages could not be written: {FULL}", file=sys.stderr)
        return 1
    stamp.write_text(json.dumps({**new, "outputs": outputs(root)}, indent=0), encoding="utf-8")
    print(f"The book is built. Open {page}")
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(make())
    except KeyboardInterrupt:
        raise SystemExit(f"\nInterrupted. {AGAIN}") from None
