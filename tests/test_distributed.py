"""Losses over several ranks: value, gradients, what they send, and how they fail. Gloo on the CPU."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lossbook as lb
from benchmarks.harness import peak_bytes
from examples import sharded_am_softmax
from lossbook import _checks, _collectives, am_softmax
from lossbook import distributed as sharded
from lossbook._fast import am_softmax as fast
from lossbook._fast import emo as fast_emo
from tests.ranks import Ranks, ranks

ROWS, C, SIZE = 6, 11, 5
# how many classes each rank holds: even, uneven, with empty shards, all on one
CUTS = {2: [(6, 5), (0, 11)], 4: [(3, 3, 3, 2), (5, 0, 6, 0), (0, 0, 0, 11)]}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with ranks(2) as group:
        yield group


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    with ranks(4) as group:
        yield group


@pytest.fixture(params=[2, 4])
def group(request: pytest.FixtureRequest) -> Ranks:
    return request.getfixturevalue({2: "two", 4: "four"}[request.param])


# ------------------------------------------------------------------------------------------------- the losses, twice


class Problem:
    """The tensors of all losses, whole and cut, the same on every rank."""

    def __init__(self, rank: int, cut: tuple[int, ...], dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(0)
        self.columns = slice(sum(cut[:rank]), sum(cut[: rank + 1]))

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        self.s, self.z, self.w, self.e = normal(2, 3, C), normal(2, 3, SIZE), normal(C, SIZE), normal(C, 4)
        self.s = self.s * 3
        self.e[3], self.e[7] = 0, 2 * self.e[0]  # a word without direction, two that are parallel
        self.hard = normal(2, 3, C) > 0.5
        self.soft = torch.rand(2, 3, C, generator=g, dtype=torch.float64).to(dtype)
        self.mask = normal(2, 3, C) > -0.5
        self.mask[1, 1] = False  # a row without a label
        self.t = torch.tensor([[0, C - 1, -100], [7, 5, 3]])
        self.weights = torch.rand(2, 3, generator=g, dtype=torch.float64).to(dtype)
        self.scale = torch.tensor(20.0, dtype=dtype)
        self.shift = torch.tensor(0.3, dtype=dtype)
        self.b = normal(C)

    def column(self, x: Tensor) -> Tensor:
        return x[..., self.columns]

    def row(self, x: Tensor) -> Tensor:
        return x[self.columns]


Both = tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor], list[Tensor]]


def both(name: str, p: Problem) -> Both:
    """Ours, the unsharded loss, and the leaves of each; the cut ones are compared with the same cut of the whole."""
    if name.startswith("linear"):
        return linear(name, p)
    whole = [x.clone().requires_grad_() for x in {"am": (p.z, p.w)}.get(name.split()[0], (p.s,))]
    if name.startswith("am"):
        z, w = whole
        mine = [z.detach().clone().requires_grad_(), p.row(w).detach().clone().requires_grad_()]
        options = {"psi": lb.additive_angular_margin(0.5)} if "angle" in name else {"psi": lambda c: c - 0.35}
        if "learn" in name:
            learned = [x.clone().requires_grad_() for x in (p.scale, p.shift) * 2]
            mine, whole = [*mine, *learned[:2]], [*whole, *learned[2:]]
            first = {"psi": lambda c: c - learned[1], "scale": learned[0]}
            other = {"psi": lambda c: c - learned[3], "scale": learned[2]}
        else:
            first, other = options, options
            if "margin" in name:
                first = {"margin": 0.35}
        if "scale" in name:
            first, other = {**first, "scale": 100.0}, {**other, "scale": 100.0}
        return (
            lambda **o: sharded.sharded_am_softmax_loss(mine[0], mine[1], p.t, **first, **o),
            lambda **o: lb.linear_margin_softmax_loss(z, w, p.t, **other, **o),
            mine,
            whole,
        )
    mine = [p.column(p.s).clone().requires_grad_()]
    if name.startswith("emo"):
        ours, theirs = {
            "emo": (sharded.sharded_emo_loss, lb.emo_loss),
            "emo_ce": (sharded.sharded_emo_ce_loss, lb.emo_ce_loss),
        }[name]
        return (
            lambda **o: ours(mine[0], p.t, p.row(p.e), **o),
            lambda **o: theirs(whole[0], p.t, p.e, **o),
            mine,
            whole,
        )
    t = p.soft if "soft" in name else p.hard
    mask = p.mask if "mask" in name else None
    return (
        lambda **o: sharded.sharded_multilabel_softmax_loss(
            mine[0], p.column(t), mask=None if mask is None else p.column(mask), threshold=0.5, **o
        ),
        lambda **o: lb.multilabel_softmax_loss(whole[0], t, mask=mask, threshold=0.5, **o),
        mine,
        whole,
    )


def linear(name: str, p: Problem) -> Both:
    """EMO of hidden states, a chunk of two rows at a time, ``wide`` with all that a layer may have."""
    ours, theirs = (sharded.sharded_linear_emo_loss, lb.linear_emo_loss)
    if "emo_ce" in name:
        ours, theirs = (sharded.sharded_linear_emo_ce_loss, lb.linear_emo_ce_loss)
    h = torch.where(p.t.unsqueeze(-1) < 0, torch.nan, p.z)  # whatever an ignored row holds
    layer = [h, p.w, p.b] if "wide" in name else [h, p.w]
    options = {"logit_scale": 1.5, "logit_softcap": 4.0} if "wide" in name else {}
    whole = [x.clone().requires_grad_() for x in layer]
    mine = [h, p.row(p.w), p.column(p.b)][: len(layer)]
    mine = [x.clone().requires_grad_() for x in mine]

    def call(loss: Callable[..., Tensor], leaves: list[Tensor], e: Tensor, **o: Any) -> Tensor:
        bias = leaves[2] if len(leaves) > 2 else None
        return loss(leaves[0], leaves[1], p.t, e, bias=bias, **{"chunk_size": 2, **options, **o})

    return (
        lambda **o: call(ours, mine, p.row(p.e), **o),
        lambda **o: call(theirs, whole, p.e, **o),
        mine,
        whole,
    )


LOSSES = ["hard", "soft", "hard mask", "am margin", "am angle", "am scale", "am learn", "emo", "emo_ce"]
LOSSES += ["linear emo", "linear emo_ce", "linear emo wide", "linear emo_ce wide"]


def apart(found: Tensor, wanted: Tensor, size: Tensor | None = None) -> float:
    """The distance beside the size of the whole; infinite for NaN, which no maximum would show."""
    norm = float((wanted if size is None else size).norm())
    distance = float((found - wanted).norm()) / max(norm, 1e-3)
    return torch.inf if math.isnan(distance) else distance


def mine_of(whole: Tensor, mine: Tensor, p: Problem) -> Tensor:
    """What this rank holds of a whole gradient."""
    if whole.shape == mine.shape:
        return whole
    return p.row(whole) if whole.dim() == 2 else p.column(whole)


def compare(rank: int, cut: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    """Of each loss and reduction the largest error of value and gradients."""
    found = {}
    for name in LOSSES:
        for reduction in ("mean", "sum", "none"):
            p = Problem(rank, cut, dtype)
            ours, theirs, mine, whole = both(name, p)
            value, wanted = ours(reduction=reduction), theirs(reduction=reduction)
            assert value.dtype == wanted.dtype
            assert value.shape == wanted.shape
            g = p.weights if reduction == "none" else torch.ones_like(wanted)
            slopes, right = torch.autograd.grad(value, mine, g), torch.autograd.grad(wanted, whole, g)
            errors = [apart(value.detach(), wanted.detach())]
            errors += [apart(a, mine_of(b, a, p), b) for a, b in zip(slopes, right, strict=True)]
            found[f"{name} {reduction}"] = max(errors)
    return found


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["32", "64"])
def test_value_and_gradients_are_those_of_the_whole(group: Ranks, dtype: torch.dtype, limit: float) -> None:
    for cut in CUTS[group.size]:
        for found in group(compare, cut, dtype):
            assert max(found.values()) <= limit, (cut, {k: v for k, v in found.items() if v > limit})


def curvature(rank: int, cut: tuple[int, ...]) -> dict[str, float]:
    """The second derivative along one direction."""
    found = {}
    names = [n for n in LOSSES if n != "emo_ce"]
    for name in (*names, "linear emo_ce wide, rows"):
        p = Problem(rank, cut, torch.float64)
        ours, theirs, mine, whole = both(name, p)
        if "rows" in name:
            ours, theirs = (
                lambda f=f, g=p.weights: (f(reduction="none") * g).sum()  # type: ignore[misc]
                for f in (ours, theirs)
            )
        along = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype) for x in whole]
        first = torch.autograd.grad(ours(), mine, create_graph=True)
        wanted = torch.autograd.grad(theirs(), whole, create_graph=True)
        terms = [(x, (g * mine_of(v, x, p)).sum()) for x, g, v in zip(mine, first, along, strict=True)]
        cut_ones = [x.shape != w.shape for x, w in zip(mine, whole, strict=True)]
        parts = sum(term for (_, term), is_cut in zip(terms, cut_ones, strict=True) if is_cut)
        total = _collectives._Sum.apply(parts, dist.group.WORLD)
        total = total + sum(term for (_, term), is_cut in zip(terms, cut_ones, strict=True) if not is_cut)
        right = torch.autograd.grad(sum((g * v).sum() for g, v in zip(wanted, along, strict=True)), whole)
        for a, b in zip(torch.autograd.grad(total, mine), right, strict=True):
            found[name] = max(found.get(name, 0.0), apart(a, mine_of(b, a, p), b))
    return found


def test_second_derivatives_are_those_of_the_whole(group: Ranks) -> None:
    for found in group(curvature, CUTS[group.size][0]):
        assert max(found.values()) <= 1e-9, found


# ---------------------------------------------------------------------------------------------- what lies at the edges


IGNORED = ("am margin", "emo", "emo_ce", "linear emo", "linear emo_ce wide")


def edges(rank: int, size: int) -> dict[str, Any]:
    """No rows, no row that counts, extreme scores, half precision."""
    cut = CUTS[size][0]
    found: dict[str, Any] = {}
    for name in IGNORED:
        p = Problem(rank, cut, torch.float32)
        p.t = torch.full((2, 3), -100)
        p.s[0, 0, 0], p.z[0, 0, 0] = torch.nan, torch.nan
        ours, _, mine, _ = both(name, p)
        value = ours()
        found[f"{name} ignored"] = [float(value), *(float(g.abs().sum()) for g in torch.autograd.grad(value, mine))]
        p.t[1, 1] = 3
        ours, theirs, *_ = both(name, p)
        found[f"{name} one row"] = apart(ours().detach(), theirs().detach())
    p = Problem(rank, cut, torch.float32)
    s, z, w, e = p.column(p.s), p.z, p.row(p.w), p.row(p.e)
    t = torch.zeros(0, 3, dtype=torch.long)
    found["no rows"] = [
        float(sharded.sharded_multilabel_softmax_loss(s[:0], s[:0] > 0)),
        float(sharded.sharded_am_softmax_loss(z[:0], w, t)),
        float(sharded.sharded_emo_loss(s[:0], t, e)),
        float(sharded.sharded_emo_ce_loss(s[:0], t, e)),
        float(sharded.sharded_linear_emo_loss(z[:0], w, t, e)),
        float(sharded.sharded_linear_emo_ce_loss(z[:0], w, t, e)),
    ]
    if size == 2:  # a compiler takes seconds to load
        compiled = torch.compile(lambda s: sharded.sharded_emo_loss(s + 0, p.t, e), backend="eager")
        found["compiled"] = apart(compiled(s).detach(), sharded.sharded_emo_loss(s, p.t, e).detach())
    uneven = Problem(rank, CUTS[size][1], torch.float32)  # with empty shards
    weight = uneven.row(uneven.w).clone().requires_grad_()
    value = sharded.sharded_am_softmax_loss(uneven.z, weight, uneven.t, sample=0.1)
    found["sampled"] = [float(value), torch.autograd.grad(value, weight)[0].isfinite().all().item()]
    h, t = uneven.z.reshape(-1, SIZE).repeat(22, 1), torch.arange(132) % C  # a product without tiles
    value = sharded.sharded_linear_emo_loss(h, weight, t, uneven.row(uneven.e))
    found["many rows"] = apart(value, lb.linear_emo_loss(h, uneven.w, t, uneven.e))
    errors = []
    for low, high in ((-1e4, 1e4), (-torch.inf, 1e4), (-1e4, -1e4)):
        p.s = torch.where(p.s > 0, high, low).where(~p.hard, p.s)
        p.t = p.hard.long().argmax(-1)
        for name in ("hard", "emo", "emo_ce"):
            ours, theirs, mine, whole = both(name, p)
            value, wanted = ours(), theirs()
            (a,), (b,) = torch.autograd.grad(value, mine), torch.autograd.grad(wanted, whole)
            errors += [apart(value.detach(), wanted.detach()), apart(a, mine_of(b, a, p), b)]
        p.b, p.w, p.z = p.s[0, 0], torch.zeros_like(p.w), torch.zeros_like(p.z)  # the scores of every row
        for name in ("linear emo wide", "linear emo_ce wide"):
            ours, theirs, mine, whole = both(name, p)
            value, wanted = ours(logit_softcap=None), theirs(logit_softcap=None)
            a, b = torch.autograd.grad(value, mine)[2], torch.autograd.grad(wanted, whole)[2]
            errors += [apart(value.detach(), wanted.detach()), apart(a, mine_of(b, a, p), b)]
    found["extreme"] = max(errors)
    errors = []
    for name in ("hard", "am margin", "emo", "emo_ce", "linear emo", "linear emo_ce wide", "float32 weight"):
        p = Problem(rank, cut, torch.bfloat16)
        p.soft, p.scale = p.soft.float(), p.scale.float()
        if name == "float32 weight":
            name, p.w = "linear emo", p.w.float()
        ours, theirs, mine, whole = both(name, p)
        value, wanted = ours(), theirs()
        assert value.dtype == torch.float32
        for a, b in zip(torch.autograd.grad(value, mine), torch.autograd.grad(wanted, whole), strict=True):
            assert a.dtype == b.dtype
            errors.append(apart(a.float(), mine_of(b, a, p).float(), b.float()))
        errors.append(apart(value.detach(), wanted.detach()))
    found["half"] = max(errors)
    one = torch.zeros(2, 3, 1 if rank == 1 else 0)  # a single class
    found["one class"] = [
        float(sharded.sharded_am_softmax_loss(z, z[0, : one.shape[-1]], torch.zeros(2, 3, dtype=torch.long))),
        float(sharded.sharded_emo_loss(one, torch.zeros(2, 3, dtype=torch.long), one[0, 0, :, None].expand(-1, 2))),
        *alone(z, z[0, : one.shape[-1]]),
    ]
    return found


def alone(h: Tensor, w: Tensor) -> list[float]:
    """The losses of a single class, and the sums of their gradients."""
    found = []
    for loss in (sharded.sharded_linear_emo_loss, sharded.sharded_linear_emo_ce_loss):
        leaves = [x.clone().requires_grad_() for x in (h, w)]
        value = loss(*leaves, torch.zeros(2, 3, dtype=torch.long), w)
        found += [float(value), *(float(g.abs().sum()) for g in torch.autograd.grad(value, leaves))]
    return found


def test_edges(group: Ranks) -> None:
    for found in group(edges, group.size):
        for name in IGNORED:
            assert not any(found[f"{name} ignored"])
            assert found[f"{name} one row"] <= 1e-6
        assert found["no rows"] == [0] * 6
        assert found.get("compiled", 0) == 0
        assert found["sampled"][0] > 0
        assert found["sampled"][1]
        assert found["many rows"] <= 1e-6
        assert found["extreme"] <= 1e-6
        assert found["half"] <= 1e-2
        assert found["one class"] == [0] * 8


def kept(rank: int) -> None:
    """Gradients asked for twice are the same; a word vector changed in between is noticed."""
    for reduction in ("mean", "none"):
        p = Problem(rank, CUTS[2][0], torch.float32)
        h, w, e = p.z.clone().requires_grad_(), p.row(p.w).clone().requires_grad_(), p.row(p.e).clone()
        value = sharded.sharded_linear_emo_ce_loss(h, w, p.t, e, chunk_size=2, reduction=reduction).sum()
        first = torch.autograd.grad(value, (h, w), retain_graph=True)
        for a, b in zip(first, torch.autograd.grad(value, (h, w), retain_graph=True), strict=True):
            assert torch.equal(a, b)
        e[0] = 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(value, w)


def test_gradients_that_are_kept(two: Ranks) -> None:
    two(kept)


def memory(rank: int) -> dict[str, tuple[int, int]]:
    """Of a linear EMO loss what it holds beside its arguments and the gradient of ``hidden``, and the formula."""
    classes, n, width, length = 4096 - 96 * rank, 256, 64, 4
    g, found = torch.Generator().manual_seed(rank), {}
    for rows, dtype, reduction, options in (
        (256, torch.float32, "mean", {}),
        (1024, torch.float32, "mean", {}),
        (1024, torch.float32, "none", {}),
        (1024, torch.float32, "sum", {"logit_softcap": 3.0}),
        (1024, torch.bfloat16, "mean", {}),
        (1024, torch.bfloat16, "none", {"accumulate": "weight", "logit_softcap": 3.0}),
    ):
        h = torch.ones(rows, width, dtype=dtype).requires_grad_()
        w = torch.randn(classes, width, generator=g).to(dtype).requires_grad_()
        e, t = torch.randn(classes, length, generator=g), torch.arange(rows)

        def run(h: Tensor = h, w: Tensor = w, e: Tensor = e, t: Tensor = t, **options: Any) -> None:
            sharded.sharded_linear_emo_ce_loss(h, w, t, e, chunk_size=n, **options).sum().backward()
            h.grad = w.grad = None

        run()
        b = w.element_size()
        of_sums = b if "accumulate" in options else 4
        of_scores = n * classes * ((4 if b == 4 else b + 4) + 4 + 4 * ("logit_softcap" in options)) + 8 * n * length
        of_scores += 256 * classes
        held = max(of_sums * classes * width + of_scores, (of_sums + b * (b != of_sums)) * classes * width)
        used = peak_bytes(lambda run=run, o=options, r=reduction: run(reduction=r, **o)) - h.nbytes
        found[f"{rows} {dtype} {reduction} {options}"] = (used, held)
    return found


def test_memory_is_the_formula_of_the_docstring(two: Ranks) -> None:
    for found in two(memory):
        for name, (used, held) in found.items():
            # beyond it the lengths of the words' vectors and a few numbers a row
            assert held <= used <= held + 2**17, (name, used, held)


def as_dtensors(rank: int, size: int) -> dict[str, float]:
    """A DTensor says the group: here a mesh of its own, where there are four ranks one of two groups of two."""
    shape, names = ((size,), ("classes",)) if size == 2 else ((2, 2), ("copies", "classes"))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    place = [Replicate()] * (len(shape) - 1)
    p = Problem(0, (C,), torch.float64)
    found = {}

    def cut(x: Tensor, dim: int) -> Tensor:
        return distribute_tensor(x, mesh, [*place, Shard(dim)])

    s, w, z = cut(p.s, 2).requires_grad_(), cut(p.w, 0).requires_grad_(), p.z.clone().requires_grad_()
    replicated = DTensor.from_local(p.z, mesh, [*place, Replicate()])
    b = cut(p.b, 0).requires_grad_()
    whole = [x.clone().requires_grad_() for x in (p.s, p.z, p.w, p.b)]
    calls = {
        "several": (
            sharded.sharded_multilabel_softmax_loss(s, cut(p.hard, 2), mask=cut(p.mask, 2)),
            lb.multilabel_softmax_loss(whole[0], p.hard, mask=p.mask),
            [(s, whole[0])],
        ),
        "am": (
            sharded.sharded_am_softmax_loss(z, w, p.t),
            lb.linear_am_softmax_loss(whole[1], whole[2], p.t),
            [(z, whole[1]), (w, whole[2])],
        ),
        "am, replicated": (
            sharded.sharded_am_softmax_loss(replicated, w, p.t),
            lb.linear_am_softmax_loss(whole[1], whole[2], p.t),
            [(w, whole[2])],
        ),
        "emo": (
            sharded.sharded_emo_loss(s, p.t, cut(p.e, 0)),
            lb.emo_loss(whole[0], p.t, p.e),
            [(s, whole[0])],
        ),
        "linear emo": (
            sharded.sharded_linear_emo_loss(z, w, p.t, cut(p.e, 0), bias=b, chunk_size=2),
            lb.linear_emo_loss(whole[1], whole[2], p.t, p.e, bias=whole[3]),
            [(z, whole[1]), (w, whole[2]), (b, whole[3])],
        ),
        "linear emo, tied": (
            sharded.sharded_linear_emo_loss(replicated, w, p.t, w),
            lb.linear_emo_loss(whole[1], whole[2], p.t, whole[2]),
            [(w, whole[2])],
        ),
    }
    for name, (value, wanted, pairs) in calls.items():
        errors = [apart(value.detach(), wanted.detach())]
        for x, y in pairs:
            (a,), (b,) = (
                torch.autograd.grad(value, x, retain_graph=True),
                torch.autograd.grad(wanted, y, retain_graph=True),
            )
            errors.append(apart(a.full_tensor() if isinstance(a, DTensor) else a, b))
        found[name] = max(errors)
    return found


def test_a_dtensor_needs_no_group(group: Ranks) -> None:
    for found in group(as_dtensors, group.size):
        assert len(found) == 6
        assert max(found.values()) <= 1e-12, found


# ------------------------------------------------------------------------------------------------------- what is sent


class Sent(TorchDispatchMode):
    """The bytes of the tensors that a rank gives to the collectives inside, in order; what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[tuple[str, int]] = []
        self.looks: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.strip("_")
        if "c10d" in func.namespace:
            own = args[1] if name == "allgather" else args[0]
            self.bytes.append((name, sum(x.nbytes for x in own if isinstance(x, Tensor))))
        if name in ("local_scalar_dense", "nonzero", "masked_select", "unique", "unique2"):
            self.looks[name] += 1
        return func(*args, **(kwargs or {}))


