"""Every loss right to the last digits: value, gradient and second derivative beside arithmetic of 250 digits.

The bound is 4 units in the last place of the dtype, times the conditioning: how far the right answer moves when each
score is changed in its last place. A Hessian entry is a difference such as q - q^2, so it is also allowed 4 units in
the last place of the gradient. Scores reach 100 in size; rows are ordinary, sure and hopeless.
"""

from __future__ import annotations

import functools

import mpmath as mp
import pytest
import torch

import lossbook
from tests import jets
from tests.jets import exp, log, power, sigmoid, softmax

ROWS = [
    [0.3, -1.2, 0.8, 2.0, -0.5],
    [18.0, 0.0, -1.0, 0.5, -3.0],
    [0.5, 0.0, 18.0, -17.0, 1.0],
    [50.0, 0.0, 1.0, -2.0, 3.0],
    [-50.0, 1.0, 0.0, 2.0, -3.0],
    [100.0, -100.0, -60.0, 30.0, 99.0],
    [-100.0, 100.0, 60.0, -30.0, -99.0],
    [0.0, 0.0, 0.0, 0.0, 0.0],
    [12.0, 12.0, -12.0, 6.0, 11.0],
    [0.0, 17.0, -20.0, -40.0, -80.0],
]
V = [0.7, -1.3, 0.4, 1.1, -0.6]
HARD = [1, 0, 0, 1, 0]
SOFT = [0.875, 0.0625, 0.0, 1.0, 0.5]  # every dtype holds them
TAU = [0.5, 0.125, 0.0, 0.375, 0.0]
OTHER = [0.5, -17.0, 0.25, 60.0, 0.0]
WORDS = [[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0], [0.0, 1.0], [0.8, -0.6]]  # their squares are 1


def both_sides(s, t):
    """The multi-label softmax loss."""
    return log(1 + sum((1 - w) * exp(x) for x, w in zip(s, t, strict=True))) + log(
        1 + sum(w * exp(-x) for x, w in zip(s, t, strict=True))
    )


def binary(f):
    """A sum over labels of f(score, label) as a loss of rows: a single label is the row's first score."""
    return lambda s, t=1: f(s[0], t)


def focal(s, t, gamma, alpha=None):
    p, t = sigmoid(s), mp.mpf(t)
    weight = 1 if alpha is None else alpha * t + (1 - alpha) * (1 - t)
    return weight * power(p * (1 - t) + (1 - p) * t, gamma) * (-t * log(p) - (1 - t) * log(1 - p))


def asymmetric(s, t, gamma_neg, gamma_pos, clip):
    p, t = sigmoid(s), mp.mpf(t)
    positive = -1 * power(1 - p, gamma_pos) * log(p)
    q = p - clip
    negative = -1 * power(q, gamma_neg) * log(1 - q) if q.parts[0] > 0 else jets.jet(0)
    return t * positive + (1 - t) * negative


def subset(s, positives):
    from itertools import combinations

    k = len(positives)
    return log(sum(exp(sum((s[i] for i in chosen), jets.jet(0))) for chosen in combinations(range(len(s)), k))) - sum(
        (s[i] for i in positives), jets.jet(0)
    )


def costs(t):
    return [1 - sum(mp.mpf(a) * mp.mpf(b) for a, b in zip(w, WORDS[t], strict=True)) for w in WORDS]


def tensor(values, s):
    return torch.tensor(values, dtype=s.dtype).expand(s.shape)


def index(t, s):
    return torch.full(s.shape[:-1], t)


def one(s):
    return s[..., 0]


