"""Where a record comes from: machine, versions, commit, and the code that decided its numbers."""

from __future__ import annotations

import ast
import importlib.metadata
import io
import json
import platform
import re
import subprocess
import tokenize
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tools.chapters import ROOT, digest, module_files, read

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# Where a formatter breaks a line that is too long: behind a bracket that opens, before one that closes, behind a comma.
BEHIND_OPENING, BEFORE_CLOSING = re.compile(r"(?<=[(\[{])\n\s*"), re.compile(r",?\n\s*(?=[)\]}])")
LONG_COMMA = re.compile(r",\n\s*")
NOT_DECIDING = {
    "experiments/harness.py",  # decides when the runs are made and where they are kept, not what they give
    "experiments/__init__.py",
    "lossbook/__init__.py",  # holds the version
    "lossbook/_extras.py",  # imports optional packages
    "lossbook/data/_fetch.py",  # every file is compared with its digest
    "lossbook/devices.py",  # the device is part of the record
}


def machine(device: Any) -> dict[str, Any]:
    """What a torch device is: the models of the parts, and no name of a host."""
    import torch

    if device.type == "cuda":
        return {"device": "cuda", "gpu": torch.cuda.get_device_name(device)}
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = models[0] if models else cpu
    return {"device": "cpu", "cpu": cpu, "threads": torch.get_num_threads()}


def versions(packages: Sequence[str] = ()) -> dict[str, str]:
    """Python, torch, lossbook and the packages that are named."""
    import torch

    import lossbook

    found = {"python": platform.python_version(), "torch": torch.__version__, "lossbook": lossbook.__version__}
    for package in packages:
        found[package] = importlib.metadata.version(package)
    return found


def commit(*paths: str, root: Path = ROOT) -> dict[str, Any]:
    """The commit, and whether ``paths`` differ from it; None outside a repository."""

    def git(*words: str) -> str | None:
        try:
            answer = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return answer.stdout.strip()

    changed = git("status", "--porcelain", "--", *paths)
    return {"commit": git("rev-parse", "HEAD"), "changed": None if changed is None else changed != ""}


@cache
def bare(source: str) -> str:
    """Python without comments, docstrings, empty lines and breaks inside brackets: what can change a result.

    Example:
        >>> bare('def f():\\n    "Says why."\\n    return 1  # one')
        'def f():\\n    return 1'
    """
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    for node in ast.walk(ast.parse(source)):
        first = next(iter(getattr(node, "body", [])), None) if isinstance(node, DOCUMENTED) else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            assert first.end_lineno is not None
            if not lines[first.lineno - 1][: first.col_offset].strip():  # not behind a "def f():" on the same line
                for line in range(first.lineno - 1, first.end_lineno):
                    lines[line] = ""
    code = "\n".join(line.rstrip() for line in lines if line.strip())
    return LONG_COMMA.sub(", ", BEFORE_CLOSING.sub("", BEHIND_OPENING.sub("", code)))


def deciding_code(slug: str, root: Path = ROOT) -> dict[str, str]:
    """The files that decide the numbers of ``experiments/<slug>.py``, each with a digest of its :func:`bare` code."""
    own = f"experiments/{slug}.py"
    files = {own, *module_files(read(root / own), root, ("lossbook", "experiments"), package="experiments")}
    return {name: digest(bare(read(root / name))) for name in sorted(files - NOT_DECIDING)}


def changed_code(record: Mapping[str, Any], root: Path = ROOT) -> list[str]:
    """The files that changed after the record of an experiment was made, sorted."""
    then, now = record["code"], deciding_code(record["slug"], root)
    return sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))


def changed_benchmark(record: Mapping[str, Any], root: Path = ROOT) -> list[str]:
    """The files that a benchmark measures or is, and that differ from those of its commit, sorted."""
    own, measured = f"benchmarks/{record['slug']}.py", f"import lossbook.{record['slug']}\n"
    packages = ("lossbook", "benchmarks", "examples")
    files = {own, *module_files(measured + read(root / own), root, packages, package="benchmarks")}
    changed = []
    for name in sorted(files - NOT_DECIDING):
        then = subprocess.run(
            ["git", "show", f"{record['commit']}:{name}"], cwd=root, capture_output=True, encoding="utf-8"
        )
        if then.returncode or bare(then.stdout) != bare(read(root / name)):
            changed.append(name)
    return changed


def read_record(path: Path) -> dict[str, Any]:
    """A record of an experiment, with its runs one by one."""
    from lossbook.records import unpacked

    return dict(unpacked(json.loads(read(path))))


def record_path(slug: str, root: Path = ROOT) -> Path:
    """The record that the pages show: the one in full size where there is one, else the one for CPUs."""
    full = root / "data" / "results" / f"{slug}_gpu.json"
    return full if full.exists() else full.with_name(f"{slug}.json")


def record_sentence(slug: str, root: Path = ROOT) -> str:
    """Where the numbers of an experiment come from, and a warning if its code changed since; Markdown."""
    from lossbook.records import Record

    path = record_path(slug, root)
    if not path.exists():
        return f"There is no record yet: `python -m experiments.{slug}` makes it."
    record = read_record(path)
    origin = f"commit `{record['commit'][:7]}`" if record["commit"] else "no commit"
    if record["changed"]:
        origin += " with changes that were not committed"
    text = f"Record `{path.relative_to(root).as_posix()}`: {Record(record).about()}, {origin}."
    if confirmed := record.get("confirmed"):
        text += (
            f" The code changed since: {confirmed['runs']} of the runs, one of each method in each task, were repeated "
            f"at the settings chosen then, on {confirmed['date']} at commit `{confirmed['commit'][:7]}`, and no metric "
            f"moved by more than {confirmed['apart']:g}. The choice of the settings was not repeated."
        )
    if changed := changed_code(record, root):
        files = ", ".join(f"`{name}`" for name in changed)
        text += f" **Outdated: {files} changed after these runs. The figures are those of the old code.**"
    return text
