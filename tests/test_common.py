"""What all the losses promise alike."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import lossbook
from lossbook import _torch
from lossbook._checks import check_index, check_number, describe
from lossbook._common import LossModule
from lossbook.training import seeded
from tests.losses import ALL, LOSSES, OF_ROWS, Call, calls, ids

PACKAGE = Path(lossbook.__file__).parent
MODULES = ("accuracy", "am_softmax", "emo", "focal", "multilabel_softmax", "soft_labels", "spans")
every = pytest.mark.parametrize("call", ALL, ids=ids)
every_loss = pytest.mark.parametrize("call", LOSSES, ids=ids)


def gradients(call: Call, value: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(value.sum(), [call.tensors[i] for i in call.scores]))


# --------------------------------------------------------------------------------------------------- how it is written


@pytest.mark.parametrize("slug", MODULES)
def test_a_module_is_short(slug: str) -> None:
    text = (PACKAGE / f"{slug}.py").read_text(encoding="utf-8")
    assert text.count("\n") <= 460, "a module is read from beginning to end"
    assert not re.search(r"autograd\.Function|import Function", text), "what is written by hand lies in _fast"


@pytest.mark.parametrize("slug", MODULES)
def test_a_loss_is_a_formula_of_25_lines(slug: str) -> None:
    """Without signature and docstring no function of a module has more than 25 lines, nor one of over 88 columns."""
    source = (PACKAGE / f"{slug}.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            text = lines[body[0].lineno - 1 : node.end_lineno]
            assert len(text) <= 25, f"{node.name} has {len(text)} lines"
            long = [line for line in text if len(line) > 88]
            assert not long, f"{node.name}: {long}"


def test_private_torch_lies_in_one_file() -> None:
    private = re.compile(r"torch\.(\w+\.)*_[a-zA-Z]|from torch\.(\w+\.)*_|_find\(\"")
    found = [p.name for p in PACKAGE.rglob("*.py") if private.search(p.read_text(encoding="utf-8"))]
    assert found == ["_torch.py"]


def test_every_public_name_can_be_imported_from_the_top() -> None:
    modules = (*MODULES, "distributed", "metrics")
    found = {n: m for m in modules for n in importlib.import_module(f"lossbook.{m}").__all__}
    assert found == lossbook._EXPORTS
    for name, module in found.items():
        assert getattr(lossbook, name) is getattr(importlib.import_module(f"lossbook.{module}"), name)
        assert name in dir(lossbook)
    with pytest.raises(AttributeError, match="module 'lossbook' has no attribute 'no_such_loss'"):
        _ = lossbook.no_such_loss


def test_every_function_is_called_here() -> None:
    functions = {n for n, m in lossbook._EXPORTS.items() if m not in ("distributed", "metrics") and n.islower()}
    factories = {"additive_angular_margin", "additive_cosine_margin", "multiplied_angle"}
    pairs = {n for n, m in lossbook._EXPORTS.items() if m == "spans"} - {"power_bce"}  # of tokens: tests/test_spans.py
    assert {call.name for call in ALL} == functions - factories - pairs


class Operators(TorchDispatchMode):
    """The names of the operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.called.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@every_loss
def test_rows_that_all_count_take_no_mask(call: Call) -> None:
    if not call.takes("ignore_index") or call.name in ("exact_loss", "sparse_multilabel_softmax_loss"):
        pytest.skip("a mask costs nothing here, or there is none")
    with Operators() as operators:
        gradients(call, call())
    assert len(operators.called) > 10
    assert not {"bitwise_not", "all"} & set(operators.called)


@every
def test_tensors_come_first_and_options_are_keywords(call: Call) -> None:
    for p in inspect.signature(call.function).parameters.values():
        if (call.name, p.name) in (("smooth_labels", "smoothing"), ("power_bce", "n")):
            continue
        is_tensor = p.name in ("input", "target", "index", "other", "cosine", "embedding", "weight", "hidden", "label")
        required = p.default is inspect.Parameter.empty
        assert (p.kind is p.POSITIONAL_OR_KEYWORD) == (is_tensor and required), p


