"""Every benchmark runs at a tiny size, and the harness counts, compares and reports as it says."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import choosing, distributed, harness
from benchmarks.harness import FEW, GOALS, MANY, ROOT, Case, Peer, at_most, busy, copy, main, moved_bytes, peak_bytes

NO_CHAPTER = ("__init__", "choosing", "distributed", "harness")
SLUGS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in NO_CHAPTER)
RECORD = {"slug", "tiny", "date", "commit", "changed", "machine", "versions", "method", "cases", "skipped"}
ROW = {
    *("loss", "variant", "size", "shape", "scores", "bytes_moved", "contenders", "values", "peak_bytes"),
    *("modes", "not_compiled", "goals"),
}


def check_record(record: dict[str, Any], slug: str) -> None:
    assert set(record) == RECORD
    assert record["slug"] == slug
    assert {"device", "cores", "copied_bytes_per_second"} < set(record["machine"])
    assert all(speed > 0 for speed in record["machine"]["copied_bytes_per_second"].values())
    assert {"python", "torch", "lossbook"} <= set(record["versions"])
    assert record["cases"]
    for row in record["cases"]:
        assert set(row) - {"bytes_per_weight"} == ROW
        assert row["size"] in ("tiny", "small", "middle", "large", "full")
        assert set(row["values"]) == set(row["peak_bytes"]) <= set(row["contenders"])
        assert all(peak > 0 for peak in row["peak_bytes"].values())
        assert row["modes"] or row["bytes_per_weight"] > 0
        for mode in row["modes"]:
            assert set(mode) == {"threads", "busy", "clock", "rounds", "seconds", "ratios"}
            assert all(seconds > 0 for seconds in mode["seconds"].values())
            assert "ours / plain" in mode["ratios"]
            for name, part in mode["ratios"].items():
                ours, theirs = name.split(" / ")
                assert part["ratio"] == pytest.approx(
                    mode["seconds"][ours] / mode["seconds"][theirs], rel=1e-2, abs=1e-4
                )
                assert part["quartiles"] == sorted(part["quartiles"])
        for goal in row["goals"]:
            assert goal["reached"] == (goal["ratio"] is not None and goal["ratio"] <= goal["limit"])
            assert goal["reached"] or goal["reason"]
    text = json.dumps(record)
    assert str(ROOT) not in text
    assert str(Path.home()) + "/" not in text


@pytest.mark.parametrize("slug", SLUGS)
def test_every_benchmark_runs_at_a_tiny_size(slug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [slug, "--tiny", "--out", str(tmp_path)])
    monkeypatch.delitem(sys.modules, f"benchmarks.{slug}", raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{slug}", run_name="__main__")
    assert ended.value.code == 0
    record = json.loads((tmp_path / f"bench_{slug}.json").read_text(encoding="utf-8"))
    check_record(record, slug)
    assert record["tiny"] is True
    assert {mode["threads"] for row in record["cases"] for mode in row["modes"]} == {1, 2}
    assert {row["loss"] for row in record["cases"]} == {
        c.loss for c in importlib.import_module(f"benchmarks.{slug}").CASES
    }
    if record["skipped"]:
        pytest.skip("; ".join(record["skipped"]))


@pytest.mark.parametrize("slug", SLUGS)
def test_every_public_loss_is_measured_small_middle_and_large(slug: str) -> None:
    module = importlib.import_module(f"lossbook.{slug}")
    cases: Sequence[Case] = importlib.import_module(f"benchmarks.{slug}").CASES
    endings = ("_loss", "_bce", "_kl", "_cross_entropy", "expected_accuracy")
    losses = {name for name in module.__all__ if name.endswith(endings)}
    assert losses == {case.loss for case in cases}
    for loss in losses:
        rows = [(size, case.scores(*shape)) for case in cases if case.loss == loss for size, shape in case.shapes]
        assert {size for size, _ in rows} == {"small", "middle", "large"}
        assert min(scores for _, scores in rows) < FEW
        assert max(scores for _, scores in rows) > MANY / 2


@pytest.mark.parametrize("slug", SLUGS)
def test_the_stored_record_is_a_full_run(slug: str) -> None:
    path = ROOT / "data" / "results" / f"bench_{slug}.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": [{}]}
    if "bytes_moved" not in record["cases"][0]:
        pytest.skip(f"not measured with this harness yet: python -m benchmarks.{slug}")
    check_record(record, slug)
    assert record["tiny"] is False
    assert record["machine"]["device"] == "cpu"
    measured = {(row["loss"], row["variant"], row["size"], tuple(row["shape"])) for row in record["cases"]}
    cases: Sequence[Case] = importlib.import_module(f"benchmarks.{slug}").CASES
    assert measured >= {(case.loss, case.variant, *row) for case in cases for row in case.shapes}


@pytest.mark.usefixtures("book_sources")
def test_what_the_advice_costs_is_measured_beside_the_plain_losses(tmp_path: Path) -> None:
    assert choosing.main(["--tiny", "--out", str(tmp_path)]) == 0
    tiny, stored = (
        json.loads((folder / "bench_choosing.json").read_text(encoding="utf-8"))
        for folder in (tmp_path, ROOT / "data" / "results")
    )
    page = (ROOT / "chapters" / "choosing.md").read_text(encoding="utf-8")
    for record, is_tiny in ((tiny, True), (stored, False)):
        assert record["tiny"] is is_tiny
        assert record["machine"]["device"] == "cpu"
        rows = record["cases"]
        assert [(row["loss"], row["beside"]) for row in rows] == [
            (name, group.plain) for group in choosing.GROUPS for name in group.losses
        ]
        for row in rows:
            assert row["rounds"] >= 3
            assert row["ratio"] > 0
            assert row["ratio"] == 1 or row["loss"] != row["beside"]
            assert row["quartiles"] == sorted(row["quartiles"])
            assert f"{{glue:text}}`time_{row['loss']}`" in page or row["loss"] == row["beside"]


def test_ranks_and_samples_are_measured(tmp_path: Path) -> None:
    assert distributed.main(["--tiny", "--out", str(tmp_path)]) == 0
    tiny, stored = (
        json.loads((folder / "bench_distributed.json").read_text(encoding="utf-8"))
        for folder in (tmp_path, ROOT / "data" / "results")
    )
    for record, points, seeds in ((tiny, distributed.TINY, 2), (stored, distributed.POINTS, len(distributed.SEEDS))):
        found = [tuple(row[name] for name in ("rows", "width", "classes", "ranks", "share")) for row in record["costs"]]
        assert sorted(found, key=str) == sorted(points, key=str)
        for row in record["costs"]:
            assert row["rounds"] >= 3
            assert row["cpu_seconds"] > 0
            assert row["peak_bytes"] >= row["weight_bytes"]  # of the gradient
            assert row["sent_bytes"] == {"allgather": 1048, "allreduce": 4 * row["rows"] * (row["width"] + 3)}
        linear = record["linear_emo"]
        assert len(linear["costs"]) == (1 if record["tiny"] else len(distributed.LINEAR_EMO))
        for row in linear["costs"]:  # a word vector and six numbers, back the gradient of the hidden states
            numbers = row["width"] + linear["vector"] + 6
            assert row["sent_bytes"] == {"allgather": 1048, "allreduce": 4 * row["rows"] * numbers}
        runs = record["sampling"]["runs"]
        assert all(sum(run["share"] == share for run in runs) == seeds for share in {run["share"] for run in runs})
        assert all(0 <= run["accuracy"] <= 1 for run in runs)
    assert (tiny["tiny"], stored["tiny"]) == (True, False)


def ones(n: int) -> tuple[Tensor]:
    return (torch.ones(n, requires_grad=True),)


def square(x: Tensor) -> Tensor:
    return (x * x).sum()


def wide(x: Tensor) -> Tensor:
    """The same, with arrays more than it needs."""
    return (x * x.exp().log() * 1.0 + 0 * x).sum()


LIBRARY = SimpleNamespace(__name__="library", square=square, wide=wide)
CASE = Case("square", ones, (("middle", (50_000,)),), (10,), square)


def run(case: Case, out: Path, *words: str) -> tuple[int, dict[str, Any]]:
    code = main("x", [case], ["--out", str(out), "--seconds", "0", *words], LIBRARY)
    record: dict[str, Any] = json.loads((out / "bench_x.json").read_text(encoding="utf-8"))
    return code, record


def test_peak_counts_what_lives_at_once() -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            torch.empty(1000)

    def together() -> torch.Tensor:
        parts = [torch.empty(1000) for _ in range(5)]
        return parts[0]

    assert peak_bytes(one_after_the_other) == 4000
    assert peak_bytes(together) == 20_000


def test_peak_of_forward_and_backward_includes_the_gradient() -> None:
    x = torch.randn(100_000, requires_grad=True)

    def run() -> None:
        x.exp().sum().backward()

    # exp's output is saved, the gradient comes beside it; scalars and alignment take the rest
    assert peak_bytes(run) == pytest.approx(2 * x.numel() * 4, rel=0.01)


def test_the_least_bytes_are_the_arguments_and_the_gradients() -> None:
    scores, target = torch.ones(100, 10, requires_grad=True), torch.ones(100, dtype=torch.int64)
    assert moved_bytes((scores, target, 2.0)) == 2 * 4000 + 800
    contender = copy(8800, torch.device("cpu"))
    contender.args[0].fill_(7)
    assert contender.run().tolist() == [7] * 4400


def test_a_record_of_a_full_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "GOALS", dict.fromkeys(GOALS, 1e9))  # no time is judged here
    before = torch.get_num_threads()
    code, record = run(CASE, tmp_path)
    assert code == 0
    assert torch.get_num_threads() == before
    check_record(record, "x")
    (row,) = record["cases"]
    assert (row["loss"], row["size"], row["shape"], row["scores"]) == ("square", "middle", [50_000], 50_000)
    assert row["bytes_moved"] == 400_000
    assert row["values"] == {"ours": 50_000.0, "plain": 50_000.0}
    assert row["peak_bytes"]["ours"] == row["peak_bytes"]["plain"] >= 400_000
    assert [(m["threads"], m["busy"], m["clock"]) for m in row["modes"]] == [
        (1, False, "cpu"),
        (1, True, "wall"),
        (2, False, "wall"),
        (2, True, "wall"),
    ]
    both = {"ours / plain", "ours / plain compiled", "ours compiled / plain compiled"}
    assert [set(m["ratios"]) for m in row["modes"]] == [
        {*both, "ours / copy"},
        both,
        {"ours / plain", "ours / copy"},  # on two threads only large shapes are compiled
        {"ours / plain"},
    ]
    assert row["not_compiled"] == []
    goals = [(goal["goal"], goal.get("threads")) for goal in row["goals"]]
    assert goals == [("memory", None), ("eager", 1), ("compiled", 1), ("eager", 2), ("busy", 1), ("busy", 2)]
    assert "square middle (50000,): [1 thread: plain " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reasons", "code"),
    [
        ({}, 1),
        ({"memory": "it keeps arrays"}, 0),
        ({"middle memory": "it keeps arrays"}, 0),
        ({"small memory": "no"}, 1),
    ],
)
def test_a_missed_goal_needs_a_reason(
    reasons: dict[str, str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "GOALS", dict.fromkeys(GOALS, 1e9) | {"memory": 0.6})
    monkeypatch.setattr(harness, "modes_of", lambda *_, **__: ([], []))
    got, record = run(replace(CASE, loss="wide", reasons=reasons), tmp_path)
    assert got == code
    (goal,) = record["cases"][0]["goals"]
    assert (goal["goal"], goal["limit"], goal["reached"]) == ("memory", 0.6, False)
    assert goal["ratio"] > 1.2
    assert goal["reason"] == (None if code else "it keeps arrays")


def ratios(**found: float) -> dict[str, Any]:
    names = {"plain": "ours / plain", "fast": "ours / fast", "eager": "ours / plain compiled"}
    names["compiled"] = "ours compiled / plain compiled"
    return {names[key]: {"ratio": ratio} for key, ratio in found.items()}


def row(scores: int, *modes: tuple[int, bool, dict[str, Any]], **peaks: int) -> dict[str, Any]:
    listed = [{"threads": t, "busy": loaded, "ratios": r} for t, loaded, r in modes]
    peaks = {"ours": 50, "plain": 100} | peaks
    return {"size": "large", "scores": scores, "peak_bytes": peaks, "modes": listed, "not_compiled": []}


def verdicts(case: Case, row: dict[str, Any]) -> dict[tuple[str, Any], tuple[float, bool]]:
    return {(g["goal"], g.get("threads")): (g["limit"], g["reached"]) for g in harness.goals_of(case, row)}


def test_every_goal_is_judged() -> None:
    fast = Peer("fast", lambda x: (square, (x,)), goal=0.4, memory_goal=0.5)
    modes = [
        (1, False, ratios(plain=0.7, compiled=1.2, eager=1.15, fast=0.5)),
        (1, True, ratios(plain=0.83, compiled=1.2, eager=1.15)),
        (2, False, ratios(plain=0.9, fast=0.1)),
        (2, True, ratios(plain=1.1)),
    ]
    case = replace(CASE, peers=[fast])
    assert verdicts(case, row(MANY, *modes, fast=90)) == {
        ("memory", None): (0.6, True),
        ("eager", 1): (0.8, True),
        ("compiled", 1): (1.1, False),
        ("plain compiled", 1): (1.2, True),
        ("eager", 2): (0.8, False),
        ("busy", 1): (1.2, True),
        ("busy", 2): (1.2, False),
        ("fast", 1): (0.4, False),
        ("memory of fast", None): (0.5, False),
    }
    few = verdicts(case, row(FEW - 1, *modes, fast=90))
    assert few["eager", 2] == (1.0, True)
    assert few["memory", None] == (1.0, True)
    assert few.keys().isdisjoint({("plain compiled", 1), ("fast", 1)})
    # a peer whose package is missing
    assert ("fast", 1) not in verdicts(case, row(MANY, (1, False, ratios(plain=0.7))))


def test_memory_per_weight_has_a_goal_of_its_own(tmp_path: Path) -> None:
    def pair(rows: int, classes: int) -> tuple[Tensor, Tensor]:
        return torch.ones(rows, requires_grad=True), torch.ones(rows, classes, requires_grad=True)

    library = SimpleNamespace(__name__="library", total=lambda x, weight: x.sum() + weight.sum())
    case = Case("total", pair, (("large", (100, 1000)),), (2, 3), square, full=(200, 1000), bytes_goal=3.0)
    argv = ["--out", str(tmp_path)]
    assert main("x", [case], argv, library) == 1
    (row,) = json.loads((tmp_path / "bench_x.json").read_text(encoding="utf-8"))["cases"]
    assert row["bytes_per_weight"] == pytest.approx(4, rel=0.05)  # one gradient of floats
    assert row["goals"][0] == {"goal": "bytes", "ratio": pytest.approx(4, rel=0.05), "limit": 3.0, "reached": False} | {
        "reason": None
    }
    assert main("x", [replace(case, bytes_goal=5.0)], [*argv, "--full"], library) == 0
    rows = json.loads((tmp_path / "bench_x.json").read_text(encoding="utf-8"))["cases"]
    assert [(row["size"], row["shape"]) for row in rows] == [("large", [100, 1000]), ("full", [200, 1000])]


def test_tiny_runs_have_no_verdict(tmp_path: Path) -> None:
    code, record = run(replace(CASE, loss="wide"), tmp_path, "--tiny")
    assert code == 0
    check_record(record, "x")
    (row,) = record["cases"]
    assert row["shape"] == [10]
    assert row["goals"] == []


def test_quick_and_only_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--out", str(tmp_path)]
    cases = [replace(CASE, shapes=(("small", (9,)),)), replace(CASE, loss="wide", shapes=(("middle", (50_000,)),))]
    assert main("x", cases, [*argv, "--quick", "--seconds", "0"], LIBRARY) == 0
    small, middle = capsys.readouterr().out.splitlines()
    assert small.split()[:3] == ["square", "small", "(9,)"]
    assert "(goal 1)" in small
    assert middle.split()[0] == "wide"
    assert "memory 3." in middle
    assert "(goal 0.6) MISSED" in middle
    assert main("x", cases, [*argv, "--tiny", "--only", "wid"], LIBRARY) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["1/1", "wide"]]
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_skipped_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(x: Tensor) -> Any:
        import no_such_package_at_all  # noqa: F401

    peer = Peer("nobody's loss", absent, "no-such-package-at-all")
    code, record = run(replace(CASE, peers=[peer]), tmp_path, "--tiny")
    assert code == 0
    check_record(record, "x")
    assert record["skipped"] == ["nobody's loss: No module named 'no_such_package_at_all'"]
    assert "SKIPPED nobody's loss" in capsys.readouterr().err
    assert list(record["cases"][0]["contenders"]) == ["ours", "plain"]
    _, record = run(replace(CASE, loss="cube"), tmp_path, "--tiny")
    assert record["cases"] == []
    assert record["skipped"] == ["cube: library has no cube"]


def test_contenders_that_disagree_are_an_error(tmp_path: Path) -> None:
    def more(x: Tensor) -> Tensor:
        return 1.01 * square(x)

    def other_slope(x: Tensor) -> Tensor:
        return square(x) + 0.03 * (x.sum() - 10.0)

    with pytest.raises(ValueError, match=r"square: ours gives 10\.0, plain gives 10\.1"):
        run(replace(CASE, plain=more), tmp_path, "--tiny")
    run(replace(CASE, plain=more, tolerance=0.02), tmp_path, "--tiny")
    with pytest.raises(ValueError, match=r"square: the gradients of ours and of the plain formula are 0\.015 apart"):
        run(replace(CASE, plain=other_slope), tmp_path, "--tiny")
    peer = Peer("peer", lambda x: (more, (x,)))
    with pytest.raises(ValueError, match="peer gives"):
        run(replace(CASE, peers=[peer]), tmp_path, "--tiny")
    run(replace(CASE, peers=[replace(peer, tolerance=0.02)]), tmp_path, "--tiny")
    run(replace(CASE, peers=[replace(peer, same=False)]), tmp_path, "--tiny")
    with pytest.raises(ValueError, match="the losses must be finite, plain gives nan"):
        run(replace(CASE, plain=lambda x: square(x) * float("nan")), tmp_path, "--tiny")


def test_what_does_not_compile_is_recorded() -> None:
    def branches(x: Tensor) -> Tensor:
        return square(x) if x.sum() > 0 else x.sum()  # the compiler may not look at a value

    contenders, _ = harness.contenders_of(replace(CASE, plain=branches), square, (10,), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="plain does not compile: "):
        harness.compiled(contenders)
    ours = row(MANY, (1, False, ratios(plain=0.7))) | {"not_compiled": ["ours does not compile: it branches"]}
    assert verdicts(CASE, ours)["compiled", None] == (1.1, False)


def test_a_compiler_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(TimeoutError, match=r"not compiled in 0\.05 s"), at_most(0.05):
        time.sleep(60)
    with at_most(0.05):
        pass
    time.sleep(0.1)  # no late alarm


def test_busy_processes_compute_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    begin = subprocess.Popen

    def popen(*args: Any, **options: Any) -> Any:
        started.append(begin(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with busy(2):
        assert [process.poll() for process in started] == [None, None]
        for process in started:
            fields = Path(f"/proc/{process.pid}/stat")
            deadline = time.monotonic() + 30
            while fields.exists() and int(fields.read_text().rpartition(")")[2].split()[11]) < 5:
                assert time.monotonic() < deadline, "it does not compute"
                time.sleep(0.05)
    assert all(process.poll() is not None for process in started)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_record_has_its_own_file_and_no_verdict(tmp_path: Path) -> None:
    assert main("x", [CASE], ["--out", str(tmp_path), "--device", "cuda", "--seconds", "0"], LIBRARY) == 0
    record = json.loads((tmp_path / "bench_x_cuda.json").read_text(encoding="utf-8"))
    check_record(record, "x")
    assert record["cases"][0]["goals"] == []
