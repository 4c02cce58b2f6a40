"""Releases: ``python -m tools.release 1.0.0`` makes the version, ``python -m tools.release`` tries it.

The first writes the version and today's date into ``lossbook/__init__.py``, ``CHANGELOG.md`` and ``CITATION.cff``, and
into ``pyproject.toml`` what the version promises: beta before 1.0.0, stable from then on. The second, which is ``make
release-check``, tries what would be published, step by step; ``dist`` then holds it. With ``--notes`` it prints what
the changelog says of the version.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path

from tools import project
from tools.chapters import ROOT, all_notebooks, code_cells, read

UNRELEASED = "## Unreleased\n"
LARGEST = 1_000_000  # bytes of a wheel
STATUS = re.compile(r'(?<=")Development Status :: [^"]+')
# The tests of the benchmarks take half of the time, and `make unit` has run them; one shows that their files are there.
TRIED = "not test_benchmarks or soft_labels"
# Every public name is there, with nothing installed beside torch and numpy.
IMPORTS = """
import sys, lossbook
for name in lossbook.__all__: getattr(lossbook, name)
assert not {"sklearn", "matplotlib", "pooch"} & set(sys.modules)
print(lossbook.__version__, lossbook.__file__)
"""


class FailedError(Exception):
    """A step of the check found something; the text says what."""


# ------------------------------------------------------------------------------------------------------- the version


def status(version: str) -> str:
    """The classifier of the package index for what a version promises.

    Example:
        >>> status("0.9.0"), status("1.1.0.dev0")
        ('Development Status :: 4 - Beta', 'Development Status :: 5 - Production/Stable')
    """
    return f"Development Status :: {'4 - Beta' if version.startswith('0.') else '5 - Production/Stable'}"


def set_version(version: str, root: Path = ROOT) -> None:
    """Write a version wherever it stands; one without ``dev`` gets what the changelog holds under "Unreleased".

    Raises:
        FailedError: It is no version, or there is nothing to release.
    """
    if not re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", version):
        raise FailedError(f"{version} is no version: three numbers, such as 1.0.0, or 1.1.0.dev0 after a release")
    log, init, settings = (root / name for name in ("CHANGELOG.md", "lossbook/__init__.py", "pyproject.toml"))
    if "dev" not in version:
        if not notes(read(log), "Unreleased"):
            raise FailedError("CHANGELOG.md has nothing under Unreleased")
        dated = f"{UNRELEASED}\n## {version} - {datetime.date.today().isoformat()}\n"
        log.write_text(read(log).replace(UNRELEASED, dated, 1), encoding="utf-8")
    init.write_text(project.VERSION.sub(f'__version__ = "{version}"', read(init)), encoding="utf-8")
    settings.write_text(STATUS.sub(status(version), read(settings)), encoding="utf-8")
    project.main(root)


def notes(changelog: str, version: str) -> str:
    """What a changelog says of a version, without the heading.

    Example:
        >>> notes("# Changes\\n\\n## Unreleased\\n\\n## 1.1.0 - 2027-01-02\\n\\n- More.\\n\\n## 1.0.0", "1.1.0")
        '- More.'
    """
    found = re.search(rf"^## {re.escape(version)}\b.*\n([\s\S]*?)(?=^## |\Z)", changelog, re.MULTILINE)
    return found[1].strip() if found else ""


# --------------------------------------------------------------------------------------------------------- the check


def run(*command: object, cwd: Path = ROOT, shown: bool = False) -> str:
    """A command's output; with ``shown`` it goes to the terminal instead, for what takes minutes."""
    stream = None if shown else subprocess.PIPE
    # PYTHONPATH would lead to the working tree instead of what is tried.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment.setdefault("OMP_NUM_THREADS", "1")  # the tests run on all cores already
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, stdout=stream, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        name = " ".join(map(str, command))
        raise FailedError(f"{name[:200]} ends with status {done.returncode}\n{(done.stdout or '')[-3000:]}".rstrip())
    return done.stdout or ""


def tree() -> str:
    """Everything is committed, and a tag that is set here names this version."""
    if changed := run("git", "status", "--porcelain"):
        raise FailedError(f"not committed:\n{changed.rstrip()}")
    tags = [tag for tag in run("git", "tag", "--points-at", "HEAD").split() if tag.startswith("v")]
    if tags and tags != [f"v{project.version()}"]:
        raise FailedError(f"the tag {' '.join(tags)} is not v{project.version()}")
    return run("git", "rev-parse", "--short", "HEAD").strip()


def version() -> str:
    """A release's version, dated and told of in the changelog; README and CITATION follow."""
    if "dev" in project.version():
        raise FailedError(f"{project.version()} is no release; `python -m tools.release 1.0.0` makes one")
    if not project.released() or not notes(read(ROOT / "CHANGELOG.md"), project.version()):
        raise FailedError(f"CHANGELOG.md has no section '## {project.version()} - date' with a text")
    if status(project.version()) not in STATUS.findall(read(ROOT / "pyproject.toml")):
        raise FailedError(f"pyproject.toml does not say '{status(project.version())}'")
    if (project.readme(), project.citation()) != (read(ROOT / "README.md"), read(ROOT / "CITATION.cff")):
        raise FailedError("README.md or CITATION.cff is stale: python -m tools.project")
    return f"{project.version()}, {project.released()}"