# ------------------------------------------------------------------------------------------------------ reading options


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32])
def test_index_targets_of_any_dtype_do_not_wrap(dtype: torch.dtype) -> None:
    """In uint8, -100 is 156 and 300 is 44: neither may be what a class index is compared with."""
    values = torch.tensor([0, 44, 156 if dtype == torch.uint8 else 299])
    index, counted = check_index(values.to(dtype), (3,), 300, -100)
    assert counted.tolist() == [True, True, True]
    assert torch.equal(index, values)
    with pytest.raises(ValueError, match=r"target must be class indices in \[0, 44\) or ignore_index=-100, got 44"):
        check_index(values.to(dtype)[:2], (2,), 44, -100)


@pytest.mark.parametrize("ignored", [None, True, 1.0, "x"])
@pytest.mark.parametrize("call", [c for c in LOSSES if c.takes("ignore_index")], ids=ids)
def test_what_is_ignored_is_an_integer(call: Call, ignored: object) -> None:
    for make in (lambda i: call(ignore_index=i), lambda i: call.twin(**dict(call.options), ignore_index=i)):
        with pytest.raises(TypeError, match="ignore_index must be an integer, got"):
            make(ignored)
        for same in (-100, np.int64(-100), torch.tensor(-100)):
            make(same)


@every_loss
def test_numbers_of_numpy_and_tensors_of_one_number_are_options(call: Call) -> None:
    parameters = inspect.signature(call.function).parameters
    numbers = {n: p.default for n, p in parameters.items() if isinstance(p.default, (int, float)) and p.default != -100}
    for name, value in numbers.items():
        if isinstance(value, bool):
            assert torch.equal(call(**{name: np.bool_(value)}), call(**{name: value}))
            continue
        for same in (np.array(value)[()], torch.tensor(value)):
            assert torch.allclose(call(**{name: same}), call(**{name: value})), name
        for wrong in ("x", None, [value]):
            if wrong is None and "None" in str(parameters[name].annotation):
                continue
            with pytest.raises((TypeError, ValueError), match=name) as error:
                call(**{name: wrong})
            assert len(str(error.value)) < 500


def test_a_number_in_a_tensor_is_within_bounds_too() -> None:
    assert check_number("gamma", torch.tensor(2.0), low=0) == 2.0
    with pytest.raises(ValueError, match="gamma must be a finite number >= 0, got -1"):
        check_number("gamma", torch.tensor(-1.0), low=0)
    with pytest.raises(TypeError, match=r"gamma must be a number, got float32 tensor of shape \(2,\)"):
        check_number("gamma", torch.ones(2))


def test_reduction_has_three_names() -> None:
    for call in LOSSES:
        for wrong in ("avg", None, ["mean"] * 1000):
            with pytest.raises(
                (ValueError, TypeError), match="reduction must be one of 'mean', 'sum', 'none'"
            ) as error:
                call(reduction=wrong)
            assert len(str(error.value)) < 500


# ------------------------------------------------------------------------------------------------------ reading tensors


@every
def test_lists_and_sparse_tensors_get_one_clear_sentence(call: Call) -> None:
    for i, given in enumerate(call.tensors):
        if not isinstance(given, torch.Tensor):
            continue
        dense = given.detach()
        wrong = [dense.tolist() * 2000, dense.numpy()]
        if dense.dim() == 2:
            wrong += [dense.float().to_sparse(), dense.float().to_sparse_csr()]
        for other in wrong:
            tensors = [other if i == j else x for j, x in enumerate(call.tensors)]
            with pytest.raises(TypeError, match=r"must be a (dense )?tensor") as error:
                call(*tensors)
            assert len(str(error.value)) < 500


@every_loss
def test_targets_take_no_gradient(call: Call) -> None:
    if call.name == "multilabel_symmetric_kl":
        return  # both are predictions
    for i, given in enumerate(call.tensors):
        if i not in call.scores and given.is_floating_point():
            tensors = [x.detach().clone().requires_grad_() if i == j else x for j, x in enumerate(call.tensors)]
            if call.name.endswith(("emo_loss", "emo_ce_loss")):
                value = call(*tensors)  # word vectors are constants: a model's own may be passed as they are
                assert torch.autograd.grad(value, tensors[i], allow_unused=True) == (None,)
            else:
                with pytest.raises(ValueError, match=r"must not require a gradient, pass \w+\.detach\(\)"):
                    call(*tensors)


SOFT = [c for c in ALL if len(c.tensors) > 1 and c.name != "multilabel_symmetric_kl"]
SOFT = [c for c in SOFT if isinstance(c.tensors[1], torch.Tensor) and c.tensors[1].is_floating_point()]
SOFT = [c for c in SOFT if not c.name.startswith("linear")]


