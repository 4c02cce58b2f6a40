"""Elementwise losses: value and slope of a piece of the scores at once, in buffers that the cache holds.

The slopes are kept and the backward pass multiplies them by what comes from above: the exponentials are taken once.
``steps`` of a loss are ``steps(s, t, loss, slope, a, b, c)``: scores and labels of a piece, two outputs, three buffers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lossbook._common import FAR
from lossbook._fast._compiled import Step, compiled, left_out, one_step
from lossbook._fast._function import Formula, Kept, Value, clear, fused, scaled
from lossbook._fast._threads import each, numbers, slices
from lossbook._fast.softmax import cross_entropy, exponentials, softmax_rows

# the work on a piece, and what a compiler takes for all of it
Steps = tuple[Callable[..., None], Step | None]

# e^z must not overflow: from here on log(1 + e^z) = z
HIGH = 80.0


def elementwise(formula: Formula, steps: Steps, s: Tensor, t: Tensor, count: float | Tensor | None) -> Tensor:
    """``formula(s, t)``, with ``count`` its sum over the count."""
    work, step = steps

    def whole(s: Tensor, t: Tensor) -> Tensor:
        loss = formula(s, t.to(s.dtype))
        return loss if count is None else loss.sum() / count

    def value(s: Tensor, t: Tensor) -> tuple[Tensor, Kept]:
        if 0 < s.numel() <= numbers(s.device):
            loss, slope, *buffers = (torch.empty_like(s) for _ in range(5))
            work(s, t.to(s.dtype), loss, slope, *buffers)
            return loss if count is None else loss.sum() / count, (slope,)
        kept = s.new_empty(s.shape) if wanted else None
        losses = s.new_empty(s.shape) if count is None else None
        sums = _in_pieces(work, s, t, losses, kept)
        return sums.sum() / count if losses is None else losses, (kept,)  # type: ignore[operator]

    def slope(g: Tensor, kept: Kept, spare: bool) -> Tensor:
        (slopes,) = kept
        return torch.mul(slopes, g if count is None else g / count, out=slopes if spare else None)

    if step and compiled(s):
        losses = one_step(step, s, t, rows=False)
        return losses if count is None else losses.sum() / count
    wanted = s.requires_grad and torch.is_grad_enabled()
    return fused(whole, value, slope, s, t)


def _in_pieces(steps: Callable[..., None], s: Tensor, t: Tensor, loss: Tensor | None, slope: Tensor | None) -> Tensor:
    """The sum of the losses of each piece, some rows of the last dimension; losses and slopes where there is room."""
    shape = (-1, s.shape[-1]) if s.dim() > 1 and s.numel() else (-1,)
    given = [None if x is None else x.reshape(shape) for x in (s, t, loss, slope)]
    rows, width = s.numel() // shape[-1] if len(shape) > 1 else s.numel(), shape[1:]
    size = max(numbers(s.device) * rows // max(s.numel(), 1), 1)
    parts = slices(s.device, rows, size)
    sums = s.new_zeros(len(parts))

    def begin() -> tuple[Tensor, ...]:
        return s.new_empty((3 + given.count(None), min(size, rows), *width)).unbind(0)

    def work(piece: tuple[int, slice], room: tuple[Tensor, ...]) -> None:
        i, part = piece
        rest = (x.narrow(0, 0, part.stop - part.start) for x in room)
        s, t, loss, slope = (next(rest) if x is None else x[part] for x in given)
        steps(s, t.to(s.dtype), loss, slope, *rest)
        sums[i] = loss.sum()

    each(s.device, enumerate(parts), begin, work)
    return sums


def power(x: Tensor, exponent: float, out: Tensor) -> Tensor:
    """``x ** exponent`` in ``out``, another tensor; torch's own is quick for 0, 1/2, 1, 2 and 3 only."""
    if exponent == 4:
        torch.mul(x, x, out=out)
        return out.mul_(out)
    if exponent == 1.5:
        return torch.sqrt(x, out=out).mul_(x)
    return torch.pow(x, exponent, out=out)


def hard(t: Tensor, buffer: Tensor) -> bool:
    """Whether labels in [0, 1] are all 0 or 1, as far as that can be looked at."""
    return t.is_cpu and torch.addcmul(t, t, t, value=-1, out=buffer).amax().item() == 0


