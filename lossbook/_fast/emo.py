"""The earth mover losses of index targets in blocks that fit the cache, and on a linear layer a chunk at a time.

The gradient is at hand with the value, as ``p_i (c_i - L)`` needs nothing from later on: one array serves as products
of word vectors, costs and gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lossbook._checks import HALF
from lossbook._common import FAR, if_counted
from lossbook._fast._compiled import Step, compiled, left_out, one_step
from lossbook._fast._function import Formula, Kept, fused, scaled
from lossbook._fast._threads import each, slices
from lossbook._fast.softmax import cross_entropy
from lossbook._torch import batched, compiling, full_precision, last_backward, operator, plain, readable, transformed

# numbers worked on at once: a block that stays in the cache, room beside one chunk's scores, and the scores of a linear
# layer that are held whatever the size of a chunk
BLOCK, ROOM, SMALL = 2**17, 2**22, 3 * 2**19
# classes of a linear layer that are multiplied at once
TILE = 1024
# rows of a linear layer whose scores are held in float32
PIECE = 64


def emo_fast(
    formula: Formula, s: Tensor, target: Tensor, counted: Tensor | None, embedding: Tensor, with_ce: bool
) -> Tensor:
    """``formula(s, target, counted, embedding)``, by the fast road for index targets."""
    if target.is_floating_point():
        return formula(s, target, counted, embedding)
    if compiled(s, 2**19):
        step: Step = ("emo_ce_loss" if with_ce else "emo_loss", {})
        return one_step(step, s, left_out(target, counted), embedding, counted=counted)
    return fused(formula, partial(value, with_ce=with_ce), scaled, s, target, counted, embedding)


def value(
    s: Tensor, t: Tensor, counted: Tensor | None, embedding: Tensor, with_ce: bool, costs: Costs | None = None
) -> tuple[Tensor, Kept]:
    """The losses of rows and their gradients by the scores."""
    shape, classes = s.shape, s.shape[-1]
    few = s.dim() == 2 and max(s.numel(), embedding.numel()) <= BLOCK and 2 * classes > len(s)
    if few and costs is None:
        g = few_costs(embedding.to(s.dtype), t)
        loss = _block(s, t.unsqueeze(-1), g, None, with_ce).sum(-1)
    else:
        s, t = s.reshape(-1, classes), t.reshape(-1)
        costs = costs or Costs(embedding, s.dtype, len(s))
        g, loss = costs.begin(t), s.new_empty(shape[:-1])
        size = max(BLOCK // classes if s.device.type == "cpu" else len(s), 1)

        def work(rows: slice, room: Tensor) -> None:
            c, at = costs.end(g[rows], t[rows]), t[rows, None]
            loss.view(-1)[rows] = _block(s[rows], at, c, room[: len(c)], with_ce).squeeze(-1)

        each(s.device, slices(s.device, len(s), size), lambda: s.new_empty(min(size, len(s)), classes), work)
    if counted is not None:
        loss.masked_fill_(~counted, 0)
        g.masked_fill_(~counted.reshape(-1, 1), 0)
    return loss, (g.view(shape), counted)


def _block(s: Tensor, t: Tensor, c: Tensor, room: Tensor | None, with_ce: bool) -> Tensor:
    """The losses of some rows; ``c`` holds the costs and takes the gradient."""
    p = torch.softmax(s, -1, out=room)
    # from the cost of the most probable word: where p_m is next to 1, p_m (c_m - L) would cancel
    c_m = c.gather(-1, highest(p).unsqueeze(-1))
    more = torch.linalg.vecdot(p, c.sub_(c_m)).unsqueeze(-1)
    emo: Tensor = c_m + more
    if not with_ce:
        c.sub_(more).mul_(p)
        return emo
    p_t = p.gather(-1, t)
    rest = p.scatter_(-1, t, 0).sum(-1, keepdim=True)  # 1 - p_t without cancellation
    ce = cross_entropy(s, t, p, p_t, rest)
    ratio = (ce / emo).masked_fill_(emo <= 1e-30 * ce, 0)
    # p last: the ratio may be 1e30, but ratio * p_i * c_i <= CE
    c.sub_(more).mul_(ratio / 2).add_(0.5).mul_(p)
    c.scatter_(-1, t, (rest + ratio * emo * p_t) / -2)
    return ce


def highest(x: Tensor) -> Tensor:
    """The place of the largest number of each row; numpy finds it in a sixth of torch's time."""
    return torch.from_numpy(x.numpy().argmax(-1)) if readable(x) else x.argmax(-1)