none = {"reduction": "none"}
L = lossbook
# name: the loss of the rows (..., 5), and the same of one row of jets
LOSSES = {
    "multilabel_softmax hard": (
        lambda s: L.multilabel_softmax_loss(s, tensor(HARD, s).bool(), **none),
        lambda s: both_sides(s, HARD),
    ),
    "multilabel_softmax soft": (
        lambda s: L.multilabel_softmax_loss(s, tensor(SOFT, s), **none),
        lambda s: both_sides(s, SOFT),
    ),
    "sparse_multilabel_softmax": (
        lambda s: L.sparse_multilabel_softmax_loss(s, torch.tensor([0, 3, -100]).expand(*s.shape[:-1], 3), **none),
        lambda s: both_sides(s, HARD),
    ),
    "multilabel_pairwise": (
        lambda s: L.multilabel_pairwise_loss(s, tensor(HARD, s).bool(), scale=2.0, margin=0.25, **none),
        lambda s: log(1 + sum(exp(2 * (s[i] - s[j] + 0.25)) for i in (1, 2, 4) for j in (0, 3))),
    ),
    "subset_softmax": (
        lambda s: L.subset_softmax_loss(s, tensor(HARD, s).bool(), **none),
        lambda s: subset(s, [0, 3]),
    ),
    "softmax_focal 2": (
        lambda s: L.softmax_focal_loss(s, index(0, s), **none),
        lambda s: -1 * power(1 - softmax(s, 0), 2) * log(softmax(s, 0)),
    ),
    "softmax_focal .5": (
        lambda s: L.softmax_focal_loss(s, index(0, s), gamma=0.5, **none),
        lambda s: -1 * power(1 - softmax(s, 0), 0.5) * log(softmax(s, 0)),
    ),
    "softmax_focal 0": (
        lambda s: L.softmax_focal_loss(s, index(0, s), gamma=0, **none),
        lambda s: -1 * log(softmax(s, 0)),
    ),
    "softmax_focal soft": (
        lambda s: L.softmax_focal_loss(s, tensor(TAU, s), **none),
        lambda s: sum(-mp.mpf(w) * power(1 - softmax(s, c), 2) * log(softmax(s, c)) for c, w in enumerate(TAU) if w),
    ),
    "soft_truncated_cross_entropy": (
        lambda s: L.soft_truncated_cross_entropy(s, index(0, s), sharpness=1.5, **none),
        lambda s: -1 * softmax([-1.5 * x for x in s], 0) * log(softmax(s, 0)),
    ),
    "soft_accuracy": (
        lambda s: L.soft_accuracy_loss(s, index(0, s), **none),
        lambda s: 1 - softmax(s, 0),
    ),
    "am_softmax": (
        lambda s: L.am_softmax_loss(s / 128, index(0, s), margin=0.25, scale=128.0, **none),
        lambda s: log(1 + sum(exp(x - s[0] + 32) for x in s[1:])),
    ),
    "multilabel_symmetric_kl": (
        lambda s: L.multilabel_symmetric_kl(s, tensor(OTHER, s), scale=2.0, **none),
        lambda s: sum((sigmoid(2 * x) - sigmoid(2 * jets.jet(r))) * 2 * (x - r) for x, r in zip(s, OTHER, strict=True)),
    ),
    "emo": (
        lambda s: L.emo_loss(s, index(0, s), torch.tensor(WORDS, dtype=s.dtype), **none),
        lambda s: sum(softmax(s, i) * c for i, c in enumerate(costs(0)) if i),
    ),
    "soft_truncated_bce": (
        lambda s: L.soft_truncated_bce(one(s), torch.ones_like(one(s)), sharpness=2.0, **none),
        binary(lambda s, t: -1 * sigmoid(-2 * s) * log(sigmoid(s))),
    ),
    "hard_truncated_bce": (
        lambda s: L.hard_truncated_bce(one(s), torch.zeros_like(one(s)), margin=0.4, **none),
        binary(lambda s, t: -1 * log(1 - sigmoid(s)) * (sigmoid(s).parts[0] > 0.6)),
    ),
}
for gamma in (0.0, 0.5, 1.0, 2.0, 3.5):
    for t in (0.0, 1.0, 0.25):
        LOSSES[f"sigmoid_focal {gamma} {t}"] = (
            lambda s, g=gamma, t=t: L.sigmoid_focal_loss(
                one(s), torch.full_like(one(s), t), gamma=g, alpha=0.25, **none
            ),
            lambda s, g=gamma, t=t: focal(s[0], t, g, 0.25),
        )
for t in (0.0, 1.0):
    LOSSES[f"asymmetric {t}"] = (
        lambda s, t=t: L.asymmetric_loss(one(s), torch.full_like(one(s), t), clip=0.0625, **none),
        lambda s, t=t: asymmetric(s[0], t, 4, 1, mp.mpf(0.0625)),
    )


# Where sums over soft labels are subtracted from each other, the labels' own rounding counts as well, which the
# conditioning by the scores does not see.
UNITS = {"multilabel_softmax soft": 16, "softmax_focal soft": 32}


@functools.cache
def reference(name):
    """For each row the right numbers (value, gradient, Hessian times V) and the conditioning of each."""
    _, f = LOSSES[name]
    return [(jets.flat(jets.derivatives(f, row, V)), jets.bounds(f, row, V)) for row in ROWS]


def by_backward(loss, s):
    s = s.requires_grad_()
    value = loss(s)
    (gradient,) = torch.autograd.grad(value.sum(), s)
    (again,) = torch.autograd.grad(loss(s).sum(), s, create_graph=True)
    v = torch.tensor(V, dtype=s.dtype).expand(s.shape)
    return value.detach(), gradient, torch.autograd.grad(again, s, v)[0]


def by_transforms(loss, s):
    v = torch.tensor(V, dtype=s.dtype).expand(s.shape)
    gradient = torch.func.grad(lambda s: loss(s).sum())
    return loss(s), gradient(s), torch.func.grad(lambda s: (gradient(s) * v).sum())(s)


@pytest.mark.parametrize("road", [by_backward, by_transforms])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_right_to_the_last_digits(name, dtype, road):
    value, gradient, curvature = road(LOSSES[name][0], torch.tensor(ROWS, dtype=dtype))
    unit, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    n = len(V)
    for r, (right, bound) in enumerate(reference(name)):
        found = [value[r], *gradient[r], *curvature[r]]
        largest = max(abs(g) for g in right[1 : n + 1])
        for k, (got, want, sway) in enumerate(zip(found, right, bound, strict=True)):
            if k > n:
                sway = sway + largest
            what = "value" if k == 0 else f"gradient {k - 1}" if k <= n else f"curvature {k - n - 1}"
            error = abs(mp.mpf(float(got)) - want)
            units = UNITS.get(name, 4)
            assert error <= units * unit * sway + 4 * tiny, (
                f"row {r}, {what}: {float(got):.17g}, right {mp.nstr(want, 17)}"
            )
