"""The integral of EXACT: where its nodes lie, log Phi with its derivatives, the sweep of eager training.

Margins d come with the classes first, (C, ...); nodes come last, (..., nodes). All that multiplies a margin with a node
is of shape (C, ..., nodes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from lossbook._fast._function import LOG2_E, Formula, Kept, fused, scaled
from lossbook._fast._threads import each, slices
from lossbook._fast.softmax import softmax_rows
from lossbook._torch import readable

# A row is sure if the chances of its rivals, each alone against the target, sum to less than this.
_SURE = 0.5
# Right of -12 the normal density and tail are ordinary numbers in float32; left of it the rough hazard is a line.
_FAR = -12.0
# Newton steps to the mode where nobody may look whether it is reached; 300 000 classes took 11.
_STEPS = 12
# So many (class, row, node) triples are worked on at once: an eighth of all, but no less than keeps a core busy between
# two operators and no more than lies in cache.
_PIECE = {"cpu": (2**15, 2**16)}
_DEVICE_PIECE = (2**20, 2**24)
_TINY = 1e-37  # keeps a quotient of two zeros at zero in float32
_SQRT_2 = math.sqrt(2)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)
_LOG_SQRT_2PI = math.log(2 * math.pi) / 2

# erfcx(a / sqrt 2) / 2 = P(y) / (a + 4) with y = (a - 4) / (a + 4) in [-1, 1), for every a >= 0: the Chebyshev
# interpolants of degree 9 and 23 in powers of y. Their relative errors, 7e-8 and 3e-17, are below the dtype's rounding.
# fmt: off
_TAIL = {
    torch.float32: (
        0.755285127, -0.607896404, 0.387137563, -0.186526711, 0.0603952959, -0.00751223138, -0.00347616789,
        0.0015637869, 0.000129325681, -0.00015732057,
    ),
    torch.float64: (
        0.7552851304157514, -0.6078966419718923, 0.3871374007422266, -0.1865218579596366, 0.06039657489036092,
        -0.007540188967386312, -0.0034796923566515025, 0.0016308184674099085, 0.00013334420916014778,
        -0.00023109501736277426, -1.907676030719098e-06, 3.514511190283765e-05, 7.146021531267462e-07,
        -5.921611045923978e-06, -6.249551077565178e-07, 1.0247851016552774e-06, 2.647337281979868e-07,
        -1.597739614223922e-07, -7.878360342693638e-08, 1.7844927772981415e-08, 1.60673869573294e-08,
        -5.873626764987191e-10, -1.6886576966786735e-09, -1.1997782031253095e-10,
    ),
}
# fmt: on


# ------------------------------------------------------------------------------------------------------------- log Phi


def log_product(d: Tensor, z: Tensor) -> Tensor:
    """log prod Phi(z + d_i) at each node, exact in value and three derivatives; a fourth one is infinite or NaN.

    log Phi is its Taylor series at itself, so that its derivatives are not those of the polynomial.
    """
    x = d.unsqueeze(-1) + z
    at = x.detach()
    log_phi, h = _log_ndtr(at, _tail(at))
    e = _excess(at, h)
    step = x - at
    third = h * (e * e - 1 + h * e)
    series = log_phi + step * (h - step * (h * e / 2 - step * third / 6))
    u = d.sum(0)
    return series.sum(0) + (u - u.detach()).pow(3.5).unsqueeze(-1)  # 0 up to the third derivative


def _log_ndtr(
    x: Tensor, coefficients: Sequence[Tensor], room: Sequence[Tensor | None] = (None,) * 5
) -> tuple[Tensor, Tensor]:
    """log Phi(x) and the hazard h(x) = phi(x) / Phi(x), to rounding for every x; the coefficients are ``_tail``'s.

    ``room`` holds five tensors like ``x`` to work in, the last of which may be ``x`` itself; the results lie in two of
    them. Where pieces follow each other, that spares the allocator's handing every page back and forth.
    """
    r = torch.abs(x, out=room[0]).add_(4).reciprocal_()
    y = torch.sub(r, 0.125, out=room[1])
    tail = coefficients[0]
    for c in coefficients[1:]:
        tail = torch.addcmul(c, tail, y, out=room[2])
    tail.mul_(r)
    e = torch.clamp(x, min=0, out=room[1])
    e.mul_(e).mul_(-0.5 * LOG2_E).exp2_()
    tail.mul_(e)  # right of 0: 1 - Phi(x). Left of 0: Phi(x) e^(x^2/2), as e is 1 there
    below = torch.clamp(x, max=0, out=room[0])
    side = torch.sign(below, out=room[3])  # -1 left of 0, 0 right of it
    # log(1 - tail) on the right, log(tail) - x^2/2 on the left. log1p keeps a tail that 1 - tail would round away; the
    # factor, half a rounding short of -1, keeps a tail below 6e-8 from log 0.
    log_phi = torch.add(side, tail, out=room[4]).abs_().mul_(torch.finfo(e.dtype).eps / 2 - 1).log1p_()
    log_phi.sub_(below.mul_(below), alpha=0.5)
    phi = tail.sub_(side.add_(1)).abs_()  # 1 - tail on the right, tail on the left
    return log_phi, e.mul_(_INV_SQRT_2PI).div_(phi)


def _tail(like: Tensor) -> list[Tensor]:
    """Coefficients of the tail in powers of 1 / (a + 4) - 1 / 8, the highest first, as scalars on the device.

    As tensors they halve the passes of the polynomial; filled one by one, no device waits for a copy.
    """
    powers = [c * (-8) ** j for j, c in enumerate(_TAIL[like.dtype])]
    return [torch.full((), c, dtype=like.dtype, device=like.device) for c in reversed(powers)]


def _excess(x: Tensor, h: Tensor) -> Tensor:
    """x + h(x), by its continued fraction where that sum would cancel."""
    a = -x.clamp(max=-1)
    return torch.where(x < -50, 1 / (a + 2 / (a + 3 / (a + 4 / a))), x + h)


def _rough_hazard(x: Tensor, far: bool) -> tuple[Tensor, Tensor]:
    """h(x) and x + h(x), close enough to place nodes by; ``far`` if x may lie left of -12."""
    near = x.clamp(min=_FAR) if far else x
    h = (near * near).mul_(-0.5 * LOG2_E).exp2_().mul_(2 * _INV_SQRT_2PI).div_((near * -math.sqrt(0.5)).erfc_())
    if not far:
        return h, x + h
    beyond = near - x
    return h + beyond, (near + h) / (1 - beyond / _FAR)


# --------------------------------------------------------------------------------------------------------------- nodes


def place(d: Tensor, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes z (..., nodes), the logarithms of phi(z) times their step, and which rows are sure.

    The trapezoidal rule on them is for phi(z) times prod Phi(z + d_i), or in sure rows times 1 - prod Phi(z + d_i).
    """
    lowest = d.amin(0)
    # each rival alone: it wins with Phi(-d / sqrt 2)
    sure = torch.special.erfc(d * 0.5).sum(0) < 2 * _SURE
    if not readable(sure):
        some, every = True, False
    else:
        some, every = bool(sure.any()), bool(sure.all())
    grid = d.new_ones(nodes).cumsum(0).sub_(1).mul_(2 / (nodes - 1)).sub_(1)  # -1 to 1
    if every:
        z, step = _on_the_left(d, lowest, grid)
    else:
        z, step = _at_the_mode(d, lowest, grid)
        if some:
            pick = sure.unsqueeze(-1)
            left, left_step = _on_the_left(d, lowest.clamp(min=0), grid)
            z, step = torch.where(pick, left, z), torch.where(pick, left_step, step)
    return z, step.log_().sub_(z * z, alpha=0.5).sub_(_LOG_SQRT_2PI), sure