def blind(*_: object) -> bool:
    """No value can be looked at, as on an accelerator."""
    return False


def counted(rank: int, size: int, classes: int) -> dict[str, Any]:
    """Of each loss the collectives of forward and backward, on ranks that may look at no value."""
    torch.manual_seed(0)
    rows, mine = 7, classes // size
    s, z = torch.randn(rows, mine, requires_grad=True), torch.randn(rows, SIZE, requires_grad=True)
    w, t = torch.randn(mine, SIZE, requires_grad=True), torch.arange(rows)
    e = torch.randn(mine, 4)
    calls = {
        "several": lambda: sharded.sharded_multilabel_softmax_loss(s, s > 0),
        "several, mask": lambda: sharded.sharded_multilabel_softmax_loss(s, s > 0, mask=s < 1),
        "am": lambda: sharded.sharded_am_softmax_loss(z, w, t),
        "am, sample": lambda: sharded.sharded_am_softmax_loss(z, w, t, sample=0.5),
        "emo": lambda: sharded.sharded_emo_loss(s, t, e),
        "emo_ce": lambda: sharded.sharded_emo_ce_loss(s, t, e),
        "linear emo": lambda: sharded.sharded_linear_emo_loss(z, w, t, e, chunk_size=3),
        "linear emo_ce": lambda: sharded.sharded_linear_emo_ce_loss(z, w, t, e),
        "linear emo_ce, rows": lambda: sharded.sharded_linear_emo_ce_loss(z, w, t, e, reduction="none").sum(),
    }
    found: dict[str, Any] = {}
    reduce, kinds = dist.all_reduce, []

    def noted(x: Tensor, op: Any = dist.ReduceOp.SUM, **options: Any) -> Any:
        kinds.append("max" if op == dist.ReduceOp.MAX else "sum")
        return reduce(x, op=op, **options)

    see = [(m, m.readable) for m in (_checks, _collectives, am_softmax, fast, fast_emo)]
    for module, _ in see:
        module.readable = blind
    try:
        dist.all_reduce = noted
        for name, call in calls.items():
            kinds.clear()
            with Sent() as there:
                value = call()
            with Sent() as back:
                value.backward()
            found[name] = (there.bytes, back.bytes, list(kinds), dict(there.looks + back.looks))
    finally:
        for module, readable in see:
            module.readable = readable
        dist.all_reduce = reduce
    return found


