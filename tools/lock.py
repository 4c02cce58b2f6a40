"""Renew ``requirements.lock``: ``python -m tools.lock [torch version]``. Needs nothing but Python and pip.

Installs ``lossbook[test]`` into a fresh environment and writes down every version. torch stays at the version that the
lock names now, unless another is given, since its newest build may be much larger.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
HEAD = """\
# Exact versions of everything in the book's environment; made by `make lock`, installed by `make book`.
# torch is exact on purpose: a range may bring in a much larger build.
"""


def main() -> None:
    """Entry point."""
    pinned = re.search(r"^torch==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    torch = sys.argv[1] if len(sys.argv) > 1 else pinned[1] if pinned else ""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        pip = [str(Path(folder) / "bin" / "python"), "-m", "pip"]
        # hatchling and editables build the editable install itself, without a network.
        wanted = [f"torch=={torch}", "hatchling", "editables", f"{ROOT}[test]"]
        subprocess.run([*pip, "install", "--quiet", *wanted], check=True)
        frozen = subprocess.run([*pip, "freeze", "--exclude", "lossbook"], check=True, capture_output=True, text=True)
    # "+cpu" and the like name one build of a version; the lock names the version.
    lines = [re.sub(r"\+\w+$", "", line) for line in frozen.stdout.splitlines() if "==" in line]
    LOCK.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    print(f"{LOCK.name}: {len(lines)} packages, torch {torch}")


if __name__ == "__main__":
    main()
