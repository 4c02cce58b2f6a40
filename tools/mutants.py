"""Mutation tests of the losses: change one sign, number or comparison at a time, and see whether a test notices.

``python -m tools.mutants [module ...]`` (or ``make mutants``) changes a module of ``lossbook`` with the operators of
cosmic-ray and runs the tests that judge it on each change. A module is a loss (``focal``), its fast road
(``_fast/focal``) or what all share (``_checks``). What no test notices is a survivor. Survivors are written to
``tests/mutants/<module>.toml``, each with a reason that a person adds. ``equivalent = true`` says that the change
changes no result: what is left out anyway, or a number that decides on speed and memory alone. The others are open.
The command ends with 1 while a survivor has no reason.

cosmic-ray's own runner starts Python anew for each change, which takes longer than most tests here, since torch loads
for seconds. So the changes run in children of one process that has loaded torch already. A child meets the tests that
reach the changed line, the quickest first, without those that take more than ``SLOW`` seconds. Its memory and its time
are limited: a change may ask for all of both.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of a parent are lost in its children

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "mutants"
SLUGS = ("multilabel_softmax", "soft_labels", "focal", "am_softmax", "accuracy", "emo")
SLOW, MEMORY = 6.0, 8 * 2**30  # seconds of a test while its lines are counted, bytes of a child
NOTICED, SURVIVED = 1, 0  # how a child ends

BINARY = (
    "Add_Sub Sub_Add Mul_Div Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul BitOr_BitAnd BitAnd_BitOr LShift_RShift RShift_LShift"
)
COMPARISON = "Eq_NotEq NotEq_Eq Lt_LtE Lt_GtE LtE_Lt LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Is_IsNot IsNot_Is"
OPERATORS = (
    [f"ReplaceBinaryOperator_{name}" for name in BINARY.split()]
    + [f"ReplaceComparisonOperator_{name}" for name in COMPARISON.split()]
    + [f"ReplaceUnaryOperator_{name}" for name in ("USub_UAdd", "Delete_Not", "Delete_Invert")]
    + ["AddNot", "NumberReplacer", "ZeroIterationForLoop"]
    + ["ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"]
    + ["ReplaceBreakWithContinue", "ReplaceContinueWithBreak"]
)


@dataclass(frozen=True)
class Mutant:
    """One change: its operator, its place, and the changed module."""

    operator: str
    line: int
    before: str
    after: str
    source: str


def mutants(source: str) -> Iterator[Mutant]:
    """Every change that the operators can make, type annotations left out."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    hints = type_hints(source)
    lines = source.splitlines()
    tree = get_ast(source)
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        places = [position for node in ast_nodes(tree) for position in operator.mutation_positions(node)]
        for occurrence, ((line, column), _) in enumerate(places):
            if any(start <= (line, column) < end for start, end in hints):
                continue
            changed = mutate_code(source, operator, occurrence)
            if changed is None or not changes(source, changed):
                continue
            after = changed.splitlines()
            differs = next(i for i, pair in enumerate(zip(lines, after, strict=False)) if pair[0] != pair[1])
            yield Mutant(name, differs + 1, lines[differs].strip(), after[differs].strip(), changed)


def changes(source: str, changed: str) -> bool:
    """Whether the changed source is another program: 1e30 + 1 is 1e30, and ``{*options}`` is none."""
    try:
        return ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


def body_lines(source: str) -> set[int]:
    """The lines inside functions: what stands outside runs on import, before any test."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    return {n for f in functions for part in f.body for n in range(part.lineno, (part.end_lineno or 0) + 1)}


def type_hints(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the type annotations stand, and the calls of ``cast``: (line, column) of start and end."""
    found: list[ast.expr] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            found.append(node.annotation)
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            found.append(node.returns)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cast":
            found.append(node.args[0])
    return [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in found]


# ------------------------------------------------------------------------------------------------- what a child does


def modules(root: Path = ROOT) -> tuple[str, ...]:
    """What can be changed: the losses, their fast roads, and what they share."""
    fast = sorted(f"_fast/{path.stem}" for path in (root / "lossbook/_fast").glob("*.py") if path.stem != "__init__")
    shared = sorted(path.stem for path in (root / "lossbook").glob("_[a-z]*.py") if path.stem != "_extras")
    return (*SLUGS, *fast, *shared)


def judges(module: str, root: Path = ROOT) -> list[str]:
    """The tests that judge a module, its own examples among them; those of every loss for what all share."""
    slug = module.removeprefix("_fast/")
    slugs = (slug,) if slug in SLUGS else (slug.strip("_"), *SLUGS)
    names = [f"tests/test_{name}.py" for name in ("interface", "exact", "common", *slugs)]
    return [name for name in (*names, *(f"lossbook/{slug}.py" for slug in slugs)) if (root / name).exists()]


class Loader(SourceFileLoader):
    """Reads a module from a text instead of its file."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self.source = source

    def get_code(self, fullname: str) -> Any:
        return compile(self.source, self.path, "exec")


class Finder(MetaPathFinder):
    """Gives the changed module to whoever imports it, its own package included."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        self.spec = importlib.util.spec_from_file_location(name, path, loader=Loader(name, path, source))

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return self.spec if self.spec and fullname == self.spec.name else None