def test_what_is_sent_does_not_grow_with_the_classes(group: Ranks) -> None:
    few, many = group(counted, group.size, 40), group(counted, group.size, 4000)
    assert few == many
    emo = (4, 1, 2, 3)
    wanted = {  # how many numbers, forward and backward, and which of them are maxima
        "several": ([14, 14], [], [0]),
        "several, mask": ([14, 21], [], [0]),
        "am": ([7, 14], [7 * SIZE], [0]),
        "am, sample": ([7, 14], [7 * SIZE], [0]),
        "emo": ([7 * n for n in emo], [], [1]),
        "emo_ce": ([7 * n for n in emo], [], [1]),
        "linear emo": ([rows * n for rows in (3, 3, 1) for n in emo], [7 * SIZE], [1, 5, 9]),
        "linear emo_ce": ([7 * n for n in emo], [7 * SIZE], [1]),
        "linear emo_ce, rows": ([7 * n for n in emo], [7 * SIZE], [1]),
    }
    for found in few:
        assert set(found) == set(wanted)
        for name, (forward, backward, maxima) in wanted.items():
            (first, *there), back, kinds, looks = found[name]
            assert first == ("allgather", 1048)
            assert there == [("allreduce", 4 * n) for n in forward]
            assert back == [("allreduce", 4 * n) for n in backward]
            assert [i for i, kind in enumerate(kinds) if kind == "max"] == maxima
            # the seed of a draw is made on the CPU
            assert looks == ({"local_scalar_dense": 1} if "sample" in name else {}), name


