"""Elementwise losses: value and slope of a piece of the scores at once, in buffers that the cache holds.

The slopes are kept and the backward pass multiplies them by what comes from above: the exponentials are taken once.
``steps`` of a loss are ``steps(s, t, loss, slope, a, b, c)``: scores and labels of a piece, two outputs, three buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lossbook._common import FAR
from lossbook._fast._function import Formula, Kept, fused
from lossbook._fast.softmax import softmax_rows, softmax_terms
from lossbook._torch import readable

Steps = Callable[..., None]

# e^z must not overflow: from here on log(1 + e^z) = z
HIGH = 80.0
# So many elements at once: five buffers of them stay in a core's cache, and an operator's call takes a hundredth.
PIECE = 2**17


def elementwise(formula: Formula, steps: Steps, s: Tensor, t: Tensor, count: float | Tensor | None) -> Tensor:
    """``formula(s, t)``, with ``count`` its sum over the count."""

    def whole(s: Tensor, t: Tensor) -> Tensor:
        loss = formula(s, t.to(s.dtype))
        return loss if count is None else loss.sum() / count

    def value(s: Tensor, t: Tensor) -> tuple[Tensor, Kept]:
        slopes = s.new_empty(s.shape) if wanted else None
        losses = s.new_empty(s.shape) if count is None else None
        total = s.new_zeros(())
        for s_part, t_part, loss, slope, *buffers in _pieces(s, t, losses, slopes):
            steps(s_part, t_part.to(s.dtype), loss, slope, *buffers)
            if losses is None:
                total += loss.sum()
        result = losses if losses is not None else total / count  # type: ignore[operator]
        return result, () if slopes is None else (slopes,)

    def slope(g: Tensor, kept: Kept, spare: bool) -> Tensor:
        (slopes,) = kept
        return torch.mul(slopes, g if count is None else g / count, out=slopes if spare else None)

    wanted = s.requires_grad and torch.is_grad_enabled()
    return fused(whole, value, slope, s, t)


def _pieces(s: Tensor, t: Tensor, loss: Tensor | None, slope: Tensor | None) -> Iterator[list[Tensor]]:
    """Scores, labels, losses, slopes and three buffers, whole rows of the last dimension at a time."""
    shape = (-1, s.shape[-1]) if s.dim() > 1 and s.numel() else (-1,)
    scores = s.reshape(shape)
    given = [scores, *(None if x is None else x.reshape(shape) for x in (t, loss, slope))]
    length = len(scores)
    size = max(length if s.numel() <= PIECE else PIECE * length // s.numel(), 1)
    missing = sum(x is None for x in given)
    buffers = scores.new_empty((3 + missing, min(size, length), *scores.shape[1:])).unbind(0)
    for start in range(0, length, size):
        n = min(size, length - start)
        rest = iter(buffers if n == size else [x.narrow(0, 0, n) for x in buffers])
        parts = given if n == length else [None if x is None else x.narrow(0, start, n) for x in given]
        yield [next(rest) if x is None else x for x in parts] + [*rest]


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
    return readable(t) and not bool(torch.addcmul(t, t, t, value=-1, out=buffer).amax() > 0)


def error_terms(s: Tensor, t: Tensor, l: Tensor, r: Tensor, sign: Tensor, q: Tensor) -> None:  # noqa: E741
    """For labels 0 and 1: l = log(1 + e^z), r = sigmoid(-z), q = sigmoid(z) with z = sign * s, sign = 1 - 2t."""
    torch.mul(t, -2, out=sign).add_(1)
    torch.mul(s, sign, out=q)
    above = not readable(q) or bool(q.amax() > HIGH)
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

    return steps


def balance(t: Tensor, alpha: float | Tensor, out: Tensor) -> Tensor:
    """alpha t + (1 - alpha) (1 - t)."""
    torch.sub(1, t, out=out).mul_(1 - alpha)
    return out.add_(t, alpha=alpha) if isinstance(alpha, float) else out.addcmul_(t, alpha)


def hard_truncated_steps(level: float) -> Steps:
    """Cross-entropy where the score is farther on the wrong side than ``level``, half of it exactly there."""

    def steps(s: Tensor, t: Tensor, loss: Tensor, slope: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
        error_terms(s, t, loss, c, a, slope)
        torch.mul(s, a, out=b).sub_(level).sign_().add_(1).mul_(0.5)
        loss.mul_(b)
        slope.mul_(b).mul_(a)

    return steps


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

    return steps


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

    return steps


# ---------------------------------------------------------------------------------------------------- one class of many


def softmax_focal(formula: Formula, s: Tensor, t: Tensor, counted: Tensor, gamma: float) -> Tensor:
    """``formula(s, t, counted)``, the focal loss of rows."""

    def row(e: Tensor, ce: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        weight = e**gamma
        return weight * ce, weight * (1 + gamma * p * (ce / e.clamp(min=torch.finfo(e.dtype).tiny)))

    return softmax_rows(formula, row, s, t, counted)


def soft_truncated_rows(formula: Formula, s: Tensor, t: Tensor, counted: Tensor, k: float) -> Tensor:
    """``formula(s, t, counted)``, the soft truncation of rows: one softmax of s and one of -k s."""

    def value(s: Tensor, t: Tensor, counted: Tensor) -> tuple[Tensor, Kept]:
        at = t.unsqueeze(-1)
        turned = s.gather(-1, at) - s  # subtracted first, so a common offset costs no digits
        if k != 1:
            turned.mul_(k).clamp_(-FAR, FAR)
        turned = torch.softmax(turned, -1)
        r = turned.gather(-1, at)
        rest = turned.scatter_(-1, at, 0).sum(-1, keepdim=True)
        p, _, e, ce = softmax_terms(s, at)
        # dL/ds_i = r p_i + k r ce turned_i, dL/ds_t = -r e - k r ce (1 - r)
        grad = p.mul_(r).addcmul_(turned, k * r * ce).scatter_(-1, at, -r * (e + k * ce * rest))
        loss = r.squeeze(-1) * ce.squeeze(-1)
        return loss.masked_fill_(~counted, 0), (grad, counted)

    def slope(g: Tensor, kept: Kept, spare: bool) -> Tensor:
        grad, counted = kept
        grad = torch.mul(grad, g.unsqueeze(-1), out=grad if spare else None)
        whole = readable(counted) and bool(counted.all())
        return grad if whole else grad.masked_fill_(~counted.unsqueeze(-1), 0)

    return fused(formula, value, slope, s, t, counted)


# --------------------------------------------------------------------------------------------------------- soft targets


def softmax_focal_soft(formula: Formula, s: Tensor, t: Tensor, gamma: float) -> Tensor:
    """``formula(s, t)``, the focal loss of every class weighed by ``t``."""

    def value(s: Tensor, t: Tensor) -> tuple[Tensor, Kept]:
        p, e, ce, top = _classes(s)
        weight = power(e, gamma, torch.empty_like(e)).mul_(t)
        loss = (weight * ce).sum(-1)
        tiny = torch.finfo(s.dtype).tiny
        h = ce.mul_(p).div_(e.clamp(min=tiny)).mul_(gamma).add_(1).mul_(weight)
        return loss, (_pull(h, p, e, top),)

    return fused(formula, value, _rows_slope, s, t)


def soft_truncated_soft(formula: Formula, s: Tensor, t: Tensor, k: float) -> Tensor:
    """``formula(s, t)``, the soft truncation of every class weighed by ``t``."""

    def value(s: Tensor, t: Tensor) -> tuple[Tensor, Kept]:
        p, e, ce, top = _classes(s)
        turned = (s.amax(-1, keepdim=True) - s).mul_(k).clamp_(-FAR, FAR)
        r, not_r, _, bottom = _classes(turned)
        a = t * r
        grad = _pull(a, p, e, top)
        b = a.mul_(ce)
        return b.sum(-1), (grad.add_(_pull(b, r, not_r, bottom), alpha=k),)

    return fused(formula, value, _rows_slope, s, t)


def _classes(s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p, 1 - p and -log p of every class without cancellation, and the top class."""
    top = s.argmax(-1, keepdim=True)
    p = torch.softmax(s, -1)
    best = p.gather(-1, top)
    rest = p.scatter_(-1, top, 0).sum(-1, keepdim=True)
    e = torch.sub(1, p).scatter_(-1, top, rest)
    least = torch.where(rest < 0.5, torch.log1p(-rest), best.log()).neg_()
    ce = (s.gather(-1, top) - s).sub_(best.log()).scatter_(-1, top, least)
    return p.scatter_(-1, top, best), e, ce, top


def _pull(h: Tensor, p: Tensor, e: Tensor, top: Tensor) -> Tensor:
    """p_i sum_(c != i) h_c - h_i (1 - p_i): what classes push that each hold h_c."""
    own = h.gather(-1, top)
    others = h.scatter_(-1, top, 0).sum(-1, keepdim=True)
    h.scatter_(-1, top, own)
    return (others + own - h).scatter_(-1, top, others).mul_(p).addcmul_(h, e, value=-1)


def _rows_slope(g: Tensor, kept: Kept, spare: bool) -> Tensor:
    (grad,) = kept
    return torch.mul(grad, g.unsqueeze(-1), out=grad if spare else None)
