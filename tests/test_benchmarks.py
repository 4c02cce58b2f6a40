"""Every benchmark runs at a tiny size, and the harness counts, compares and reports as it says."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import ROOT, Case, Contender, main, peak_bytes

SLUGS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in ("__init__", "harness"))
SIDE = {"name", "seconds", "peak_bytes", "loss"}


def check_record(record: dict[str, Any], slug: str) -> None:
    assert set(record) == {
        "slug",
        "tiny",
        "date",
        "commit",
        "changed",
        "machine",
        "versions",
        "method",
        "cases",
        "skipped",
    }
    assert record["slug"] == slug
    assert set(record["machine"]) in ({"device", "cpu", "threads"}, {"device", "gpu"})
    assert {"python", "torch", "lossbook"} <= set(record["versions"])
    assert record["cases"] or record["skipped"]
    for case in record["cases"]:
        assert set(case) - {"reason"} == {"name", "size", "ours", "peer", "rounds", "time", "memory"}
        for side in (case["ours"], case["peer"]):
            assert set(side) == SIDE
            assert side["seconds"] > 0
            assert side["peak_bytes"] > 0
        assert case["rounds"] >= 3
        for kind in ("time", "memory"):
            part = case[kind]
            assert part["ratio"] > 0
            assert part["reached"] == (None if part["goal"] is None else part["ratio"] <= part["goal"])
        low, high = case["time"]["quartiles"]
        assert low <= high
        if False in (case["time"]["reached"], case["memory"]["reached"]):
            assert case["reason"]
    for case in record["skipped"]:
        assert set(case) == {"name", "reason"}
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
    assert record["machine"]["threads"] == 2
    if record["skipped"]:
        pytest.skip("; ".join(f"{case['name']}: {case['reason']}" for case in record["skipped"]))


@pytest.mark.parametrize("slug", SLUGS)
def test_the_stored_record_is_a_full_run(slug: str) -> None:
    path = ROOT / "data" / "results" / f"bench_{slug}.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not written yet: python -m benchmarks.{slug}")
    record = json.loads(path.read_text(encoding="utf-8"))
    check_record(record, slug)
    assert record["tiny"] is False
    assert record["machine"]["device"] == "cpu"


def square(device: torch.device, n: int, factor: float = 1.0) -> tuple[Contender, Contender]:
    x = torch.ones(n, device=device, requires_grad=True)
    y = torch.ones(n, device=device, requires_grad=True)
    return Contender("one", lambda: (x * x).sum() * factor, [x]), Contender("other", lambda: (y * y).sum(), [y])


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


def test_a_record_has_verdicts_and_restores_the_threads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    case = Case("squares", square, {"n": 50_000}, {"n": 10}, memory_goal=2.0)
    assert main("x", [case], ["--out", str(tmp_path), "--seconds", "0", "--threads", "1"]) == 0
    assert torch.get_num_threads() == before
    record = json.loads((tmp_path / "bench_x.json").read_text(encoding="utf-8"))
    check_record(record, "x")
    assert record["machine"]["threads"] == 1
    (written,) = record["cases"]
    assert written["size"] == {"n": 50_000}
    assert written["rounds"] == 9
    assert written["time"]["goal"] is None
    assert written["memory"] == {"ratio": 1.0, "goal": 2.0, "reached": True}
    assert "reason" not in written
    assert "memory 1.000 (goal 2, reached)" in capsys.readouterr().out


@pytest.mark.parametrize(("reason", "code"), [(None, 1), ("equal work cannot be half the work", 0)])
def test_a_missed_goal_needs_a_reason(reason: str | None, code: int, tmp_path: Path) -> None:
    case = Case("squares", square, {"n": 50_000}, {"n": 10}, memory_goal=0.5, reason=reason)
    assert main("x", [case], ["--out", str(tmp_path), "--seconds", "0"]) == code
    (written,) = json.loads((tmp_path / "bench_x.json").read_text(encoding="utf-8"))["cases"]
    assert written["memory"]["reached"] is False
    assert written["reason"] == reason


def test_tiny_runs_have_no_verdict(tmp_path: Path) -> None:
    case = Case("squares", square, {"n": 50_000}, {"n": 10}, memory_goal=0.5)
    assert main("x", [case], ["--out", str(tmp_path), "--tiny"]) == 0
    (written,) = json.loads((tmp_path / "bench_x.json").read_text(encoding="utf-8"))["cases"]
    assert written["size"] == {"n": 10}
    assert written["memory"]["reached"] is None


def test_a_missing_package_is_skipped_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def absent(device: torch.device) -> tuple[Contender, Contender]:
        import no_such_package_at_all  # noqa: F401

        raise AssertionError

    assert main("x", [Case("absent", absent, {}, {})], ["--out", str(tmp_path), "--tiny"]) == 0
    record = json.loads((tmp_path / "bench_x.json").read_text(encoding="utf-8"))
    check_record(record, "x")
    assert record["skipped"] == [{"name": "absent", "reason": "No module named 'no_such_package_at_all'"}]
    assert "SKIPPED absent: No module named 'no_such_package_at_all'" in capsys.readouterr().err


def test_contenders_that_disagree_are_an_error(tmp_path: Path) -> None:
    size = {"n": 10, "factor": 1.01}
    with pytest.raises(ValueError, match=r"squares: one gives 10\.1\d*, other gives 10\.0"):
        main("x", [Case("squares", square, size, size)], ["--out", str(tmp_path), "--tiny"])
    assert main("x", [Case("squares", square, size, size, tolerance=None)], ["--out", str(tmp_path), "--tiny"]) == 0
    size = {"n": 10, "factor": float("nan")}
    with pytest.raises(ValueError, match="squares: the losses must be finite, got nan and 10"):
        main("x", [Case("squares", square, size, size)], ["--out", str(tmp_path), "--tiny"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_the_record_has_its_own_file_and_no_verdict(tmp_path: Path) -> None:
    case = Case("squares", square, {"n": 1_000_000}, {"n": 10}, memory_goal=0.5)
    assert main("x", [case], ["--out", str(tmp_path), "--device", "cuda", "--seconds", "0"]) == 0
    record = json.loads((tmp_path / "bench_x_cuda.json").read_text(encoding="utf-8"))
    check_record(record, "x")
    assert record["cases"][0]["memory"] == {"ratio": 1.0, "goal": None, "reached": None}