def unheard(rank: int, size: int) -> list[float]:
    """Errors in a group without a backend for the CPU, as NCCL alone: shards are counted on the device, unread."""
    backend, dist.get_backend_config = dist.get_backend_config, lambda group: "cpu"
    try:
        found = []
        for name in LOSSES:
            p = Problem(rank, CUTS[size][1], torch.float64)
            ours, theirs, mine, whole = both(name, p)
            with Sent() as sent:
                value = ours()
            assert sent.bytes[0] == ("allgather", 1048)
            wanted = theirs()
            slopes, right = torch.autograd.grad(value, mine), torch.autograd.grad(wanted, whole)
            found.append(apart(value.detach(), wanted.detach()))
            found += [apart(a, mine_of(b, a, p), b) for a, b in zip(slopes, right, strict=True)]
        with pytest.raises(TypeError, match=r"^target must be a tensor"):  # all refuse, none waits
            sharded.sharded_emo_loss(p.column(p.s), [0, 1], p.row(p.e))
        return found
    finally:
        dist.get_backend_config = backend


def test_without_a_backend_for_the_cpu_nothing_is_read(group: Ranks) -> None:
    for found in group(unheard, group.size):
        assert max(found) <= 1e-12


# -------------------------------------------------------------------------------------------------------------- faults