def records() -> str:
    """The code that decides the records is what it was when they were measured."""
    from tools import compat
    from tools.provenance import changed_benchmark, changed_code

    paths = [path for path in sorted((ROOT / "data/results").glob("*.json")) if path.name != "timings.json"]
    stale, early, older = [], [], []
    for path in paths:
        record = json.loads(read(path))
        if "tasks" in record and (changed := changed_code(record)):
            stale.append(f"{path.name}: {', '.join(changed)} changed since")
        if path.name == compat.RECORD.name and record["code"] != compat.code():
            stale.append(f"{path.name}: the losses changed since; make compat")
        if path.name.startswith("bench_") and record["commit"] and changed_benchmark(record):
            older.append(path.stem)
        if record.get("changed"):
            early.append(path.stem)
    # Times follow the machine more than a few lines of code: whoever releases decides whether to measure again.
    told = {"measured with changes that their commit lacks": early, "times of older code": older}
    remarks = [f"{what}: {', '.join(names)}" for what, names in told.items() if names]
    if stale:
        raise FailedError("\n".join([*stale, *remarks]))
    return "; ".join([f"{len(paths)} records", *remarks, *(["make bench, in a fresh clone"] if remarks else [])])


def notebooks() -> str:
    """Every page was executed with this code, and its notebook installs this version."""
    from tools.reader import setup_cell

    pages = all_notebooks()
    stale = [f"{page.slug}: {reason}" for page in pages if (reason := page.stale())]
    stale += [
        f"{page.slug}: its first cell is not of this version"
        for page in pages
        if page.notebook and page.notebook.cells[0].source != setup_cell(page).source
    ]
    if stale:
        raise FailedError("\n".join([*stale, "make book"]))
    return f"{len(pages)} with {sum(len(code_cells(page.notebook)) for page in pages)} cells, for {project.ref()}"


def built(kind: str) -> Path:
    """The sdist or the wheel in ``dist``."""
    (path,) = (ROOT / "dist").glob({"sdist": "*.tar.gz", "wheel": "*.whl"}[kind])
    return path


def build() -> str:
    """The sdist, and a wheel that a slow line loads in a second."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(sys.executable, "-m", "hatchling", "build", "-d", "dist")
    sizes = {kind: built(kind).stat().st_size for kind in ("sdist", "wheel")}
    if sizes["wheel"] > LARGEST:
        raise FailedError(f"the wheel has {sizes['wheel']:,} bytes; at most {LARGEST:,}")
    return ", ".join(f"{kind} {size:,} bytes" for kind, size in sizes.items())


def sdist() -> str:
    """The tests that travel with the sdist pass in it, all but those of most benchmarks."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.unpack_archive(built("sdist"), folder)
        (inside,) = Path(folder).iterdir()
        options = ("-q", "-n", "auto", "-p", "no:cacheprovider", "-k", TRIED)
        run(sys.executable, "-m", "pytest", *options, cwd=inside, shown=True)
    return "its tests pass"


def wheel() -> str:
    """The wheel works in a fresh environment, and the index will show README.md."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True, symlinks=os.name != "nt")
        python = Path(folder) / ("Scripts" if os.name == "nt" else "bin") / "python"
        pip = (python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "requirements.lock")
        run(*pip, built("wheel"))
        found = run(python, "-c", IMPORTS, cwd=Path(folder)).split()
        if found[0] != project.version() or not found[1].startswith(folder):
            raise FailedError(f"the environment has lossbook {' in '.join(found)}")
        run(*pip, f"{built('wheel')}[notebook,release]", "pytest")
        examples = (ROOT / "README.md", "--pyargs", "lossbook", "-p", "no:cacheprovider", "-c", os.devnull)
        options = ("--doctest-modules", "--doctest-glob=README.md", "-o", "doctest_optionflags=NORMALIZE_WHITESPACE")
        told = run(python, "-m", "pytest", "-q", *options, *examples, cwd=Path(folder))
        run(python, "-m", "twine", "check", "--strict", built("sdist"), built("wheel"), cwd=Path(folder))
    return f"imports; examples: {told.splitlines()[-1]}; README renders"


STEPS: tuple[Callable[[], str], ...] = (tree, version, records, notebooks, build, sdist, wheel)


def check(names: list[str]) -> int:
    """Try the steps, all of them if none is named, and print how each went; the exit status."""
    failed = []
    for step in [step for step in STEPS if not names or step.__name__ in names]:
        print(f"{step.__name__}: {(step.__doc__ or '').strip()}", flush=True)
        start = time.monotonic()
        try:
            result = step()
            print(f"  passed in {time.monotonic() - start:.0f} s: {result}", flush=True)
        except FailedError as error:
            failed.append(step.__name__)
            print("  FAILED: " + str(error).replace("\n", "\n    "), flush=True)
    print(f"Not ready: {', '.join(failed)}" if failed else "Ready. Tag it and push the tag.")
    return bool(failed)


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [step.__name__ for step in STEPS]
    parser.add_argument("what", nargs="*", help=f"a version to make, or steps of the check: {', '.join(names)}")
    parser.add_argument("--notes", action="store_true", help="print what the changelog says of the version")
    options = parser.parse_args()
    if options.notes:
        print(notes(read(ROOT / "CHANGELOG.md"), project.version()))
        return 0
    if set(options.what) <= set(names):
        return check(options.what)
    try:
        (wanted,) = options.what
        set_version(wanted)
    except ValueError:
        parser.error(f"either one version, or steps: {', '.join(names)}")
    except FailedError as error:
        sys.exit(str(error))
    print(f"This is {wanted} now. Next: make book, make test, commit, make release-check, git tag v{wanted}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