def few_costs(embedding: Tensor, t: Tensor) -> Tensor:
    """1 - cos(e_i, e_t) of every word i, a row for each t."""
    unit = embedding * inverse_norms(embedding, embedding.dtype).unsqueeze(-1)
    c = torch.addmm(unit.new_ones(()), unit.index_select(0, t), unit.t(), alpha=-1)
    return torch.threshold_(c.scatter_(-1, t.unsqueeze(-1), 0), rounding(unit.dtype, unit.shape[1]), 0)


def rounding(dtype: torch.dtype, features: int) -> float:
    """What the cost of parallel vectors may come out at."""
    return float(4 * torch.finfo(dtype).eps * features**0.5)


class Costs:
    """1 - cos(e_i, e_t) of every word i, a row for each t; of all words at once where many rows ask for few words."""

    def __init__(self, embedding: Tensor, dtype: torch.dtype, rows: int) -> None:
        self.embedding, self.inverse = embedding, inverse_norms(embedding, dtype)
        self.rounding = rounding(dtype, embedding.shape[1])
        self.table: Tensor | None = None
        if 2 * len(embedding) <= rows:
            words = torch.arange(len(embedding), device=embedding.device)
            self.table = self.end(self.begin(words), words)

    def begin(self, t: Tensor) -> Tensor:
        """Room for the costs; where no table has them it holds <e_i, e_t> / |e_t|."""
        if self.table is not None:
            return self.inverse.new_empty(len(t), len(self.embedding))
        return products(self.embedding[t].to(self.inverse.dtype) * self.inverse[t].unsqueeze(-1), self.embedding)

    def end(self, out: Tensor, t: Tensor) -> Tensor:
        """The costs, in some rows of that room."""
        if self.table is not None:
            return torch.index_select(self.table, 0, t, out=out)
        torch.addcmul(out.new_ones(()), out, self.inverse, value=-1, out=out).scatter_(-1, t.unsqueeze(-1), 0)
        return F.threshold(out, self.rounding, 0, inplace=True)


def products(u: Tensor, embedding: Tensor) -> Tensor:
    """<e_i, u> of every word i, a row for each vector ``u``."""
    out, at = u.new_empty(len(u), len(embedding)), 0
    for e in _tiles(embedding, u.dtype):
        _scores(u, e, None, out[:, at : at + len(e)])
        at += len(e)
    return out