class Learned(nn.Module):
    """A margin that learns."""

    def __init__(self, m: float, *more: float) -> None:
        super().__init__()
        self.m, self.more = nn.Parameter(torch.tensor(m)), nn.Parameter(torch.tensor(more))

    def forward(self, cosine: Tensor) -> Tensor:
        return cosine - self.m - self.more.sum()


def autocast_on(here: bool, call: Callable[[], Tensor]) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=here):
        return call()


def fault(rank: int, size: int, name: str) -> tuple[str, str]:
    """The error of one wrong call, and that a right call still works afterwards."""
    last = rank == size - 1
    p = Problem(rank, CUTS[size][0], torch.float32)
    s, z, w, e, t = p.column(p.s), p.z, p.row(p.w), p.row(p.e), p.t
    calls: dict[str, Callable[[], Tensor]] = {
        "no rows": lambda: sharded.sharded_multilabel_softmax_loss(*((s[:0], s[:0] > 0) if last else (s, s > 0))),
        "label beyond all shards": lambda: sharded.sharded_am_softmax_loss(z, w, torch.where(t == 10, 11, t)),
        "other labels": lambda: sharded.sharded_am_softmax_loss(z, w, t.flip(0) if last else t),
        "labels of the same weighted sum": lambda: sharded.sharded_emo_loss(
            s, t + torch.tensor([[2, -1, 0], [0, 0, 0]]) if last else t, e
        ),
        "ignored on one rank": lambda: sharded.sharded_am_softmax_loss(z, w, t.clamp(min=0) if last else t),
        "other dtype": lambda: sharded.sharded_emo_loss(s.double() if last else s, t, e),
        "other width": lambda: sharded.sharded_am_softmax_loss(z[..., :2] if last else z, w[:, :2] if last else w, t),
        "other option": lambda: sharded.sharded_am_softmax_loss(z, w, t, scale=20 if last else 30),
        "other scale that learns": lambda: sharded.sharded_am_softmax_loss(
            z, w, t, scale=torch.tensor(30.1 if last else 30.0, requires_grad=True)
        ),
        "other reduction": lambda: sharded.sharded_emo_loss(s, t, e, reduction="sum" if last else "mean"),
        "other loss": lambda: (sharded.sharded_emo_loss if last else sharded.sharded_emo_ce_loss)(s, t, e),
        "other gradient": lambda: sharded.sharded_am_softmax_loss(z.clone().requires_grad_(last), w, t),
        "mask on one rank": lambda: sharded.sharded_multilabel_softmax_loss(s, s > 0, mask=s > 0 if last else None),
        "refused on one rank": lambda: sharded.sharded_multilabel_softmax_loss(s, s > 0 if not last else s.tolist()),
        "soft label": lambda: sharded.sharded_multilabel_softmax_loss(s, torch.full_like(s, 2.0 if last else 0.5)),
        "negative label": lambda: sharded.sharded_emo_loss(s, t - 1, e),
        "vectors of another number": lambda: sharded.sharded_emo_loss(s, t, p.e[:1].expand(20, -1) if last else e),
        "no class": lambda: sharded.sharded_emo_loss(s[..., :0], t, e[:0]),
        "sample": lambda: sharded.sharded_am_softmax_loss(z, w, t, sample=1.5),
        "generator": lambda: sharded.sharded_am_softmax_loss(z, w, t, sample=0.5, generator=7),
        "psi": lambda: sharded.sharded_am_softmax_loss(z, w, t, psi=0.35),
        "other psi that learns": lambda: sharded.sharded_am_softmax_loss(z, w, t, psi=Learned(0.301 if last else 0.3)),
        "psi whose parameters change places": lambda: sharded.sharded_am_softmax_loss(
            z, w, t, psi=Learned(0.1, *((0.2, 0.3) if last else (0.3, 0.2)))
        ),
        "chunks": lambda: sharded.sharded_linear_emo_loss(z, w, t, e, chunk_size=2 if last else 3),
        "sums": lambda: sharded.sharded_linear_emo_loss(z, w, t, e, accumulate="weight" if last else "float32"),
        "softcap": lambda: sharded.sharded_linear_emo_ce_loss(z, w, t, e, logit_softcap=0.0 if last else None),
        "bias on one rank": lambda: sharded.sharded_linear_emo_loss(z, w, t, e, bias=w[:, 0] if last else None),
        "other layer": lambda: sharded.sharded_linear_emo_loss(z, w[:, :4] if last else w, t, e),
        "other words": lambda: sharded.sharded_linear_emo_ce_loss(z, w, t, e[:, :3] if last else e),
        "autocast on one rank": lambda: autocast_on(last, lambda: sharded.sharded_linear_emo_loss(z, w, t, e)),
        "other target of a layer": lambda: sharded.sharded_linear_emo_loss(z, w, t.flip(0) if last else t, e),
    }
    try:
        value = calls[name]()
    except (TypeError, ValueError) as error:
        told = (type(error).__name__, str(error))
    else:
        told = ("no error", f"{value.item()}")
    assert sharded.sharded_emo_loss(s, t, e).isfinite()
    return told