@pytest.mark.parametrize("call", SOFT, ids=ids)
def test_soft_labels_that_rounding_left_outside_are_clamped_everywhere(call: Call) -> None:
    s, t = call.tensors
    t = torch.zeros_like(t)
    t[:, 1] = 1  # rows sum to 1
    rounded = t.clone()
    rounded[:, 0], rounded[:, 1] = -5e-5, 1 + 5e-5

    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        found = call(s, t)
        return found[1] if isinstance(found, tuple) else found

    want = loss(s, t)
    assert torch.allclose(loss(s, rounded), want, rtol=1e-6)
    if call.name != "mixup":
        each = torch.vmap(loss)(s.detach().unsqueeze(0), rounded.unsqueeze(0))
        assert torch.allclose(each[0], want, rtol=1e-6)
    for far in (-1e-3, 1 + 1e-3):
        rounded[0, 0] = far
        with pytest.raises(ValueError, match="target must be labels in"):
            loss(s, rounded)


# ------------------------------------------------------------------------------------------------------- what comes out


@every_loss
def test_an_unreduced_loss_can_be_edited_in_place(call: Call) -> None:
    plain = call(reduction="none")
    weights = torch.rand(plain.shape)
    edited = call(reduction="none")
    edited *= weights
    edited[0] = 0
    keep = torch.ones_like(weights)
    keep[0] = 0
    assert torch.allclose(edited, plain * weights * keep)
    for ours, right in zip(gradients(call, edited), gradients(call, plain * weights * keep), strict=True):
        assert torch.allclose(ours, right, atol=1e-7)