def inverse_norms(embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / |e_i|, shape ``(C,)``, and 0 for a row below the smallest normal number."""
    inverse = []
    for e in _tiles(embedding, dtype):
        norm = torch.linalg.vector_norm(e, dim=-1)
        low, high = (bound.item() for bound in torch.aminmax(norm)) if readable(norm) else (0, 0)
        if not (low > 1e-12 and high < 1e15):
            # by the largest number first: the squares of others leave float32
            largest = e.abs().amax(-1).clamp(min=torch.finfo(dtype).tiny)
            norm = torch.linalg.vector_norm(e / largest.unsqueeze(-1), dim=-1)
            norm = torch.where(norm < 1, torch.inf, norm * largest)
        inverse.append(norm.reciprocal_())
    return inverse[0] if len(inverse) == 1 else torch.cat(inverse)


def _scores(h: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> None:
    """``out = h @ w.T + b``; of few rows by some classes at a time, which a CPU multiplies faster."""
    size = TILE if h.device.type == "cpu" and len(h) < 128 else len(w)
    for i in range(0, len(w), size or 1):
        some, w_t = slice(i, i + size), w[i : i + size].t()
        _ = torch.mm(h, w_t, out=out[:, some]) if b is None else torch.addmm(b[some], h, w_t, out=out[:, some])


def _tiles(embedding: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The word vectors in this dtype; where that takes a copy, a few at a time."""
    size = max(len(embedding) if embedding.dtype == dtype else ROOM // embedding.shape[1], 1)
    for i in range(0, len(embedding), size):
        yield embedding[i : i + size].to(dtype)


# ---------------------------------------------------------------------------------------------------- the linear layer
# An operator of torch's, so that torch.compile and torch.export take it as one step for any number of rows.


def linear_emo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    counted: Tensor | None,
    embedding: Tensor,
    rows: bool,
    options: tuple[Any, ...],
) -> Tensor:
    """The loss of each row, or unless ``rows`` perhaps their sum."""
    from lossbook.emo import linear_rows

    hidden, counted = hidden.reshape(-1, hidden.shape[-1]), None if counted is None else counted.reshape(-1)
    soft, eager = target.is_floating_point(), plain(hidden, weight, bias, target, embedding)
    held = SMALL // len(weight)  # rows
    if eager and len(hidden) <= held and hidden.dtype == weight.dtype == options[5] not in HALF:
        return _at_once(hidden, weight, bias, target, counted, embedding, *options)
    if counted is None:
        counted = target.new_ones(target.shape[:1], dtype=torch.bool)
    arguments = (hidden, weight, bias, target, counted, embedding)
    if eager and not soft:
        options = (*options[:3], max(options[3], held), *options[4:])
    if soft and eager:
        losses: list[Tensor] = []
        for at in chunks_of(len(hidden), options[3]) or [slice(0)]:
            few = (hidden[at], weight, bias, target[at], counted[at], embedding)
            # computed a second time for the gradient
            losses.append(checkpoint(linear_rows, *few, *options, use_reentrant=False, preserve_rng_state=False))
        return torch.cat(losses)
    if soft or not (eager or (compiling() and not transformed())):
        return linear_rows(*arguments, *options)
    graph = torch.is_grad_enabled() and not rows
    wanted = [graph and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss: Tensor = torch.ops.lossbook.linear_emo(*arguments, None, wanted, rows, *options)[0]
    return loss


def _at_once(
    h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, counted: Tensor | None, embedding: Tensor, *options: Any
) -> Tensor:
    """The loss of each row, with the scores of all of them, which take little memory."""
    from lossbook.emo import emo_ce_rows, emo_rows

    with_ce, scale, softcap = options[:3]
    with full_precision(h.device):
        s = linear_scores(h, w, b, counted, scale, softcap, w.dtype)
        return emo_fast(emo_ce_rows if with_ce else emo_rows, s, target, counted, embedding, with_ce=with_ce)


def linear_scores(
    h: Tensor,
    w: Tensor,
    b: Tensor | None,
    counted: Tensor | None,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """The scores of the layer, of all rows at once."""
    h = if_counted(h, counted).to(dtype)  # an ignored row may hold NaN
    s = F.linear(h, w.to(dtype), None if b is None else b.to(dtype)).to(torch.promote_types(dtype, torch.float32))
    s = s if scale == 1 else s * scale
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def chunks_of(rows: int, most: int) -> list[slice]:
    """As few chunks as possible, equal to one row."""
    size = -(-rows // max(-(-rows // most), 1))
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size or 1)]


Out = tuple[Tensor, Tensor, Tensor, Tensor]


def room_of(hidden: Tensor, weight: Tensor, wanted: Sequence[bool], rows: bool, wide: bool) -> Out:
    """What the operator returns: the losses and the gradients of hidden, weight and bias, empty where not wanted."""
    high = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else torch.float32
    sums = high if wide else weight.dtype
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    grads = [
        hidden.new_zeros(shape if want else (0,), dtype=dtype)
        for shape, want, dtype in zip(shapes, wanted, (hidden.dtype, sums, high))  # noqa: B905 - torch 2.6 traces no strict
    ]
    return (hidden.new_zeros(hidden.shape[:1] if rows else (), dtype=high), grads[0], grads[1], grads[2])


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    counted: Tensor,
    embedding: Tensor,
    upstream: Tensor | None,
    wanted: Sequence[bool],
    rows: bool,
    with_ce: bool,
    scale: float,
    softcap: float | None,
    chunk_size: int,
    wide: bool,
    dtype: torch.dtype,
) -> Out:
    """Losses and gradients. ``dtype`` is that of the scores; ``upstream`` weighs the rows' gradients."""
    out, chunks = room_of(hidden, weight, wanted, rows, wide), chunks_of(len(hidden), chunk_size)
    with torch.no_grad(), full_precision(hidden.device):
        costs = Costs(embedding, out[0].dtype, min(chunks[0].stop if chunks else 0, 2048))

        def rows_of(x: Tensor, at: slice, counted: Tensor | None) -> tuple[Tensor, Tensor]:
            losses, (g, _) = value(x, target[at], counted, embedding, with_ce, costs)
            return losses, g

        piece = max(ROOM // len(weight), PIECE)
        layer = (hidden, weight, bias, counted, upstream, wanted, scale, softcap, dtype)
        by_chunks(out, rows_of, chunks, piece, *layer)
    return out


def by_chunks(
    out: Out,
    rows_of: Callable[[Tensor, slice, Tensor | None], tuple[Tensor, Tensor]],
    chunks: list[slice],
    piece: int,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    counted: Tensor,
    upstream: Tensor | None,
    wanted: Sequence[bool],
    scale: float,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    """Fill ``out``. ``rows_of`` takes the scores of at most ``piece`` rows, which ones they are, and which of them
    count, None for all; it returns their losses and the gradients by the scores, and may overwrite these.
    """
    loss, grad_h, grad_w, grad_b = out
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    room = w.new_empty(chunks[0].stop if chunks else 0, len(w))
    whole = readable(counted) and bool(counted.all())
    if upstream is not None:
        upstream = upstream.masked_fill(~counted, 0)  # there it may be NaN
    for at in chunks:
        h = hidden[at].to(dtype)
        if not whole:
            h = h.masked_fill(~counted[at].unsqueeze(-1), 0)  # an ignored row may hold NaN
        s = room[: len(h)]
        _scores(h, w, b, s)
        for j in range(0, len(h), piece):
            few, these = slice(j, j + piece), slice(at.start + j, min(at.start + j + piece, at.stop))
            x, slope = _capped(s[few].to(loss.dtype), scale, softcap)
            losses, g = rows_of(x, these, None if whole else counted[these])
            if loss.dim() == 1:
                loss[these] = losses
            else:
                loss += losses.sum()
            if any(wanted):
                if slope is not None:
                    g.mul_(slope)
                if upstream is not None:
                    g.mul_(upstream[these].unsqueeze(-1))
                if scale != 1:
                    g.mul_(scale)
                if wanted[2]:
                    grad_b += g.sum(0)
                s[few] = g
            del x, slope, g  # before the next ones are made
        if wanted[0]:
            grad_h[at] = s @ w
        if wanted[1]:
            _add_product(grad_w, s, h)


def _capped(x: Tensor, scale: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """The scores of the layer, and the derivative of the cap; in place."""
    if scale != 1:
        x.mul_(scale)
    if softcap is None:
        return x.clamp_(-FAR, FAR), None
    x.div_(softcap).tanh_()
    return x * softcap, x.square_().neg_().add_(1)


def _add_product(total: Tensor, g: Tensor, h: Tensor) -> None:
    """``total += g.T @ h``; where the dtypes differ, a few classes at a time."""
    if total.dtype == g.dtype:
        total.addmm_(g.t(), h)
        return
    # bfloat16 is added up in float32 within a product already; float16 would overflow from 65504 on
    dtype = total.dtype if g.dtype == torch.float16 else g.dtype
    size = max(ROOM // h.shape[1], 1)
    h = h.to(dtype)
    for i in range(0, len(total), size):
        total[i : i + size].add_(g[:, i : i + size].to(dtype).t() @ h)


def _shapes(hidden: Tensor, weight: Tensor, *rest: Any) -> Out:
    wanted, rows, wide = rest[5], rest[6], rest[11]
    return room_of(hidden, weight, wanted, rows, wide)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # zeros for the gradients of gradients would be as large as these
    *tensors, ctx.upstream, _, ctx.rows = inputs[:9]
    ctx.options = inputs[9:]
    ctx.save_for_backward(*tensors, *output[1:])


def _backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, grad_h, grad_w, grad_b = ctx.saved_tensors
    layer, need = tensors[:3], ctx.needs_input_grad[:3]
    if g is None:
        return (None,) * 15
    if torch.is_grad_enabled() or (ctx.rows and batched(g)):
        from lossbook.emo import linear_rows

        with torch.enable_grad():
            loss = linear_rows(*tensors, *ctx.options)
            wanted = [x for x, n in zip(layer, need) if n]  # noqa: B905
            found = iter(
                torch.autograd.grad(loss if ctx.rows else loss.sum(), wanted, g, create_graph=torch.is_grad_enabled())
            )
        return (*(next(found) if n else None for n in need), *[None] * 12)
    grads = [grad_h, grad_w, grad_b]
    if ctx.rows:
        _, *grads = torch.ops.lossbook.linear_emo(*tensors, g, list(need), True, *ctx.options)
    else:
        spare = plain(g) and last_backward()
        grads = [x.mul_(g) if spare else x * g for x in grads]
    return (*(x.to(y.dtype) if n else None for x, y, n in zip(grads, layer, need)), *[None] * 12)  # noqa: B905


operator(
    "linear_emo(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor counted, Tensor embedding, "
    "Tensor? upstream, bool[] wanted, bool rows, bool with_ce, float scale, float? softcap, int chunk_size, bool wide, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _shapes,
    _setup,
    _backward,
)