FAULTS = {
    "no rows": ("ValueError", r"rank 0: .* input float32 \(2, 3, C\).* rank \d: .* input float32 \(0, 3, C\)"),
    "label beyond all shards": ("ValueError", r"target must be class indices in \[0, 11\), .* got 11"),
    "other labels": ("ValueError", r"target must be the same on every rank, got other class indices on rank \d"),
    "labels of the same weighted sum": ("ValueError", r"target must be the same on every rank"),
    "ignored on one rank": ("ValueError", r"target must be the same on every rank"),
    "other dtype": ("ValueError", r"rank 0: .*float32 .* rank \d: .*float64"),
    "other width": ("ValueError", r"rank 0: .*\(C, 5\).* rank \d: .*\(C, 2\)"),
    "other option": ("ValueError", r"rank 0: .*scale=30.* rank \d: .*scale=20"),
    "other scale that learns": ("ValueError", r"scale must be the same .*, got 30 on rank 0, 30.1 on rank \d"),
    "other reduction": ("ValueError", r"rank 0: .*reduction='mean'.* rank \d: .*reduction='sum'"),
    "other loss": ("ValueError", r"rank 0: sharded_emo_ce_loss: .* rank \d: sharded_emo_loss: "),
    "other gradient": ("ValueError", r"rank \d: .*embedding float32 \(2, 3, 5\), requires_grad"),
    "mask on one rank": ("ValueError", r"rank \d: .*mask bool \(2, 3, C\)"),
    "refused on one rank": ("TypeError", r"rank \d: target must be a tensor of labels, got list"),
    "soft label": ("ValueError", r"rank \d: target must be labels in \[0, 1\], got 2"),
    "negative label": ("ValueError", r"rank 0: target must be class indices in \[0, C\) or ignore_index=-100, got -1"),
    "vectors of another number": (
        "ValueError",
        r"rank \d: embedding must have the shape \(\d, D\), got float32 tensor",
    ),
    "no class": ("ValueError", r"the shards must have at least one class together, got none"),
    "sample": ("ValueError", r"rank 0: sample must be a finite number > 0 and <= 1, got 1.5"),
    "generator": ("TypeError", r"rank 0: generator must be a torch.Generator on the CPU.* got int 7"),
    "psi": ("TypeError", r"rank 0: psi must be a function of the cosine, got float 0.35"),
    "other psi that learns": (
        "ValueError",
        r"psi must be the same on every rank, got other parameters on rank \d than",
    ),
    "psi whose parameters change places": ("ValueError", r"psi must be the same on every rank, got other parameters"),
    "chunks": ("ValueError", r"rank 0: .*chunk_size=3.* rank \d: .*chunk_size=2"),
    "sums": ("ValueError", r"rank 0: .*accumulate='float32'.* rank \d: .*accumulate='weight'"),
    "softcap": ("ValueError", r"rank \d: logit_softcap must be a finite number > 0, got 0"),
    "bias on one rank": ("ValueError", r"rank \d: .*bias float32 \(C\)"),
    "other layer": (
        "ValueError",
        r"rank \d: weight must have the shape \(C, 5\), got float32 tensor of shape \(\d, 4\)",
    ),
    "other words": ("ValueError", r"rank 0: .*embedding float32 \(C, 4\).* rank \d: .*embedding float32 \(C, 3\)"),
    "autocast on one rank": ("ValueError", r"rank 0: .*scores=torch.float32; rank \d: .*scores=torch.bfloat16"),
    "other target of a layer": ("ValueError", r"target must be the same on every rank"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_the_same_error_on_every_rank(group: Ranks, name: str) -> None:
    kind, pattern = FAULTS[name]
    answers = group(fault, group.size, name, seconds=20)
    assert len(set(answers)) == 1, answers
    assert answers[0][0] == kind, answers[0]
    assert re.search(pattern, answers[0][1]), answers[0]
    assert len(answers[0][1]) < 300


def wrong_shard(rank: int) -> str:
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(ValueError, match="must be sharded along its classes") as error:
        sharded.sharded_am_softmax_loss(
            torch.ones(3, 4), distribute_tensor(torch.ones(6, 4), mesh, [Shard(1)]), torch.arange(3)
        )
    rows = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    sums = DTensor.from_local(torch.ones(3, 4), mesh, [Partial()])
    for x in (rows, sums):  # each rank its own rows, or its own terms
        with pytest.raises(ValueError, match=r"embedding must be the same on every rank, Replicate\(\), got a DTensor"):
            sharded.sharded_am_softmax_loss(x, torch.ones(3, 4), torch.arange(3))
        with pytest.raises(ValueError, match=r"hidden must be the same on every rank, Replicate\(\), got a DTensor"):
            sharded.sharded_linear_emo_loss(x, torch.ones(3, 4), torch.arange(3), torch.ones(3, 4))
    return str(error.value)


def test_another_shard_is_refused(two: Ranks) -> None:
    assert set(two(wrong_shard)) == {
        "weight must be sharded along its classes, Shard(0), and along nothing else, got a DTensor with placements "
        "(Shard(dim=1),)"
    }


def wrong_group(rank: int) -> None:
    only_first = dist.new_group([0])
    arguments = torch.ones(3, 4), torch.ones(5, 4), torch.arange(3)
    for group in (only_first, "first"):
        if rank == 0 and group is only_first:
            assert sharded.sharded_am_softmax_loss(*arguments, group=group).isfinite()
            continue
        with pytest.raises(TypeError, match="group must be a ProcessGroup that holds this rank, got "):
            sharded.sharded_am_softmax_loss(*arguments, group=group)


def test_a_group_holds_this_rank(two: Ranks) -> None:
    two(wrong_group)


def waits(rank: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(1))


def test_ranks_that_wait_are_killed_and_reported() -> None:
    with ranks(2) as group, pytest.raises(pytest.fail.Exception, match=r"rank 0 of 2 waits in waits:(.|\n)*all_reduce"):
        group(waits, seconds=10)


def test_without_a_group_there_is_an_error() -> None:
    with pytest.raises(
        RuntimeError, match=r"there is no process group: call torch\.distributed\.init_process_group\(\)"
    ):
        sharded.sharded_multilabel_softmax_loss(torch.ones(2, 3), torch.ones(2, 3))


def other_device(rank: int, size: int) -> list[bool]:
    """Whether everything is the same where torch's default device is another one."""
    p = Problem(rank, CUTS[size][0], torch.float32)

    def found() -> list[Tensor]:
        torch.manual_seed(0)
        head = sharded.ShardedCosineClassifier(SIZE, C)
        pairs = [both(name, p) for name in LOSSES]
        values = [ours() for ours, *_ in pairs]
        slopes = [
            s for value, (_, _, mine, _) in zip(values, pairs, strict=True) for s in torch.autograd.grad(value, mine)
        ]
        drawn = [sharded.sharded_am_softmax_loss(p.z, head.weight, p.t, sample=0.6)]
        return [*values, *slopes, *drawn, *(x.full_tensor() for x in (head.weight, head(p.z)))]

    right = found()
    with torch.device("meta"):
        other = found()
    return [torch.equal(a, b) for a, b in zip(other, right, strict=True)]


def test_the_default_device_is_not_asked(group: Ranks) -> None:
    for found in group(other_device, group.size):
        assert all(found)


# ------------------------------------------------------------------------------------------------------------ sampling


def draws(rank: int, size: int, seed: int) -> dict[str, Any]:
    """A sampled loss, which classes of this rank have a gradient, and the unsharded loss of all these classes."""
    classes, rows = 200, 8
    g = torch.Generator().manual_seed(0)
    z, w = torch.randn(rows, SIZE, generator=g).double(), torch.randn(classes, SIZE, generator=g).double()
    t = torch.randint(classes, (rows,), generator=g)
    t[3] = -100
    mine = slice(rank * classes // size, (rank + 1) * classes // size)
    z, part = z.requires_grad_(), w[mine].clone().requires_grad_()
    value = sharded.sharded_am_softmax_loss(z, part, t, sample=0.24, generator=torch.Generator().manual_seed(seed))
    slope, slopes = torch.autograd.grad(value, (z, part))
    every = [torch.zeros_like(slopes) for _ in range(size)]
    dist.all_gather(every, slopes)
    kept = torch.cat(every).any(-1).nonzero()[:, 0]
    again = z.detach().clone().requires_grad_()
    place = torch.full((classes,), -100).scatter(0, kept, torch.arange(len(kept)))
    less = w[kept].clone().requires_grad_()
    wanted = lb.linear_am_softmax_loss(again, less, torch.where(t >= 0, place[t], -100))
    right, rights = torch.autograd.grad(wanted, (again, less))
    return {
        "kept": kept.tolist(),
        "targets": t[t >= 0].tolist(),
        "error": max(apart(value, wanted), apart(slope, right), apart(torch.cat(every)[kept], rights)),
    }


def test_a_sample_keeps_all_targets_and_a_share_of_the_others(group: Ranks) -> None:
    first, same, other = (group(draws, group.size, seed) for seed in (1, 1, 2))
    for found in (*first, *other):
        assert found["error"] <= 1e-12
        assert set(found["targets"]) <= set(found["kept"])
        assert len(found["kept"]) == 48
    assert first == same
    assert first[0]["kept"] != other[0]["kept"]
    assert not 0 == first[0]["kept"][0] == other[0]["kept"][0]  # an ignored row keeps no class
    half = 200 // group.size
    places = [{k - r * half for k in first[0]["kept"] if r * half <= k < (r + 1) * half} for r in range(group.size)]
    assert len(set(map(frozenset, places))) == group.size  # ranks seeded alike draw for themselves


# ------------------------------------------------------------------------------------- the classifier, its checkpoint


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.head = nn.Linear(4, SIZE), head


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    return torch.randn(16, 4, generator=g), torch.randint(C, (16,), generator=g)


def steps(model: Model, optimizer: torch.optim.Optimizer, number: int, loss: Callable[..., Tensor]) -> None:
    x, t = data()
    for _ in range(number):
        optimizer.zero_grad()
        loss(model.encoder(x), model.head.weight, t).backward()
        optimizer.step()


def whole_weight(model: Model) -> Tensor:
    weight = model.head.weight
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()


def adam(model: Model) -> torch.optim.Optimizer:
    groups = [{"params": model.encoder.parameters()}, {"params": model.head.parameters()}]
    return torch.optim.AdamW(groups, lr=0.05)


def train_and_save(rank: int, folder: str) -> Tensor:
    torch.manual_seed(0)
    model = Model(sharded.ShardedCosineClassifier(SIZE, C))
    optimizer = adam(model)
    steps(model, optimizer, 3, sharded.sharded_am_softmax_loss)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    return whole_weight(model)


def load_and_train(rank: int, folder: str) -> tuple[Tensor, Tensor, int]:
    torch.manual_seed(5)  # other vectors, which the checkpoint replaces
    model = Model(sharded.ShardedCosineClassifier(SIZE, C))
    optimizer = adam(model)
    weights, state = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    loaded = whole_weight(model)
    steps(model, optimizer, 3, sharded.sharded_am_softmax_loss)
    moments = optimizer.state[model.head.weight]["exp_avg"]
    return loaded, whole_weight(model), len(moments.to_local())


def test_four_ranks_save_and_two_go_on(two: Ranks, four: Ranks, tmp_path: Path) -> None:
    saved = four(train_and_save, str(tmp_path))
    resumed = two(load_and_train, str(tmp_path))
    (start,) = four(first_vectors, C)[:1]
    head = lb.CosineClassifier(SIZE, C)
    head.weight.data = start.clone()
    model = Model(head)
    optimizer = adam(model)
    steps(model, optimizer, 3, lb.linear_am_softmax_loss)
    middle = whole_weight(model)
    steps(model, optimizer, 3, lb.linear_am_softmax_loss)
    assert apart(middle, start) > 0.1
    for weight in (*saved, *(r[0] for r in resumed)):
        assert apart(weight, middle) <= 1e-5
    for _, weight, _ in resumed:
        assert apart(weight, whole_weight(model)) <= 1e-5
    assert [n for *_, n in resumed] == [6, 5]  # a rank keeps the state of its own vectors


def first_vectors(rank: int, classes: int) -> Tensor:
    torch.manual_seed(rank)  # rank 0 decides
    return sharded.ShardedCosineClassifier(SIZE, classes).weight.full_tensor().detach()


def test_the_first_class_vectors_do_not_depend_on_the_number_of_ranks(two: Ranks, four: Ranks) -> None:
    for classes in (2, C, 10_001):  # fewer classes than ranks; several blocks
        vectors = [*two(first_vectors, classes), *four(first_vectors, classes)]
        assert all(torch.equal(v, vectors[0]) for v in vectors)
        assert len(vectors[0].unique(dim=0)) == classes
        assert vectors[0].norm(dim=1).square().mean().item() == pytest.approx(1, abs=0.05 if classes > C else 0.9)


def classify(rank: int, size: int) -> dict[str, Any]:
    head = sharded.ShardedCosineClassifier(SIZE, C)
    plain = lb.CosineClassifier(SIZE, C)
    plain.weight.data = head.weight.full_tensor().detach()
    z = torch.randn(2, 3, SIZE, generator=torch.Generator().manual_seed(3))
    mine, whole = z.clone().requires_grad_(), z.clone().requires_grad_()
    cosine, wanted = head(mine), plain(whole)
    target = torch.randint(C, (2, 3), generator=torch.Generator().manual_seed(4))
    hot = nn.functional.one_hot(target, C) > 0
    mesh = head.mesh
    ours = sharded.sharded_multilabel_softmax_loss(cosine, distribute_tensor(hot, mesh, [Shard(2)]))
    theirs = lb.multilabel_softmax_loss(wanted, hot)
    ours.backward()
    theirs.backward()
    with pytest.raises(ValueError, match="in_features=5 as its last dimension"):
        head(z[..., :2])
    half = head.to(torch.bfloat16).weight.dtype
    return {
        "shape": tuple(cosine.shape),
        "placement": cosine.placements,
        "dtypes": (half, head.double().weight.dtype),
        "errors": [
            apart(cosine.full_tensor().detach(), wanted.detach()),
            apart(mine.grad, whole.grad),
            apart(head.weight.grad.full_tensor(), plain.weight.grad),
        ],
    }


def test_the_classifier_gives_the_cosines_of_the_whole(group: Ranks) -> None:
    for found in group(classify, group.size):
        assert found["shape"] == (2, 3, C)
        assert found["placement"] == (Shard(2),)
        assert found["dtypes"] == (torch.float32, torch.float64)
        assert max(found["errors"]) <= 1e-6


def alike(rank: int) -> list[float]:
    """Replicated DTensors of embeddings and of a scale; a scale and a margin of which ranks differ by a rounding."""
    head, z = sharded.ShardedCosineClassifier(SIZE, C), torch.randn(3, SIZE, generator=torch.Generator().manual_seed(3))
    scale, t, w = torch.tensor(20.0), torch.arange(3), head.weight
    leaves = [distribute_tensor(x, head.mesh, [Replicate()]).requires_grad_() for x in (z, scale)]
    plain = [x.clone().requires_grad_() for x in (z, scale * (1 + rank * 1e-7))]

    def found(z: Tensor, scale: Tensor) -> list[Tensor]:
        value = sharded.sharded_am_softmax_loss(z, w, t, scale=scale) + head(z).square().full_tensor().sum()
        return [value.detach(), *torch.autograd.grad(value, [z, scale, w])]

    with pytest.raises(ValueError, match=r"embedding must be the same on every rank, Replicate\(\), got a DTensor"):
        head(distribute_tensor(z, head.mesh, [Shard(0)]))
    margins = [Learned(m) for m in (0.3, 0.3 * (1 + rank * 1e-7))]
    values = [sharded.sharded_am_softmax_loss(z, w, t, psi=psi) for psi in margins]
    assert apart(*values) <= 1e-5
    whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in (*found(*leaves), *found(*plain))]
    return [apart(a, b) for a, b in zip(whole[:4], whole[4:], strict=True)]


def test_what_is_alike_on_every_rank_may_be_a_dtensor(two: Ranks) -> None:
    for found in two(alike):
        assert max(found) <= 1e-5


def test_a_classifier_needs_classes_and_a_group() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        sharded.ShardedCosineClassifier(3, 0)
    with pytest.raises(RuntimeError, match="there is no process group"):
        sharded.ShardedCosineClassifier(3, 2)


# -------------------------------------------------------------------------------------------------------- the modules


def modules(rank: int, size: int) -> dict[str, bool]:
    """Of each function whether its module has the same options and gives the same loss."""
    p = Problem(rank, CUTS[size][0], torch.float32)
    s, z, w, e = p.column(p.s), p.z, p.row(p.w), p.row(p.e)
    calls: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
        "sharded_multilabel_softmax_loss": ((s, s > 0), {"threshold": 0.5, "reduction": "sum"}),
        "sharded_am_softmax_loss": ((z, w, p.t), {"psi": lb.multiplied_angle(2), "scale": 20.0, "sample": 1.0}),
        "sharded_emo_loss": ((s, p.t, e), {"reduction": "none"}),
        "sharded_emo_ce_loss": ((s, p.t, e), {"group": dist.group.WORLD, "ignore_index": -100}),
        "sharded_linear_emo_loss": ((z, w, p.t, e), {"logit_scale": 2.0, "logit_softcap": 3.0, "chunk_size": 2}),
        "sharded_linear_emo_ce_loss": ((z, w, p.t, e), {"accumulate": "weight", "reduction": "none"}),
    }
    assert set(calls) == {name for name in sharded.__all__ if name.islower()}
    found = {}
    for name, (tensors, options) in calls.items():
        function, twin = (getattr(sharded, n) for n in (name, "".join(map(str.capitalize, name.split("_")))))
        with pytest.raises(ValueError, match="reduction must be one of"):
            twin(reduction="all")
        taken = [set(inspect.signature(f).parameters) for f in (function, twin)]
        assert taken[0] - taken[1] <= {"input", "hidden", "embedding", "weight", "bias", "target", "mask"}
        found[name] = torch.equal(function(*tensors, **options), twin(**options)(*tensors))
    return found


def test_a_module_gives_the_loss_of_its_function(group: Ranks) -> None:
    for found in group(modules, group.size):
        assert len(found) == 6
        assert all(found.values())


def copies(rank: int) -> list[bool]:
    """Copies of modules, as an average of weights makes them, share the group and compute the same."""
    p, group = Problem(rank, CUTS[2][0], torch.float32), dist.new_group([0, 1])
    s, e = p.column(p.s), p.row(p.e)
    scale = nn.Parameter(torch.tensor(20.0))
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (sharded.ShardedMultilabelSoftmaxLoss(group=group), (s, s > 0)),
        (sharded.ShardedAmSoftmaxLoss(group=group, scale=scale), (p.z, p.row(p.w), p.t)),
        (sharded.ShardedEmoLoss(group=group), (s, p.t, e)),
        (sharded.ShardedEmoCeLoss(group=group), (s, p.t, e)),
        (sharded.ShardedLinearEmoLoss(group=group), (p.z, p.row(p.w), p.t, e)),
        (sharded.ShardedLinearEmoCeLoss(group=group), (p.z, p.row(p.w), p.t, e)),
        (sharded.ShardedCosineClassifier(SIZE, C, group=group), (p.z,)),
    ]
    found = []
    for module, tensors in calls:
        copied = deepcopy(nn.ModuleList([module]))[0]
        found += [copied is not module, type(copied) is type(module)]
        if isinstance(module, sharded.ShardedCosineClassifier):
            values = [sharded.sharded_am_softmax_loss(p.z, m.weight, p.t) for m in (copied, module)]
            found += [torch.equal(*values), copied.weight is not module.weight]
        else:
            found += [copied.group is group, torch.equal(copied(*tensors), module(*tensors))]
            own = list(copied.parameters())
            found += [len(own) == len(list(module.parameters())), all(x is not scale for x in own)]
    return found