class Watch:
    """A pytest plugin that writes down which lines of the module each test reaches, and for how long it runs."""

    def __init__(self, module: Path) -> None:
        from coverage import Coverage

        self.module = str(module)
        self.coverage = Coverage(include=[self.module], data_file=None)
        self.seconds: dict[str, float] = {}

    def pytest_sessionstart(self) -> None:
        self.coverage.start()

    def pytest_runtest_setup(self, item: Any) -> None:
        self.coverage.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def reached(self) -> dict[int, list[str]]:
        self.coverage.stop()
        by_line = self.coverage.get_data().contexts_by_lineno(self.module)
        return {line: [test for test in tests if test] for line, tests in by_line.items()}


class Choose:
    """A pytest plugin that keeps the tests of a list, in its order."""

    def __init__(self, tests: list[str]) -> None:
        self.order = {test: i for i, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])


QUIET = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--doctest-modules", "--no-header", "-W", "ignore"]


def baseline(module: str, answer: str) -> None:
    """Run the tests on the unchanged module; write what they reach, and for how long each runs."""
    import pytest

    quiet()
    watch = Watch(ROOT / "lossbook" / f"{module}.py")
    code = pytest.main([*QUIET, *judges(module)], plugins=[watch])
    Path(answer).write_text(json.dumps([watch.reached(), watch.seconds]), encoding="utf-8")
    os._exit(int(code))


def trial(module: str, source: str, tests: list[str], seconds: int) -> None:
    """Run the tests on a changed module."""
    import pytest

    quiet()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.alarm(seconds)  # ends the process, also inside an operator of torch
    name = f"lossbook.{module.replace('/', '.')}"
    sys.meta_path.insert(0, Finder(name, ROOT / "lossbook" / f"{module}.py", source))
    try:
        importlib.import_module(name)
    except Exception:
        os._exit(NOTICED)
    files = sorted({test.split("::")[0] for test in tests})
    code = pytest.main([*QUIET, *files], plugins=[Choose(tests)]) if files else SURVIVED
    os._exit({0: SURVIVED, 5: SURVIVED}.get(int(code), NOTICED))


def quiet() -> None:
    """Drop what the child prints; it would lie between the lines of the others."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


# ------------------------------------------------------------------------------------------------------- the command


def judge(module: str, jobs: int, part: float, *, again: bool = False) -> bool:
    """Try the mutants of a module and write the survivors down; whether each has its reason.

    ``part`` is the share of them that are tried. ``again`` tries those alone that survived the last time.
    """
    from tqdm import tqdm

    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "baseline.json"
        child = context.Process(target=baseline, args=(module, str(answer)))
        child.start()
        child.join()
        if child.exitcode != 0:
            sys.exit(f"{module}: the tests fail without any change")
        reached, seconds = json.loads(answer.read_text(encoding="utf-8"))

    source = (ROOT / "lossbook" / f"{module}.py").read_text(encoding="utf-8")
    inside = body_lines(source)
    everything = sorted(seconds, key=lambda test: seconds[test])
    limit = 60 + int(10 * sum(seconds.values()))

    def survives(mutant: Mutant) -> bool:
        here = (mutant.line in inside and reached.get(str(mutant.line))) or everything
        tests = [test for test in sorted(here, key=lambda t: seconds.get(t, 0.0)) if seconds.get(test, 0.0) <= SLOW]
        child = context.Process(target=trial, args=(module, mutant.source, tests, limit))
        child.start()
        child.join()
        return child.exitcode == SURVIVED

    path = FOLDER / f"{module}.toml"
    record = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {"survivor": []}
    reasons = {(s["before"], s["after"]): s for s in record["survivor"] if s["reason"]}
    possible = list(mutants(source))
    tried = possible[:: round(1 / part)]
    total = len(tried)
    if again:
        left = Counter((s["before"], s["after"]) for s in record["survivor"])
        tried = []
        for mutant in possible:
            if left[mutant.before, mutant.after] > 0:
                left[mutant.before, mutant.after] -= 1
                tried.append(mutant)
        total = record["mutants"] - left.total()  # a line that has changed since says nothing
    if not survives(Mutant("none", 0, "", "", source)):
        sys.exit(f"{module}: a child fails without any change, so it would notice every one")
    with ThreadPoolExecutor(jobs) as pool:
        alive = list(tqdm(pool.map(survives, tried), total=len(tried), desc=module, unit="mutant"))
    survivors = [mutant for mutant, lives in zip(tried, alive, strict=True) if lives]

    words = [
        f"# Written by `python -m tools.mutants {module}`; the reasons are written by people.",
        f"possible = {len(possible)}",
        f"mutants = {total}",
        f"noticed = {total - len(survivors)}",
        *([] if survivors else ["survivor = []"]),
    ]
    for mutant in survivors:
        judged = reasons.get((mutant.before, mutant.after), {"equivalent": False, "reason": ""})
        entry = {"before": mutant.before, "after": mutant.after, **judged}
        # a string or a truth value of JSON is one of TOML
        words += ["", "[[survivor]]", *(f"{key} = {json.dumps(value)}" for key, value in entry.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    open_ones = sum((m.before, m.after) not in reasons for m in survivors)
    share = 1 - len(survivors) / total
    print(f"{module}: {total} mutants, {share:.1%} noticed, {len(survivors)} survive, {open_ones} without a reason")
    return open_ones == 0


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutants", description=__doc__.split("\n\n")[0])
    parser.add_argument("modules", nargs="*", default=modules(), help=f"default: {' '.join(modules())}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="children at a time")
    parser.add_argument("--again", action="store_true", help="try those alone that survived the last time")
    parser.add_argument("--part", type=float, default=1.0, help="share of the mutants to try (1)")
    options = parser.parse_args()
    os.chdir(ROOT)
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    results = [judge(name, options.jobs, options.part, again=options.again) for name in options.modules]
    sys.exit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
