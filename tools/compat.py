"""Run the losses' tests under other versions of torch: ``python -m tools.compat [version ...]``, or ``make compat``.

Without versions: the oldest that ``pyproject.toml`` admits, one in the middle and the newest, of those that pip serves
for this Python. Each has an environment below ``.compat`` with the lock's versions of all else, the oldest with the
oldest numpy; ``--prepare`` makes the environments and stops. The record ``data/results/compat.json`` stands as a table
on the page "The package".

torch's builds for GPUs are installed without the libraries of a GPU, which are larger than all the rest: the tests use
the CPU alone. Where such a build does not load without them, empty libraries of the same names stand in.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

from tools.chapters import ROOT, digest, module_files, read
from tools.mutants import SLUGS
from tools.provenance import bare, commit

RECORD = Path("data/results/compat.json")
ENVIRONMENTS = ROOT / ".compat"
COMMON = ("interface", "common", "exact", "memory", "compiled")
MODULES = (*SLUGS, "spans", "distributed")
TESTS = (*(f"tests/test_{name}.py" for name in (*COMMON, *MODULES)), *(f"lossbook/{name}.py" for name in MODULES))
# What torch needs to load, and the tests beside it.
NEEDED = ("filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing_extensions")
TESTED_WITH = (
    "hypothesis",
    "iniconfig",
    "numpy",
    "packaging",
    "pluggy",
    "pygments",
    "pytest",
    "scipy",
    "sortedcontainers",
    "tqdm",
)
NO_DEVICE = 100  # cudaErrorNoDevice
PER_TEST, PER_FILE = int(os.environ.get("LOSSBOOK_PER_TEST", "300")), 3600  # seconds
PIP = ("-m", "pip", "--disable-pip-version-check")


def key(version: str) -> tuple[int, ...]:
    """A version as numbers, for sorting."""
    return tuple(int(part) for part in version.split("."))


# ---------------------------------------------------------------------------------------------------------- versions


def served() -> list[str]:
    """The releases of torch that pip finds for this Python, oldest first."""
    listed = subprocess.run([sys.executable, *PIP, "index", "versions", "torch"], capture_output=True, text=True)
    found = re.search(r"^Available versions: (.+)$", listed.stdout, re.MULTILINE)
    if not found:
        sys.exit(f"pip does not say which versions of torch there are: {listed.stderr.strip()[-300:]}")
    return sorted({version for version in re.findall(r"\d+\.\d+\.\d+", found[1])}, key=key)


def newest() -> str:
    """The release that pip would install now; a constraint may hold it below the newest that there is."""
    command = [*PIP, "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", "-", "torch"]
    report = json.loads(subprocess.run([sys.executable, *command], check=True, capture_output=True, text=True).stdout)
    return str(report["install"][0]["metadata"]["version"]).partition("+")[0]


def choose(versions: list[str], minimum: str, last: str) -> list[str]:
    """The first release from ``minimum`` on, the first of the minor version in the middle, and ``last``.

    Example:
        >>> choose(["2.5.1", "2.6.0", "2.7.0", "2.7.1", "2.8.0", "2.9.0"], "2.6", "2.8.0")
        ['2.6.0', '2.7.0', '2.8.0']
    """
    admitted = [version for version in versions if key(minimum) <= key(version) <= key(last)]
    firsts = sorted({key(v)[:2]: v for v in reversed(admitted)}.values(), key=key)
    return sorted({firsts[0], firsts[len(firsts) // 2], last}, key=key)


def minimum(package: str = "torch") -> str:
    """The oldest version of a package that ``pyproject.toml`` admits."""
    found = re.search(rf'"{package}>=([\d.]+)"', read(ROOT / "pyproject.toml"))
    assert found is not None
    return found[1]


# ------------------------------------------------------------------------------------------------------ environments


def python_of(version: str) -> Path:
    return ENVIRONMENTS / version / "bin" / "python"


def prepare(version: str) -> str | None:
    """Make the environment of a version of torch; why it cannot be used, or None."""
    folder = ENVIRONMENTS / version
    ready = folder / ".ready"
    wanted = locked(NEEDED + TESTED_WITH)
    if key(version)[:2] == key(minimum()):  # the oldest torch meets the oldest numpy
        wanted = [f"numpy=={minimum('numpy')}.*" if line.startswith("numpy==") else line for line in wanted]
    if ready.exists() and ready.read_text(encoding="utf-8") == "\n".join(wanted):
        return None
    print(f"torch {version}: making .compat/{version}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [str(python_of(version)), *PIP, "install", "--quiet", "--progress-bar", "off", "--no-deps"]
    for packages in (wanted, [f"torch=={version}"]):
        done = subprocess.run([*pip, *packages], capture_output=True, text=True)
        if done.returncode:
            return f"pip could not install {' '.join(packages)}: {done.stderr.strip()[-300:]}"
    stand_in(next(folder.glob("lib/python*/site-packages/torch/lib")))
    done = subprocess.run([python_of(version), "-c", "import torch"], capture_output=True, text=True)
    if done.returncode:
        return f"it does not load (status {done.returncode}): {done.stderr.strip()[-300:]}"
    ready.write_text("\n".join(wanted), encoding="utf-8")
    return None


def locked(names: tuple[str, ...], root: Path = ROOT) -> list[str]:
    """The lines of ``requirements.lock`` on some packages."""
    lines = {line.partition("==")[0].lower(): line for line in read(root / "requirements.lock").splitlines()}
    return [lines[name] for name in names]


def stand_in(folder: Path) -> None:
    """Build a library for each that the libraries in ``folder`` ask for and that is not there.

    Each has all the functions that nobody else defines. They tell torch what is true: there is no GPU.
    """
    if sys.platform != "linux":  # elsewhere torch comes without libraries of a GPU
        return
    here = [str(path) for path in sorted(folder.glob("*.so*"))]
    told = "".join(output("ldd", path) for path in here)
    missing = dict.fromkeys(re.findall(r"^\s*(\S+) => not found", told, re.MULTILINE))
    if not missing:
        return
    # library -> version -> functions; a caller asks for a function of a version, and for a version of a library
    stubs: dict[str, dict[str, set[str]]] = {library: {"": set()} for library in missing}
    for block in output("objdump", "-p", *here).split("required from ")[1:]:
        library, *lines = block.splitlines()
        if library.rstrip(":") in stubs:
            for line in lines:
                if match := re.fullmatch(r"\s+0x\w+ 0x\w+ \d+ (\S+)", line):
                    stubs[library.rstrip(":")][match[1]] = set()
    known = {line.split()[-1].partition("@")[0] for line in symbols("--defined-only", *here, *outside(told))}
    for line in symbols("--undefined-only", *here):
        kind, symbol = line.split()[-2:]
        name, _, version = symbol.partition("@")
        if version or (kind == "U" and name not in known and not name.startswith(("Py", "_Py"))):
            for versions in stubs.values():
                if version in versions:
                    versions[version].add(name)
    for library, versions in stubs.items():
        build_stub(folder / library, versions)


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout


def outside(told: str) -> list[str]:
    """The libraries of the system that ``ldd`` found."""
    return sorted(set(re.findall(r"=> (/\S+)", told)))


def symbols(option: str, *libraries: str) -> list[str]:
    """What ``nm`` tells of the dynamic symbols of some libraries."""
    return [line for line in output("nm", "-D", option, *libraries).splitlines() if len(line.split()) >= 2]


def build_stub(path: Path, versions: dict[str, set[str]]) -> None:
    """Compile a library with the functions of each version ("" is none)."""
    source = "".join(
        f'const char *{name}(void) {{ return "no GPU"; }}\n'
        if "String" in name
        else f"int {name}(void) {{ return {NO_DEVICE}; }}\n"
        for name in sorted(set().union(*versions.values()))
    )
    nodes = [f"{v} {{ global: {' '.join(f'{n};' for n in sorted(names))} }};\n" for v, names in versions.items() if v]
    with tempfile.NamedTemporaryFile("w", suffix=".map") as script:
        script.write("".join(nodes))
        script.flush()
        command = ["cc", "-shared", "-fPIC", "-w", "-x", "c", "-", f"-Wl,-soname,{path.name}", "-o", str(path)]
        command += [f"-Wl,--version-script={script.name}"] if nodes else []
        subprocess.run(command, input=source, text=True, check=True)


# ------------------------------------------------------------------------------------------------------------- tests


def counts(report: Path) -> tuple[Counter[str], list[str]]:
    """How many tests of a file passed, failed and were skipped, and the names of those that failed."""
    found: Counter[str] = Counter(passed=0, failed=0, skipped=0)
    failures = []
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[kind] += 1
        if kind == "failed":
            failures.append(str(case.get("name")))
    return found, failures


def run_file(python: Path, file: str, *options: str) -> tuple[Counter[str], list[str]]:
    """Run the tests of one file with another Python; a file that crashes or never ends is one failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tools.compat"]
        try:
            done = subprocess.run(
                [*command, f"--junitxml={report}", *options, file],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                timeout=PER_FILE,
            )
        except subprocess.TimeoutExpired:
            return Counter(passed=0, failed=1, skipped=0), [f"{file} does not end"]
        if not report.exists():
            reason = (done.stdout + done.stderr).strip().splitlines() or [""]
            return Counter(passed=0, failed=1, skipped=0), [f"{file} ends with status {done.returncode}: {reason[-1]}"]
        return counts(report)