def error_terms(s: Tensor, t: Tensor, l: Tensor, r: Tensor, sign: Tensor, q: Tensor) -> None:  # noqa: E741
    """For labels 0 and 1: l = log(1 + e^z), r = sigmoid(-z), q = sigmoid(z) with z = sign * s, sign = 1 - 2t."""
    torch.sub(1, t, alpha=2, out=sign)
    torch.mul(s, sign, out=q)
    above = not q.is_cpu or q.amax().item() > HIGH
    if above:
        torch.sub(q, HIGH, out=r).relu_()
        q.clamp_(max=HIGH)
    torch.log1p(q.exp_(), out=l)
    if above:
        l.add_(r)
    torch.add(q, 1, out=r).reciprocal_()
    q.mul_(r)


def probabilities(s: Tensor, p: Tensor, n: Tensor, l: Tensor) -> None:  # noqa: E741
    """p = sigmoid(s), n = sigmoid(-s) = 1 - p, l = log(1 + e^-|s|)."""
    torch.sigmoid(s, out=p)
    torch.sigmoid(torch.neg(s, out=n), out=n)
    torch.minimum(p, n, out=l).neg_().log1p_().neg_()


def focal_steps(gamma: float, alpha: float | Tensor | None) -> Steps:
    """Focal loss of independent labels."""

    def steps(s: Tensor, t: Tensor, loss: Tensor, slope: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
        if hard(t, a):
            error_terms(s, t, loss, slope, a, b)
            # L = q^gamma l, dL/dz = q^gamma (q + gamma (1 - q) l)
            slope.mul_(loss).mul_(gamma).add_(b)
            weight = power(b, gamma, out=c)
            if alpha is not None:
                weight.mul_(balance(t, alpha, b))
            loss.mul_(weight)
            slope.mul_(weight).mul_(a)
        else:
            soft(s, t, loss, slope, a, b, c)

    def soft(s: Tensor, t: Tensor, loss: Tensor, slope: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
        """With o = 1 - t, n = 1 - p: bce = t softplus(-s) + o softplus(s), 1 - p_t = p o + n t, bce' = p o - n t."""
        o = torch.sub(1, t, out=a)
        probabilities(s, b, c, loss)
        loss.addcmul_(torch.relu(s), o).addcmul_(torch.relu(-s), t)
        torch.mul(b, c, out=slope)
        b.mul_(o)
        c.mul_(t)
        o.sub_(t).mul_(slope)  # the derivative of the error, (1 - 2t) p n
        torch.sub(b, c, out=slope)
        error = b.add_(c)
        a.div_(torch.clamp(error, min=torch.finfo(s.dtype).tiny, out=c))
        slope.addcmul_(a, loss, value=gamma)
        weight = power(error, gamma, out=c)
        if alpha is not None:
            weight.mul_(balance(t, alpha, a))
        loss.mul_(weight)
        slope.mul_(weight)

    return steps, None


def balance(t: Tensor, alpha: float | Tensor, out: Tensor) -> Tensor:
    """alpha t + (1 - alpha) (1 - t)."""
    torch.sub(1, t, out=out).mul_(1 - alpha)
    return out.add_(t, alpha=alpha) if isinstance(alpha, float) else out.addcmul_(t, alpha)


def hard_truncated_steps(level: float) -> Steps:
    """Cross-entropy where the score is farther on the wrong side than ``level``, half of it exactly there."""

    def steps(s: Tensor, t: Tensor, loss: Tensor, slope: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
        error_terms(s, t, loss, c, a, slope)
        weight = torch.mul(s, a, out=c).sub_(level).sign_().add_(1).mul_(0.5)
        loss.mul_(weight)
        slope.mul_(weight).mul_(a)

    return steps, None


def soft_truncated_steps(k: float) -> Steps:
    """Cross-entropy times sigmoid(k z)."""

    def steps(s: Tensor, t: Tensor, loss: Tensor, slope: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
        error_terms(s, t, loss, slope, a, b)
        # L = w l, dL/dz = w (q + k (1 - w) l)
        if k == 1:
            weight = b
        else:
            weight = torch.mul(s, a, out=c).mul_(k)
            torch.sigmoid(torch.neg(weight, out=slope), out=slope)
            weight.sigmoid_()
        slope.mul_(loss).mul_(k).add_(b)
        loss.mul_(weight)
        slope.mul_(weight).mul_(a)

    return steps, ("soft_truncated_bce", {"sharpness": k})


def asymmetric_steps(
    gamma_neg: float, gamma_pos: float, clip: float, level: tuple[float, float], detach_weight: bool
) -> Steps:
    """Asymmetric loss; ``level`` is the score of the clip in two parts, as in the formula."""

    def steps(s: Tensor, t: Tensor, loss: Tensor, slope: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
        p, n, q, rest, weight, push = slope, a, b, c, torch.empty_like(a), torch.empty_like(a)
        probabilities(s, p, n, loss)
        # negatives: w = q^gamma (1 - t), their slope is w p n (1 / (1 - q) - gamma log(1 - q) / q)
        if clip:
            torch.sub(s, level[0], out=q).sub_(level[1]).relu_().neg_().expm1_().mul_(p).mul_(clip - 1)
            torch.add(n, clip, out=push)
            torch.mul(push, 2, out=rest).clamp_(max=1).log_()
            rest.add_(torch.clamp(q, max=0.5, out=weight).neg_().log1p_()).neg_()
            torch.sign(q, out=weight) if gamma_neg == 0 else power(q, gamma_neg, weight)
            push.reciprocal_()
            if not detach_weight:
                push.addcdiv_(rest, q.clamp_(min=torch.finfo(s.dtype).tiny), value=gamma_neg)
            push.mul_(p).mul_(n)
        else:  # q = p
            torch.clamp(s, min=0, out=rest).add_(loss)
            torch.mul(n, rest, out=push).mul_(0 if detach_weight else gamma_neg).add_(p)
            power(p, gamma_neg, weight)
        weight.mul_(torch.sub(1, t, out=q))
        push.mul_(weight)
        weight.mul_(rest)
        # positives: w = n^gamma t, their slope is -w (n - gamma p log p)
        loss.add_(torch.neg(s, out=q).clamp_(min=0))
        power(n, gamma_pos, rest).mul_(t)
        if not detach_weight:
            n.addcmul_(p, loss, value=gamma_pos)
        torch.addcmul(push, n, rest, value=-1, out=slope)
        loss.mul_(rest).add_(weight)

    if detach_weight:
        return steps, None
    return steps, ("asymmetric_loss", {"gamma_neg": gamma_neg, "gamma_pos": gamma_pos, "clip": clip})


# ---------------------------------------------------------------------------------------------------- one class of many


def softmax_focal(formula: Formula, s: Tensor, t: Tensor, counted: Tensor | None, gamma: float) -> Tensor:
    """``formula(s, t, counted)``, the focal loss of rows."""

    def row(e: Tensor, p_t: Tensor, cross_entropy: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        ce = cross_entropy()
        weight, push = _focal(e, p_t * ce, gamma)
        return weight * ce, push

    return softmax_rows(formula, row, s, t, counted, ("softmax_focal_loss", {"gamma": gamma}))


def _focal(e: Tensor, p_ce: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """e^gamma, and e^gamma + gamma e^(gamma - 1) p ce, the slope over e."""
    lower = e if gamma >= 1 else e.clamp(min=torch.finfo(e.dtype).tiny)
    lower = lower if gamma == 2 else lower ** (gamma - 1)
    weight = lower * e
    return weight, torch.addcmul(weight, lower, p_ce, value=gamma)


def soft_truncated_rows(formula: Formula, s: Tensor, t: Tensor, counted: Tensor | None, k: float) -> Tensor:
    """``formula(s, t, counted)``, the soft truncation of rows: one softmax of s and one of -k s."""

    def value(s: Tensor, t: Tensor, counted: Tensor | None) -> tuple[Tensor, Kept]:
        at = t.unsqueeze(-1)
        x, own, rest = exponentials(s, at)
        turned, r, not_r = exponentials(s, at, -k)
        unit = 1 / (r + not_r)
        r = r * unit
        loss = r * cross_entropy(s, at, x, own, rest)
        # dL/ds_i = r p_i + k r ce turned_i, dL/ds_t = -r e - k r ce (1 - r)
        pull, push = r.div_(own + rest), unit.mul_(loss).mul_(k)
        own = torch.addcmul(pull * rest, push, not_r).neg_()
        grad = x.mul_(pull.unsqueeze(-1)).addcmul_(turned, push.unsqueeze(-1)).scatter_(-1, at, own.unsqueeze(-1))
        clear(counted, loss, grad)
        return loss, (grad, counted)

    if compiled(s):
        step = "soft_truncated_cross_entropy", {"sharpness": k}
        return one_step(step, s, left_out(t, counted), counted=counted)
    return fused(formula, value, scaled, s, t, counted)


# --------------------------------------------------------------------------------------------------------- soft targets


def softmax_focal_soft(formula: Formula, s: Tensor, t: Tensor, gamma: float) -> Tensor:
    """``formula(s, t)``, the focal loss of every class weighed by ``t``."""

    def value(s: Tensor, t: Tensor) -> tuple[Tensor, Kept]:
        d = s - s.amax(-1, keepdim=True)
        p = torch.softmax(d, -1)
        sure, rest = _sure(p)
        e = torch.sub(1, p).scatter_(-1, sure, rest)
        ce = _cross_entropy(d, p, rest)
        weight, push = _focal(e, p * ce, gamma)
        return weight.mul_(ce).mul_(t).sum(-1), (_pull(push.mul_(t), p, sure, rest), None)

    return fused(formula, _by_rows(value), scaled, s, t)


def soft_truncated_soft(formula: Formula, s: Tensor, t: Tensor, k: float) -> Tensor:
    """``formula(s, t)``, the soft truncation of every class weighed by ``t``."""

    def value(s: Tensor, t: Tensor) -> tuple[Tensor, Kept]:
        d = s - s.amax(-1, keepdim=True)
        turned = d * -k
        p, r = torch.softmax(d, -1), torch.softmax(turned if s.is_cpu else turned.clamp_(-FAR, FAR), -1)
        sure, rest = _sure(p)
        a = t * r
        b = a * _cross_entropy(d, p, rest)
        loss = b.sum(-1)
        grad = _pull(a, p, sure, rest)
        return loss, (grad.add_(_pull(b, r, *_sure(r)), alpha=k), None)

    return fused(formula, _by_rows(value), scaled, s, t)


def _by_rows(value: Value) -> Value:
    """``value``, the losses and the gradient of rows, of a few rows at a time."""

    def pieces(s: Tensor, t: Tensor) -> tuple[Tensor, Kept]:
        if s.numel() <= numbers(s.device):
            return value(s, t)
        rows, targets = s.reshape(-1, s.shape[-1]), t.reshape(-1, s.shape[-1])
        loss, grad = s.new_empty(s.shape[:-1]), torch.empty_like(rows)

        def work(part: slice, room: None) -> None:
            loss.view(-1)[part], (grad[part], _) = value(rows[part], targets[part])

        each(s.device, slices(s.device, len(rows), max(numbers(s.device) // s.shape[-1], 1)), lambda: None, work)
        return loss, (grad.view(s.shape), None)

    return pieces


def _sure(p: Tensor) -> tuple[Tensor, Tensor]:
    """The class with a probability above 1/2, else the first one; and its 1 - p, the sum of the others."""
    if p.is_cpu:  # argmax takes twice as long as a softmax there
        mark = torch.threshold(p, 0.5, 0.0).ceil_()
        number = mark.mul_(torch.arange(p.shape[-1], dtype=p.dtype, device=p.device)).sum(-1, keepdim=True)
        sure = number.nan_to_num_().long()
    else:
        sure = p.argmax(-1, keepdim=True)
    best = p.gather(-1, sure)
    rest = p.scatter_(-1, sure, 0).sum(-1, keepdim=True)
    p.scatter_(-1, sure, best)
    return sure, rest


def _cross_entropy(d: Tensor, p: Tensor, rest: Tensor) -> Tensor:
    """-log p of every class, in place of the scores below the highest one."""
    least = torch.where(rest < 0.5, torch.log1p(-rest), p.amax(-1, keepdim=True).log_())
    return d.neg_().sub_(least)


def _pull(h: Tensor, p: Tensor, sure: Tensor, rest: Tensor) -> Tensor:
    """What classes push that each hold h_c: p_i sum_c h_c - h_i, at the sure class without cancellation."""
    own, best = h.gather(-1, sure), p.gather(-1, sure)
    others = h.scatter_(-1, sure, 0).sum(-1, keepdim=True)
    return p.mul_(others + own).sub_(h).scatter_(-1, sure, best * others - own * rest)
