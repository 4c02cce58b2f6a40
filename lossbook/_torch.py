"""The calls of torch that are not public, each with what to do in a torch that lacks it.

A call that is missing is answered so that the losses stay right: the formula runs instead of a fast road, and values
that may not be looked at are not looked at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def _find(path: str, missing: Callable[..., Any]) -> Callable[..., Any]:
    """The function at ``torch.<path>``, or ``missing``."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found if callable(found) else missing


def _ask(*_: object) -> bool:
    return True


_transforms_active = _find("_C._are_functorch_transforms_active", _ask)
_is_wrapped = _find("_C._functorch.is_functorch_wrapped_tensor", _ask)
_dispatch_keys = _find("_C._dispatch_keys", lambda _: None)
_parse_key = _find("_C._dispatch_key_parse", lambda _: None)
_graph_is_kept = _find("_C._autograd._get_current_graph_task_keep_graph", _ask)
_tracing = _find("_C._is_tracing", _ask)
_excluded = getattr(torch._C, "_SetExcludeDispatchKeyGuard", None)
_autograd = getattr(getattr(torch._C, "DispatchKey", None), "AutogradFunctionality", None)
_gamma = _find("_standard_gamma", lambda a, generator: torch.distributions.Gamma(a, torch.ones_like(a)).sample())

try:
    _BATCHED = _parse_key("Batched")
except RuntimeError:  # a key of that name is no more
    _BATCHED = None


def compiling() -> bool:
    """Whether ``torch.compile`` or ``torch.export`` is reading the code."""
    return torch.compiler.is_compiling()


def exporting() -> bool:
    """Whether ``torch.export`` is reading the code: a graph that others run should hold torch's operators alone."""
    return bool(getattr(torch.compiler, "_is_exporting_flag", True))  # torch 2.11 compiles is_exporting() to True


def known_true(fact: bool) -> bool:
    """Whether this is True for every size that a compiled graph is made for; nothing is assumed."""
    return bool(_find("fx.experimental.symbolic_shapes.statically_known_true", bool)(fact))


def transformed() -> bool:
    """Whether a ``torch.func`` transform runs the code, in a compiled graph too."""
    return bool(_transforms_active())


def plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors run one operator at a time; None does not count.

    Not so for subclasses (DTensor, fake tensors), in a trace, under a ``torch.func`` transform, in forward mode, and in
    the batched backward passes of ``torch.autograd.grad(..., is_grads_batched=True)``. Only where it is so may a loss
    take a fast road: in-place work, a hand-written backward pass.
    """
    if compiling() or _transforms_active() or _tracing():
        return False
    return all(t is None or (type(t) in (Tensor, nn.Parameter) and not batched(t) and not _dual(t)) for t in tensors)


def readable(*tensors: Tensor | None) -> bool:
    """Whether the values can be looked at without waiting for a device or breaking a trace; None does not count."""
    if compiling() or _tracing():
        return False
    return all(t is None or (t.is_cpu and type(t) in (Tensor, nn.Parameter) and not _is_wrapped(t)) for t in tensors)


def batched(tensor: Tensor) -> bool:
    """Whether ``is_grads_batched`` hides a batch in this tensor."""
    keys = _dispatch_keys(tensor)
    return keys is None or _BATCHED is None or keys.has(_BATCHED)


def _dual(tensor: Tensor) -> bool:
    """Whether forward mode follows this tensor; outside of forward mode no tensor need be asked."""
    if getattr(torch.autograd.forward_ad, "_current_level", 0) < 0:
        return False
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def beside(constant: Tensor, scores: Tensor) -> Tensor:
    """The constant, replicated over the processes where the scores are a DTensor, which meets no plain tensor."""
    mesh = None if compiling() else getattr(scores, "device_mesh", None)
    if mesh is None or hasattr(constant, "device_mesh"):
        return constant
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(constant, mesh, [Replicate()] * mesh.ndim, run_check=False)


def can_record() -> bool:
    """Whether :func:`recording` is there."""
    return _excluded is not None and _autograd is not None


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Records a graph inside an operator of ours, where torch has switched that off.

    What it saves does not pass the caller's hooks: a checkpoint would compute its body once more for it.
    """
    with _excluded(_autograd, False), saved_tensors_hooks(lambda x: x, lambda x: x):  # type: ignore[misc]
        yield


def last_backward() -> bool:
    """Whether the running backward pass frees its graph, so that what was kept for it may be overwritten."""
    return not _graph_is_kept()


def standard_gamma(concentration: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws of Gamma(concentration, 1)."""
    drawn: Tensor = _gamma(concentration, generator=generator)
    return drawn


def operator(
    schema: str,
    run: Callable[..., Any],
    shapes: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
) -> None:
    """Defines ``torch.ops.lossbook.<name>`` once a process: a second import of the package keeps the first one's.

    ``shapes`` is ``run`` without values, ``setup`` keeps what ``backward`` needs.
    """
    name = schema.partition("(")[0]
    libraries = vars(torch.ops).setdefault("_of_lossbook", {})
    if name in libraries:
        return
    libraries[name] = library = torch.library.Library("lossbook", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(schema)  # type: ignore[no-untyped-call]
    library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"lossbook::{name}", shapes, lib=library)
    torch.library.register_autograd(f"lossbook::{name}", backward, setup_context=setup, lib=library)


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Switches autocast off for the operations inside."""
    try:
        return torch.autocast(device.type, enabled=False)
    except (RuntimeError, ValueError):  # a device without autocast
        return contextlib.nullcontext()