def test_copies_of_a_module_share_its_group(two: Ranks) -> None:
    for found in two(copies):
        assert all(found), found


# ----------------------------------------------------------------------------------------------------- the example

SMALL = ["--groups", "12", "--each", "10", "--batch", "16", "--width", "16"]


def example(rank: int, *words: str) -> float:
    return sharded_am_softmax.main([*SMALL, *words])


def test_the_example_goes_on_with_another_number_of_ranks(two: Ranks, four: Ranks, tmp_path: Path) -> None:
    stopped = four(example, "--steps", "10", "--folder", str(tmp_path / "a"))
    resumed = two(example, "--steps", "25", "--folder", str(tmp_path / "a"))
    at_once = two(example, "--steps", "25", "--folder", str(tmp_path / "b"))
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"10", "25"}
    assert len({*stopped}) == 1
    assert resumed[0] == pytest.approx(at_once[0], abs=1)  # rows add up in another order
    assert resumed[0] > stopped[0] + 5


def test_the_command_of_the_example(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "examples.sharded_am_softmax", *SMALL, "--steps", "3", "--sample", "0.5"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.search(r"search accuracy \d+\.\d % after 0 steps, \d+\.\d % after 3\n", done.stdout)
    assert "2 ranks: 100%" in done.stderr
    assert (tmp_path / "3").is_dir()