@every_loss
def test_the_sum_is_the_sum_and_a_second_backward_pass_gives_the_same(call: Call) -> None:
    total = call(reduction="sum")
    assert torch.allclose(total, call(reduction="none").sum(), rtol=1e-6)
    inputs = [call.tensors[i] for i in call.scores]
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    second = torch.autograd.grad(total, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@every_loss
def test_nan_that_arrives_at_a_row_left_out_goes_no_further(call: Call) -> None:
    """As from ``torch.where(n > 0, loss / n, 0)`` with n = 0 at that row."""
    at = 2 if call.name.startswith("linear") else 1
    tensors = [x.clone() if isinstance(x, torch.Tensor) else x for x in call.tensors]
    options: dict[str, Any] = {}
    if call.takes("mask"):
        options["mask"] = torch.tensor([True, False, True, True]).unsqueeze(-1).expand(4, 6)
    elif call.takes("ignore_index") and not tensors[at].is_floating_point():
        tensors[at][1] = -100
    else:
        pytest.skip("no row is left out")
    for i in call.scores:
        tensors[i] = call.tensors[i].detach().requires_grad_()
    loss = call(*tensors, reduction="none", **options)
    share = torch.ones_like(loss)
    share[1] = 0
    torch.where(share > 0, loss / share, 0.0).sum().backward()
    for i in call.scores:
        assert tensors[i].grad.isfinite().all()


@every_loss
@pytest.mark.parametrize("rows", [0, 1])
def test_the_mean_is_that_of_the_rows_that_count(call: Call, rows: int) -> None:
    at = 2 if call.name.startswith("linear") else 1
    tensors, options = list(call.tensors), {}
    if call.takes("mask"):
        options["mask"] = (torch.arange(4) < rows).unsqueeze(-1).expand(4, 6)
    elif call.takes("ignore_index") and not tensors[at].is_floating_point():
        tensors[at] = tensors[at].masked_fill(torch.arange(4) >= rows, -100)
    else:
        pytest.skip("no row is left out")
    one_by_one = call(*tensors, reduction="none", **options)
    of_rows = one_by_one.dim() == 1
    wanted = one_by_one.sum() / (1 if of_rows or not rows else 6)
    torch.testing.assert_close(call(*tensors, **options), wanted)


@every_loss
def test_a_target_changed_in_place_is_noticed(call: Call) -> None:
    """Before a gradient that is differentiated again: an error, or the gradient by the target as it was."""
    at = 2 if call.name.startswith("linear") else 1
    if at in call.scores:
        pytest.skip("the second tensor is no target")
    tensors = list(call.tensors)
    tensors[at] = tensors[at].clone()
    loss = call(*tensors)
    tensors[at].zero_()
    try:
        found = torch.autograd.grad(loss, tensors[0], create_graph=True)[0]
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
    else:
        torch.testing.assert_close(found, gradients(call, call())[0])


@pytest.mark.parametrize("size", [1.0, 40.0])
@every_loss
def test_where_nobody_may_look_at_values_they_are_the_same(
    call: Call, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator: sure rows, hopeless rows, scores that no exponential holds."""
    if call.name in ("margin_softmax_loss", "am_softmax_loss") and size > 1:
        pytest.skip("cosines lie in [-1, 1]")
    tensors = [x.detach().double() if torch.is_tensor(x) and x.is_floating_point() else x for x in call.tensors]
    for i in call.scores:
        tensors[i] = tensors[i] * size
    if any(call is c for c in OF_ROWS):  # two dimensions of rows
        tensors = [x.unflatten(0, (2, 2)) if torch.is_tensor(x) and len(x) == 4 else x for x in tensors]

    def made(dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
        given = [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in tensors]
        leaves = [given[i].requires_grad_() for i in call.scores]
        loss = call(*given, reduction="none")
        return loss.detach(), list(torch.autograd.grad(loss.sum(), leaves))

    value, grads = made(torch.float64)
    for module in [m for name, m in sys.modules.items() if name.startswith("lossbook") and hasattr(m, "readable")]:
        monkeypatch.setattr(module, "readable", lambda *tensors: False)
    for dtype, rounded in ((torch.float32, 2e-5), (torch.float64, 1e-11)):
        blind, blind_grads = made(dtype)
        torch.testing.assert_close(blind.double(), value, rtol=rounded, atol=1e-30)
        for a, b in zip(blind_grads, grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=rounded, atol=rounded * float(b.abs().amax()) + 1e-30)


@every
def test_inference_mode_gives_the_same(call: Call) -> None:
    with seeded(0):
        wanted = call()
    with torch.inference_mode(), seeded(0):
        torch.testing.assert_close(call(), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("far", [8.0, -64.0, 1024.0])
@pytest.mark.parametrize(
    "loss",
    [
        lossbook.softmax_focal_loss,
        partial(lossbook.softmax_focal_loss, gamma=5.0),
        lossbook.soft_truncated_cross_entropy,
        partial(lossbook.soft_truncated_cross_entropy, sharpness=3.0),
        lossbook.soft_accuracy_loss,
    ],
)
def test_a_common_offset_costs_no_digit(loss: Callable[..., torch.Tensor], far: float) -> None:
    g = torch.Generator().manual_seed(0)
    s = (torch.randn(500, 5, generator=g) * 16).round() / 8  # so that s + far is exact
    t = torch.randint(5, (500,), generator=g)
    results = []
    for scores in (s, s + far):
        x = scores.requires_grad_()
        value = loss(x, t, reduction="none")
        results.append((value.detach(), *torch.autograd.grad(value.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("call", OF_ROWS, ids=ids)
def test_classes_may_lie_in_any_dimension(call: Call) -> None:
    assert call.takes("dim")

    def moved(x: torch.Tensor) -> torch.Tensor:
        """Rows (4,) as (2, 2), the classes between them; a target of rows and word vectors as they are."""
        return x.reshape(2, 2, *x.shape[1:]).movedim(-1, 1) if x.dim() == 2 and x.shape[-1] == 6 else x

    tensors = [moved(x) if x.shape[0] == 4 else x for x in call.tensors]
    if not tensors[1].is_floating_point() and tensors[1].dim() == 1:
        tensors[1] = tensors[1].reshape(2, 2)
    if call.name.startswith("sparse"):
        tensors[1] = tensors[1].reshape(2, 2, -1)
        if call.tensors[1].shape[-1] == 2:
            tensors[1] = tensors[1].movedim(-1, 1)
    found = call(*tensors, dim=1, reduction="none")
    assert found.shape == (2, 2)
    assert torch.allclose(found.reshape(4), call(reduction="none"), rtol=1e-6)
    assert torch.allclose(call(*tensors, dim=-2), call(), rtol=1e-6)
    for wrong in (3, -4):
        with pytest.raises(ValueError, match="dim must name a dimension"):
            call(*tensors, dim=wrong)


@pytest.mark.parametrize("call", [c for c in LOSSES if c.takes("mask")], ids=ids)
def test_what_a_mask_takes_away_is_as_if_deleted(call: Call) -> None:
    """A masked column may hold anything; a row with nothing left does not count in the mean."""
    torch.manual_seed(1)
    s, t = call.tensors
    mask = torch.rand(4, 6) < 0.7
    mask[:, 0] = False
    mask[2] = False
    spoiled = s.detach().masked_fill(~mask, torch.nan).requires_grad_()
    loss = call(spoiled, t, mask=mask)
    rows = [i for i in range(4) if i != 2]
    if call.name.startswith("sparse"):
        hit = torch.zeros(4, 7, dtype=torch.bool).scatter(1, t.masked_fill(t < 0, 6), True)[:, :6]
        t = hit.float()
        function = lossbook.multilabel_softmax_loss
    else:
        function = partial(call.function, **dict(call.options))
    kept = [function(s[i : i + 1, mask[i]], t[i : i + 1, mask[i]], reduction="none").flatten() for i in rows]
    assert torch.allclose(loss, torch.cat(kept).mean(), rtol=1e-5)
    (gradient,) = torch.autograd.grad(loss, spoiled)
    assert bool((gradient[~mask] == 0).all())
    assert bool(gradient.isfinite().all())
    nothing = call(spoiled, call.tensors[1], mask=torch.zeros(4, 6, dtype=torch.bool))
    assert nothing.item() == 0
    assert not bool(torch.autograd.grad(nothing, spoiled)[0].any())


@every
def test_helpers_on_several_labels_take_a_mask(call: Call) -> None:
    if call.name in ("multilabel_predict", "smooth_labels", "mixup", "subset_softmax_loss", "asymmetric_loss"):
        assert call.takes("mask")


# ------------------------------------------------------------------------------------------- other roads through torch


def tensors_of(result: object) -> list[torch.Tensor]:
    """The tensors of a result that may be a tuple or a dict."""
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else (result,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def test_every_loss_works_on_fake_tensors() -> None:
    """Tracers run a model on tensors with shapes and no values: nothing may look at a value there."""
    real = [[(x.shape, x.dtype) for x in tensors_of(call())] for call in calls()]
    with FakeTensorMode():
        for call, shapes in zip(calls(), real, strict=True):
            fake = tensors_of(call())
            assert [(x.shape, x.dtype) for x in fake] == shapes, call.name
            for x in fake:
                if x.requires_grad:
                    x.sum().backward()


class Subclass(torch.Tensor):
    """A tensor of another class, as DTensor is: nothing but the formula may run."""


@every_loss
def test_subclasses_take_the_formula(call: Call) -> None:
    tensors = [x.detach().as_subclass(Subclass).requires_grad_(x.requires_grad) for x in call.tensors]
    assert not _torch.plain(tensors[0])
    value = call(*tensors)
    assert torch.allclose(value.as_subclass(torch.Tensor), call(), rtol=1e-5)
    found = torch.autograd.grad(value, [tensors[i] for i in call.scores])
    for ours, right in zip(found, gradients(call, call()), strict=True):
        assert torch.allclose(ours.as_subclass(torch.Tensor), right, rtol=1e-4, atol=1e-6)


@every_loss
def test_a_torch_without_its_private_calls_gives_the_same(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    right, slope = call(), gradients(call, call())
    for name in ("_transforms_active", "_is_wrapped", "_graph_is_kept", "_tracing"):
        monkeypatch.setattr(_torch, name, _torch._ask)
    monkeypatch.setattr(_torch, "_dispatch_keys", lambda _: None)
    assert _torch._find("_C._no_such_call", _torch._ask) is _torch._ask
    assert not _torch.plain(call.tensors[0])
    value = call()
    assert torch.allclose(value, right, rtol=1e-5)
    for ours, theirs in zip(gradients(call, value), slope, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


SURE = (30 * ALL[0].tensors[0].detach()).requires_grad_()
TOPS = (SURE.amax(-1, keepdim=True) == SURE).float()
LENGTHS, PAIRS = torch.tensor([3, 5]), SURE.detach()[:, :4].reshape(4, 1, 2, 2)
MORE: dict[str, Callable[[], Any]] = {  # sure rows, options and helpers that take other roads
    "max_positives": lambda: lossbook.subset_softmax_loss(SURE, TOPS, max_positives=3),
    "focal, soft targets": lambda: lossbook.softmax_focal_loss(SURE, TOPS, reduction="none"),
    "truncated, soft targets": lambda: lossbook.soft_truncated_cross_entropy(SURE, TOPS, reduction="none"),
    "span_mask": lambda: lossbook.span_mask(LENGTHS),
    "decode_spans": lambda: lossbook.decode_spans(PAIRS, overlaps=False),
    "decode_triples": lambda: lossbook.decode_triples(*[PAIRS + 9] * 4),
}


@pytest.mark.parametrize("call", [*ALL, *MORE.values()], ids=[*map(ids, ALL), *MORE])
def test_the_default_device_is_not_asked(call: Callable[[], Any]) -> None:
    """Beside tensors on the CPU nothing is made on another device: an error there, on meta a result that is wrong."""
    leaves = [call.tensors[i] for i in call.scores] if isinstance(call, Call) else [SURE]

    def found() -> tuple[Any, ...]:
        torch.manual_seed(0)
        result = call()
        return result, *(torch.autograd.grad(x.sum(), leaves) for x in tensors_of(result) if x.requires_grad)

    right = found()
    with torch.device("meta"):
        other = found()
    assert repr(other) == repr(right)


DTENSOR = """
import os, sys, tempfile, torch, torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from tests.losses import LOSSES
store = dist.FileStore(os.path.join(tempfile.mkdtemp(), "store"), 1)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for call in LOSSES:
    if call.name.startswith("linear") or call.name == sys.argv[1]:
        continue
    for place in (Replicate(), Shard(0)):
        inputs = [
            distribute_tensor(x.detach(), mesh, [place if x.shape[0] == 4 else Replicate()]) for x in call.tensors
        ]
        for i in call.scores:
            inputs[i].requires_grad_()
        value = call(*inputs)
        found = torch.autograd.grad(value, [inputs[i] for i in call.scores])
        right = torch.autograd.grad(call(), [call.tensors[i] for i in call.scores])
        for ours, theirs in zip(found, right, strict=True):
            assert torch.allclose(ours.full_tensor(), theirs, rtol=1e-4, atol=1e-6), call.name
        print(call.name, "works")
dist.destroy_process_group()
"""


def test_dtensors_give_the_same() -> None:
    """Scores that are distributed over processes, here over one: every loss runs where cross-entropy would."""
    # before 2.13 a padded DTensor has a wrong shape
    left_out = "" if torch.__version__ >= "2.13" else "subset_softmax_loss"
    command = [sys.executable, "-c", DTENSOR, left_out]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = [c for c in LOSSES if not c.name.startswith("linear") and c.name != left_out]
    assert done.stdout.count("works") == 2 * len(wanted)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@every_loss
def test_a_trace_of_torch_jit_gives_the_loss(call: Call) -> None:
    traced = torch.jit.trace(lambda *x: call(*x), tuple(x.detach() for x in call.tensors), check_trace=False)
    assert torch.allclose(traced(*call.tensors), call(), rtol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_says_that_it_cannot_be_scripted() -> None:
    with pytest.raises(NotImplementedError, match=r"cannot be scripted.*torch.compile"):
        torch.jit.script(lossbook.SigmoidFocalLoss())


@every_loss
def test_the_twin_has_the_same_options_and_says_them(call: Call) -> None:
    parameters = inspect.signature(call.function).parameters.values()
    options = [p for p in parameters if p.kind is p.KEYWORD_ONLY or p.name == "n"]
    tensors = {"mask", "bias"}
    signature = inspect.signature(call.twin).parameters
    assert list(signature) == [p.name for p in options if p.name not in tensors]
    assert all(signature[p.name].default == p.default for p in options if p.name not in tensors)
    twin = call.twin(**dict(call.options), reduction="sum")
    assert isinstance(twin, LossModule)
    assert "reduction='sum'" in repr(twin)
    assert torch.allclose(twin(*call.tensors), call(reduction="sum"))


def test_what_an_error_shows_is_short() -> None:
    assert describe([[0.0] * 1000] * 1000) == "list"
    assert describe("x" * 1000) == "str '" + "x" * 59
    assert describe(torch.zeros(2, 3)) == "float32 tensor of shape (2, 3)"
    assert describe(torch.zeros(2, 3).to_sparse()) == "sparse_coo float32 tensor of shape (2, 3)"
