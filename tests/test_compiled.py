"""Under ``torch.compile`` on a CPU a large loss is one operator, and all that holds for the loss holds for it."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lossbook
from lossbook._fast import _compiled

ROWS, CLASSES = 300, 110  # more scores than a compiler's own code is quicker for
Made = tuple[Tensor, tuple[Tensor, ...], dict[str, Any]]


def made(name: str, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Made:
    """Scores, targets and options of a loss; some rows or labels are left out where it can."""
    g = torch.Generator().manual_seed(rows)
    s = torch.randn(rows, CLASSES, generator=g, dtype=dtype)
    t, mask = torch.randint(CLASSES, (rows,), generator=g), torch.rand(rows, CLASSES, generator=g) < 0.8
    mask[1], t[1] = False, -100
    y, index = torch.rand(rows, CLASSES, generator=g) < 0.1, torch.randint(CLASSES, (rows, 3), generator=g)
    index[::3] = -100
    vectors = torch.randn(CLASSES, 8, generator=g, dtype=dtype)
    cases: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
        "softmax_focal_loss": ((t,), {"gamma": 1.5}),
        "soft_truncated_cross_entropy": ((t,), {"sharpness": 2.0}),
        "soft_accuracy_loss": ((t,), {}),
        "emo_loss": ((t, vectors), {}),
        "emo_ce_loss": ((t, vectors), {}),
        "multilabel_softmax_loss": ((y,), {"mask": mask, "threshold": 0.3}),
        "multilabel_pairwise_loss": ((y,), {"mask": mask, "scale": 2.0, "margin": 0.1}),
        "sparse_multilabel_softmax_loss": ((index,), {"mask": mask, "threshold": 0.3}),
        "soft_truncated_bce": ((y,), {"mask": mask, "sharpness": 2.0}),
        "asymmetric_loss": ((y,), {"mask": mask, "gamma_neg": 3.0, "gamma_pos": 0.5, "clip": 0.1}),
    }
    return s, *cases[name]


NAMES = [
    "softmax_focal_loss",
    "soft_truncated_cross_entropy",
    "soft_accuracy_loss",
    "emo_loss",
    "emo_ce_loss",
    "multilabel_softmax_loss",
    "multilabel_pairwise_loss",
    "sparse_multilabel_softmax_loss",
    "soft_truncated_bce",
    "asymmetric_loss",
]


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing compiled before; EMO's step begins at 2^19 scores, which would take long here."""
    torch._dynamo.reset()
    step = _compiled.compiled
    monkeypatch.setattr("lossbook._fast.emo.compiled", lambda s, few: step(s, few // 2**5))


class Steps:
    """A backend that counts the operators of ours in a graph."""

    def __init__(self) -> None:
        self.found = 0

    def __call__(self, graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        self.found += sum("one_step" in str(node.target) for node in graph.graph.nodes)
        return graph


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_a_large_loss_is_one_operator_with_the_same_value_and_gradient(name: str, reduction: str) -> None:
    s, others, options = made(name)
    loss = getattr(lossbook, name)
    steps = Steps()
    torch.compile(lambda s: loss(s, *others, **options), fullgraph=True, backend=steps)(s)
    assert steps.found == 1
    options["reduction"] = reduction
    compiled = torch.compile(lambda s: loss(s, *others, **options), fullgraph=True, backend="aot_eager")
    x, y = s.clone().requires_grad_(), s.clone().requires_grad_()
    a, b = compiled(x), loss(y, *others, **options)
    close(a, b)
    upstream = torch.linspace(1, 2, b.numel()).reshape(b.shape)
    a.backward(upstream)
    b.backward(upstream)
    close(x.grad, y.grad)
    with torch.no_grad():
        close(compiled(s), b.detach())


@pytest.mark.parametrize("name", NAMES)
def test_a_small_loss_is_left_to_the_compiler(name: str) -> None:
    s, others, options = made(name, rows=20)
    steps = Steps()
    torch.compile(lambda s: getattr(lossbook, name)(s, *others, **options), fullgraph=True, backend=steps)(s)
    assert steps.found == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_the_code_of_others_reads_is_the_formula(name: str) -> None:
    s, others, options = made(name)
    loss = getattr(lossbook, name)

    class Layer(torch.nn.Module):
        def forward(self, s: Tensor) -> Tensor:
            return loss(s, *others, **options)

    exported = torch.export.export(Layer(), (s,))
    assert not [node for node in exported.graph.nodes if "lossbook" in str(node.target)]
    close(exported.module()(s), loss(s, *others, **options))
    steps = Steps()
    slope = torch.compile(torch.func.grad(lambda s: loss(s, *others, **options)), fullgraph=True, backend=steps)(s)
    assert steps.found == 0
    x = s.clone().requires_grad_()
    loss(x, *others, **options).backward()
    torch.testing.assert_close(slope, x.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_rows_takes_one_graph(name: str) -> None:
    loss, counter = getattr(lossbook, name), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, dynamic=True, fullgraph=True, backend=counter)
    for rows in (ROWS, ROWS + 7, 2 * ROWS, 11):
        s, others, options = made(name, rows)
        x, y = s.clone().requires_grad_(), s.clone().requires_grad_()
        a, b = compiled(x, *others, **options), loss(y, *others, **options)
        close(a, b)
        a.backward()
        b.backward()
        close(x.grad, y.grad)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", [name for name in NAMES if name != "soft_accuracy_loss" and "emo" not in name])
def test_a_schedule_of_an_option_takes_one_graph(name: str) -> None:
    if name.startswith("soft_truncated") and torch.__version__ < "2.12":
        pytest.skip("torch 2.11 compiles the smaller of two numbers anew for each")
    loss, counter = getattr(lossbook, name), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    s, others, options = made(name)
    scheduled = next(option for option in options if option != "mask")
    for step in range(5):
        options[scheduled] = 0.4 + 0.1 * step
        close(compiled(s, *others, **options), loss(s, *others, **options))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", NAMES)
def test_the_operator_keeps_torchs_rules(name: str) -> None:
    s, (target, *embedding), options = made(name, 4, torch.float64)
    mask = options.pop("mask", None)
    rows = name not in ("soft_truncated_bce", "asymmetric_loss")
    if mask is not None and not rows:  # there the score of a label left out is far below
        s, mask = s.masked_fill(~mask, -20), None
    given = (
        s.requires_grad_(),
        target,
        embedding[0] if embedding else None,
        mask,
        torch.tensor(list(options.values())).double(),
    )
    call = " ".join((name, *options))
    torch.library.opcheck(torch.ops.lossbook.one_step.default, (call, *given, rows, True))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_those_of_the_formula(name: str) -> None:
    s, others, options = made(name, dtype=torch.float64)
    loss = getattr(lossbook, name)
    found = []
    for f in (torch.compile(loss, fullgraph=True, backend="eager"), loss):
        x = s.clone().requires_grad_()
        (slope,) = torch.autograd.grad(f(x, *others, **options), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), x)[0])
        g = torch.stack([torch.ones(()), -torch.ones(())]).double()
        found[-1] += torch.autograd.grad(f(x, *others, **options), x, g, is_grads_batched=True)[0][1]
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_infinite_scores_and_nan_mean_the_same(name: str) -> None:
    s, others, options = made(name)
    s[0, :3] = torch.tensor([math.inf, -math.inf, 1e30])
    s[2, 5] = math.nan
    loss = getattr(lossbook, name)
    options["reduction"] = "none"
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, y = s.clone().requires_grad_(), s.clone().requires_grad_()
    a, b = compiled(x, *others, **options), loss(y, *others, **options)
    close(a, b)
    a[3:].sum().backward()
    b[3:].sum().backward()
    close(x.grad, y.grad)


@pytest.mark.parametrize("name", NAMES)
def test_nan_that_arrives_at_a_row_left_out_goes_no_further(name: str) -> None:
    s, others, options = made(name)
    options["reduction"] = "none"
    compiled = torch.compile(getattr(lossbook, name), fullgraph=True, backend="aot_eager")
    s.requires_grad_()
    loss = compiled(s, *others, **options)
    upstream = torch.ones_like(loss)
    upstream[1] = math.nan
    loss.backward(upstream)
    assert bool((loss[1] == 0).all())
    assert bool((s.grad[1] == 0).all())
    assert bool(s.grad[2:].isfinite().all())


def test_a_checkpoint_computes_its_body_once_more_and_no_more() -> None:
    s, (t,), options = made("softmax_focal_loss")
    runs = []

    def body(s: Tensor) -> Tensor:
        runs.append(1)
        return compiled(2 * s, t, **options)

    compiled = torch.compile(lossbook.softmax_focal_loss, fullgraph=True, backend="aot_eager")
    s.requires_grad_()
    loss = checkpoint(body, s, use_reentrant=False)
    assert len(runs) == 1
    loss.backward()
    assert len(runs) == 2
    first, s.grad = s.grad, None
    inside = torch.compile(
        lambda s: checkpoint(lambda s: lossbook.softmax_focal_loss(2 * s, t, **options), s, use_reentrant=False),
        backend="eager",
    )
    inside(s).backward()
    close(s.grad, first)


def test_the_default_device_is_not_asked() -> None:
    s, (t,), options = made("softmax_focal_loss")
    compiled = torch.compile(lossbook.softmax_focal_loss, fullgraph=True, backend="aot_eager")
    with torch.device("meta"):
        close(compiled(s, t, **options), lossbook.softmax_focal_loss(s, t, **options))


def test_the_package_can_be_imported_anew() -> None:
    code = """
import sys, torch, lossbook, lossbook.emo, lossbook.focal
for name in [name for name in sys.modules if name.startswith("lossbook")]:
    del sys.modules[name]
import lossbook
s, t = torch.randn(400, 100), torch.arange(400) % 100
compiled = torch.compile(lossbook.softmax_focal_loss, backend="aot_eager")
print(float(compiled(s, t) - lossbook.softmax_focal_loss(s, t)), lossbook.linear_emo_loss.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0.0", "linear_emo_loss"]


def test_an_index_out_of_range_is_the_error_of_the_loss() -> None:
    s, (t,), _ = made("softmax_focal_loss")
    compiled = torch.compile(lossbook.softmax_focal_loss, fullgraph=True, backend="aot_eager")
    t[5] = CLASSES
    with pytest.raises(ValueError, match=rf"target must be class indices in \[0, {CLASSES}\)"):
        compiled(s, t)
