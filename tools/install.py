"""Make the environment ``.venv`` from ``requirements.lock``: ``python -m tools.install``. Needs Python and pip alone.

The stamp ``.venv/.ready`` is written last, after everything that it stands for.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)


def install(root: Path = ROOT) -> str | None:
    """Fill ``root/.venv``; what went wrong, or None."""
    folder = root / ".venv"
    ready = folder / ".ready"
    ready.unlink(missing_ok=True)
    print("Installing the book's environment into .venv (once; a few minutes if packages must be downloaded)")
    try:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    except (OSError, subprocess.CalledProcessError) as error:
        return f"Python could not make .venv ({error}). On Debian and Ubuntu its package python3-venv is needed."
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install"]
    # pip checks what a package needs: a torch that brings its own libraries gets them although the lock lists none.
    command = [*pip, "--no-compile", "--progress-bar", "off", "-r", "requirements.lock"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as pipe:
        assert pipe.stdout is not None
        found = 0
        for line in pipe.stdout:
            if line.startswith(("Collecting", "Requirement")):
                found += 1
                print(f"\r  {found} packages found", end="", flush=True)
            elif line.startswith("Installing coll"):
                print("\n  installing them", end="", flush=True)
    print()
    if pipe.returncode:
        return "pip could not install everything that requirements.lock names; its reason stands above."
    done = subprocess.run([*pip, "--quiet", "--no-deps", "--no-build-isolation", "-e", "."], cwd=root)
    if done.returncode:
        return "pip could not install lossbook itself into .venv; its reason stands above."
    ready.touch()
    return None


def main() -> None:
    """Entry point."""
    if sys.version_info < OLDEST:
        wanted, here = ".".join(map(str, OLDEST)), sys.version.split()[0]
        sys.exit(f"lossbook needs Python {wanted} or newer, this is {here}. Use: make PYTHON=python3.12")
    sys.exit(install())


if __name__ == "__main__":
    main()