def _on_the_left(d: Tensor, lowest: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and steps for the error of a sure row, whose integrand lies around z = -lowest / 2 and left of it.

    Where very many rivals lose together, 1 - prod Phi falls steeply, within 1 / lambda around the z at which the
    hazards sum to their slope lambda. Nodes are dense there and sparse outside: z = centre + scale sinh(u).
    """
    nodes = grid.shape[-1]
    reach = min(math.sqrt(math.pi * (nodes - 1)), 6.5 if d.dtype == torch.float32 else 8.3)
    centre = -lowest
    for _ in range(3 if len(d) < 300 else 4):
        h, excess = _rough_hazard(d + centre, True)
        total = h.sum(0).clamp(min=_TINY)
        lam = (h.mul_(excess).sum(0) / total).clamp(min=0.1)
        centre = centre + torch.log(total / lam) / lam
    half = lowest / -2
    steep = centre > half - 2
    scale = torch.where(steep, 3 / lam, 1e3)
    centre = torch.maximum(torch.minimum(centre, torch.zeros_like(centre)), half)
    # phi(z) alone bounds the integrand, and from lowest = sqrt(2) reach on a Gaussian at -lowest / 2 does
    near = lowest < _SQRT_2 * reach
    left = torch.where(near, -torch.sqrt(lowest * lowest / 2 + reach * reach), half - reach / _SQRT_2)
    low = torch.asinh((left - centre) / scale)
    high = torch.asinh((half + reach / _SQRT_2 - centre) / scale)
    u = torch.lerp(low.unsqueeze(-1), high.unsqueeze(-1), (grid + 1) / 2)
    scale = scale.unsqueeze(-1)
    z = torch.sinh(u).mul_(scale).add_(centre.unsqueeze(-1))
    return z, torch.cosh(u).mul_(scale).mul_((high - low).unsqueeze(-1) / (nodes - 1))


def _at_the_mode(d: Tensor, lowest: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and steps around the mode of phi(z) prod Phi(z + d_i), whose logarithm is concave.

    The mode solves z = sum of h(z + d_i), whose right side falls and is convex: Newton's steps from the left never pass
    the mode.
    """
    nodes, looks = grid.shape[-1], readable(d)
    far = not looks or bool((lowest < _FAR).any())
    z = (lowest * -0.5).clamp(min=0)  # the mode for the nearest rival alone lies to the right of here
    for _ in range(_STEPS):
        h, excess = _rough_hazard(d + z, far)
        total, h = h.sum(0), h.mul_(excess)
        bend, h = h.sum(0), h.mul_(excess)
        lam = h.sum(0) / bend.clamp(min=_TINY)
        move = (total - z) / (1 + bend)
        z = z + move
        # what the next step would be, in units of the integrand's width
        if looks and not bool((lam * bend * move * move * torch.rsqrt(1 + bend) > 0.2).any()):
            break
    # Off the mode the hazards sum to a constant plus q e^(-lambda u): the two-point bound with these moments.
    bend = bend * torch.exp(-lam * move)
    reach = min(1.1 * math.sqrt(nodes), 5.7 if d.dtype == torch.float32 else 8.3)
    # The integrand falls by e^(-reach^2 / 2) from the mode to either end. To the right it falls by at least
    # u^2/2 (1 + bend / (1 + lambda u / 2)), solved for u from above.
    right = reach * torch.rsqrt(1 + bend / (1 + lam * (reach / 2)))
    right = reach * torch.rsqrt(1 + bend / (1 + lam * right / 2))
    # To the left by at least u^2/2 (1 + bend), and by u^2/2 - q u + q/lambda (e^(lambda u - u^2/2) - 1) as far as
    # u = lambda, as (log h)'' > -1; beyond that by the tangent, as the fall is convex.
    left = reach * torch.rsqrt(1 + bend)
    fall = reach * reach / 2
    rise = torch.log1p(lam * lam * fall / bend.clamp(min=_TINY) + bend / 2)
    root = lam * lam - 2 * rise
    near = 2 * rise / (lam + root.clamp(min=0).sqrt())
    q = bend / lam.clamp(min=_TINY)
    steep = lam + q * torch.expm1((lam * lam / 2).clamp(max=80))  # e^88 ends float32
    beyond = lam + (fall - lam * lam / 2 - (steep - lam) / lam.clamp(min=_TINY) + bend) / steep.clamp(min=_TINY)
    left = torch.minimum(left, torch.where(root > 0, near, beyond))
    # z = mode + scale (e^(beta u) - 1) meets both ends at u = -1 and 1; the trapezoidal rule in u
    beta = torch.log(right / left).clamp(min=0.01)
    scale = left / -torch.expm1(-beta)
    bu = beta.unsqueeze(-1) * grid
    x = torch.expm1(bu).mul_(scale.unsqueeze(-1)).add_(z.unsqueeze(-1))
    return x, bu.exp_().mul_((beta * scale * (2 / (nodes - 1))).unsqueeze(-1))


# --------------------------------------------------------------------------------------------------------------- sweep


def exact_rows(
    formula: Formula,
    margins: Callable[..., Tensor],
    lost: float,
    s: Tensor,
    t: Tensor,
    counted: Tensor,
    sigma: float,
    nodes: int,
    log: bool,
) -> Tensor:
    """``formula(s, t, counted, sigma, nodes, log)``: a sweep gives value and slope, and no node is kept.

    Rows with a margin of ``lost`` or less are lost.
    """
    sloped = s.requires_grad and torch.is_grad_enabled()
    return fused(formula, partial(_sweep, margins, lost, sloped), scaled, s, t, counted, sigma, nodes, log)


def _sweep(
    margins: Callable[..., Tensor],
    bound: float,
    sloped: bool,
    s: Tensor,
    t: Tensor,
    counted: Tensor,
    sigma: float,
    nodes: int,
    log: bool,
) -> tuple[Tensor, Kept]:
    """The loss of each row, and with ``sloped`` its gradient by the scores."""
    loss, slope = s.new_empty(t.shape), s.new_empty(s.shape if sloped else 0)
    classes = s.shape[-1]
    s, t, counted = s.reshape(-1, classes), t.reshape(-1), counted.reshape(-1)
    flat, by_class = loss.view(-1), slope.view(-1, classes)
    coefficients = _tail(s)

    def work(rows: slice, room: list[Tensor]) -> None:
        d_all = margins(s[rows], t[rows], counted[rows], sigma).contiguous()
        places = (*place(d_all, nodes), d_all.amin(0) <= bound)
        for i in _pieces(d_all.shape[1], classes * nodes, s.device):
            d, (z, log_w, sure, lost) = d_all[:, i], (x[i] for x in places)
            shape = (*d.shape, nodes)
            if not room or room[0].numel() < math.prod(shape):
                room[:] = (s.new_empty(math.prod(shape)) for _ in range(5))
            parts = [x[: math.prod(shape)].view(shape) for x in room]
            log_phi, h = _log_ndtr(torch.add(d.unsqueeze(-1), z, out=parts[4]), coefficients, parts)
            value, weight = _loss(log_phi.sum(0), log_w, sure, lost, log)
            here = slice(rows.start + i.start, rows.start + i.stop)
            flat[here] = value
            if sloped:
                # -dL/d d_i = sum of weight h(z + d_i)
                g = h.mul_(weight).sum(-1).div_(sigma)
                by_class[here] = g.mT.scatter_(1, t[here].unsqueeze(1), -g.sum(0).unsqueeze(1))

    threads = torch.get_num_threads() if s.numel() * nodes > 2**16 else 1
    each(s.device, _pieces(len(s), classes, s.device, threads), list[Tensor], work)
    return loss, (slope, counted.view(loss.shape))


def _loss(log_e: Tensor, log_w: Tensor, sure: Tensor, lost: Tensor, log: bool) -> tuple[Tensor, Tensor]:
    """The loss of each row from log prod Phi at its nodes, and the weights of the hazards in its slope."""
    g = log_e + log_w
    top = g.amax(-1).masked_fill_(sure, 0)
    weight = g.sub_(top.unsqueeze(-1)).exp_()  # P as a density in z, in units of e^top
    error = torch.expm1(log_e).mul_(log_w.exp_()).sum(-1).neg_().masked_fill_(~sure, 0)
    total = weight.sum(-1)
    if log:
        loss = 0 - torch.where(sure, torch.log1p(-error), total.log() + top)  # 0 - 0 is 0, -0 would print as such
        weight.div_(torch.where(sure, 1 - error, total).unsqueeze(-1))
        loss.masked_fill_(lost, math.inf)
    else:
        top = top.exp_().masked_fill_(lost, 0)
        loss = torch.where(sure, error, 1 - total * top)
        weight.mul_(top.unsqueeze(-1))
    return loss, weight.masked_fill_(lost.unsqueeze(-1), 0)


def _pieces(total: int, size: int, device: torch.device, threads: int = 1) -> list[slice]:
    """Slices of ``total`` rows of about one size, none with more numbers than a piece where a row takes ``size``."""
    low, high = _PIECE.get(device.type, _DEVICE_PIECE)
    most = max(1, min(max(total * size // 8, low), high) // size)
    return slices(device, total, min(most, math.ceil(total / threads))) if total else []


# ------------------------------------------------------------------------------------------------------- soft accuracy


def soft_accuracy_rows(formula: Formula, s: Tensor, t: Tensor, counted: Tensor | None) -> Tensor:
    """``formula(s, t, counted)``, the error 1 - p_t as the sum of the other classes' probabilities."""
    if s.shape[-1] == 1:  # right, whatever the score
        counted = torch.zeros_like(t, dtype=torch.bool)
    return softmax_rows(formula, lambda e, p_t, _: (e, p_t), s, t, counted, ("soft_accuracy_loss", {}))


def soft_target_rows(formula: Formula, s: Tensor, tau: Tensor) -> Tensor:
    """``formula(s, tau)``, the soft accuracy of soft targets."""
    return fused(formula, _blend, _blend_slope, s, tau)


def _blend(s: Tensor, tau: Tensor) -> tuple[Tensor, Kept]:
    """sum tau_c (1 - p_c); all p but the largest are at most 1/2, and its 1 - p is the sum of the others."""
    p = torch.softmax(s, -1)
    top = p.argmax(-1, keepdim=True)
    p_top, tau_top = p.gather(-1, top), tau.gather(-1, top)
    p.scatter_(-1, top, 0)
    own = tau_top * p.sum(-1, keepdim=True)
    loss = torch.addcmul(tau, p, tau, value=-1).scatter_(-1, top, own).sum(-1)
    others = torch.linalg.vecdot(p, tau).unsqueeze(-1)  # sum of p_c tau_c
    return loss, (p, p_top * (others - own), others + p_top * tau_top, top, tau)


def _blend_slope(g: Tensor, kept: Kept, spare: bool) -> Tensor:
    """p_i sum_j p_j (tau_j - tau_i), without j = i at the largest p."""
    p, own, mean, top, tau = kept
    g = g.unsqueeze(-1)
    return torch.addcmul(g * mean, tau, g, value=-1).mul_(p).scatter_(-1, top, g * own)