def pytest_runtest_setup(item: Any) -> None:
    """As a plugin of pytest: stop a test that does not end."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"{item.nodeid} runs for more than {PER_TEST} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(PER_TEST)


def pytest_runtest_teardown() -> None:
    signal.alarm(0)


def code(root: Path = ROOT) -> dict[str, str]:
    """The modules of the losses and what they import, each with a digest of its code without remarks."""
    imports = "\n".join(f"import lossbook.{name}" for name in MODULES)
    return {name: digest(bare(read(root / name))) for name in module_files(imports, root)}


# -------------------------------------------------------------------------------------------------------- the record


def table(root: Path = ROOT) -> str:
    """The record as Markdown; nothing where there is none."""
    path = root / RECORD
    if not path.exists():
        return ""
    record = json.loads(read(path))
    lines = ["| torch | NumPy | passed | failed | skipped |", "|---|---|---|---|---|"]
    for version, result in record["torch"].items():
        total = sum((Counter(c) for c in result["tests"].values()), Counter())
        row = (version, result["numpy"], *(total[kind] for kind in ("passed", "failed", "skipped")))
        lines.append(f"| {' | '.join(map(str, row))} |")
    origin = f"commit `{record['commit'][:7]}`" if record["commit"] else "no commit"
    if record["changed"]:
        origin += " with changes that were not committed"
    about = f"The tests of the losses on the CPU, Python {record['python']}, {record['date']}, {origin}."
    then, now = record["code"], code(root)
    if changed := sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name)):
        about += f" **Outdated: {', '.join(f'`{name}`' for name in changed)} changed since.**"
    return "\n".join([about, "", *lines])


def main() -> int:
    """Entry point; the exit status is 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="python -m tools.compat", description=__doc__.split("\n\n")[0])
    parser.add_argument("versions", nargs="*", help="default: the oldest, a middle and the newest")
    parser.add_argument("--prepare", action="store_true", help="make the environments and stop")
    parser.add_argument("--again", action="store_true", help="only what failed, if the code is the same")
    options = parser.parse_args()
    versions = options.versions or choose(served(), minimum(), newest())
    for version in versions:
        if reason := prepare(version):
            sys.exit(f"torch {version}: {reason}")
    print(f"Environments: {', '.join(f'.compat/{version}' for version in versions)}")
    if options.prepare:
        return 0
    tests = [name for name in TESTS if (ROOT / name).exists()]
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        **commit("lossbook", "tests"),
        "python": sys.version.split()[0],
        "code": code(),
        "torch": {},
    }
    path = ROOT / RECORD
    before = json.loads(read(path)) if options.again else {"code": {}, "torch": {}}
    for version in versions:
        numpy = output(str(python_of(version)), "-c", "import numpy; print(numpy.__version__)").strip()
        results: dict[str, Any] = {"numpy": numpy, "tests": {}, "failures": {}}
        earlier = before["torch"].get(version, {}) if before["code"] == record["code"] else {}
        for name in tests:
            if name in earlier.get("tests", {}) and name not in earlier["failures"]:
                results["tests"][name] = earlier["tests"][name]
                continue
            found, failures = run_file(python_of(version), name)
            results["tests"][name] = dict(found)
            if failures:
                results["failures"][name] = failures
            print(f"torch {version}: {name}: " + ", ".join(f"{n} {kind}" for kind, n in found.items()), flush=True)
        record["torch"][version] = results
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    failed = sum(c["failed"] for result in record["torch"].values() for c in result["tests"].values())
    print(f"{RECORD}: {failed or 'no'} failures")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
