"""Make the environment ``.venv`` from ``requirements.lock``: ``python -m tools.install``. Needs Python and pip alone.

The stamp ``.venv/.ready`` is written last, after everything that it stands for.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
AGAIN = "The same command goes on from here."
FULL = f"the disk is full; the environment needs about 2 GB, the pages 0.1 GB. {AGAIN}"
# What pip says, and what it means.
REASONS = {
    "No space left on device": FULL,
    "Disk quota exceeded": FULL,
    "Retrying (Retry(": f"the package index cannot be reached. Is the network on? {AGAIN}",
}


def cannot_write(root: Path = ROOT) -> str | None:
    """Why nothing can be made in a folder, in one sentence, or None."""
    if os.access(root, os.W_OK):
        return None
    return f"{root} cannot be written to; copy it to a folder of your own and run the command there."


def install(root: Path = ROOT) -> str | None:
    """Fill ``root/.venv``; what went wrong, in one sentence, or None."""
    if reason := cannot_write(root):
        return reason
    folder = root / ".venv"
    ready = folder / ".ready"
    ready.unlink(missing_ok=True)
    print("Installing the book's environment into .venv (once; a few minutes if packages must be downloaded)")
    try:
        import venv  # Debian has it in a package of its own

        settings = folder / "pyvenv.cfg"
        other = settings.exists() and f"version = {platform.python_version()}" not in settings.read_text().splitlines()
        venv.create(folder, clear=other, with_pip=True, symlinks=os.name != "nt")  # of another Python: from nothing
    except (ImportError, OSError, subprocess.CalledProcessError) as error:
        if shutil.disk_usage(root).free < 1e8:
            return f"Python could not make .venv: {FULL}"
        what = "a part of venv is missing. On Debian and Ubuntu: apt install python3-venv"
        return f"Python could not make .venv: {error if isinstance(error, OSError) else what}"
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install"]
    # pip checks what a package needs: a torch that brings its own libraries gets them although the lock lists none.
    command = [*pip, "--no-compile", "--progress-bar", "off", "-r", "requirements.lock"]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pipe:
        assert pipe.stdout is not None
        found, told = 0, []
        for line in pipe.stdout:
            if line.startswith(("Collecting", "Requirement")):
                found += 1
                print(f"\r  {found} packages found", end="", flush=True)
            elif line.startswith("Installing coll"):
                print("\n  installing them", end="", flush=True)
            elif not line.startswith((" ", "Using cached", "Downloading", "Successfully")):
                told.append(line)
    print()
    if pipe.returncode:
        return why("pip could not install everything that requirements.lock names", "".join(told))
    last = [*pip, "--quiet", "--no-deps", "--no-build-isolation", "-e", "."]
    done = subprocess.run(last, cwd=root, capture_output=True, text=True)
    if done.returncode:
        return why("pip could not install lossbook itself into .venv", done.stderr)
    ready.touch()
    return None


def why(what: str, told: str) -> str:
    """The sentence on a failure of pip; where its reason is not known, all that it told stands above."""
    for sign, reason in REASONS.items():
        if sign in told:
            return f"{what}: {reason}"
    print(told.strip(), file=sys.stderr)
    return f"{what}; its reason stands above."


def main() -> None:
    """Entry point."""
    try:
        sys.exit(install())
    except KeyboardInterrupt:
        sys.exit(f"\nInterrupted. {AGAIN}")


if __name__ == "__main__":
    main()
