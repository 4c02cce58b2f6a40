"""Sums and polynomials whose terms are given by their logarithms, with exact derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lossbook._common import ABSENT
from lossbook._torch import compiling, transformed


def log_sum(x: Tensor, w: Tensor) -> Tensor:
    r""":math:`\log \sum_i w_i e^{x_i}`, and -1e32 where all weights are 0.

    A term larger than all others together is taken out, and they are summed beside it: no derivative of any order is
    then a difference of numbers near 1. Under ``torch.compile`` this holds for value and gradient; the second pass over
    the terms would cost four times the rest.
    """
    hard, w = w.dtype == torch.bool, w.to(x.dtype)
    x = torch.where(w >= torch.finfo(x.dtype).tiny, x, ABSENT)  # no 0 * inf
    top = x.detach().amax(-1, keepdim=True)
    if compiling() and not transformed():
        terms = torch.exp(x - top)
        total = (terms if hard else w * terms).sum(-1)
        return total.masked_fill(total == 0, 1).log() + top.squeeze(-1)
    leads = (x.detach() + w.log()).softmax(-1) > 0.5
    out = x.masked_fill(~leads, 0).sum(-1, keepdim=True)
    out = torch.where(leads.any(-1, keepdim=True), out, top)
    total = (w * torch.exp((x - out).masked_fill(leads, 0))).sum(-1)
    return total.masked_fill(total == 0, 1).log() + out.squeeze(-1)


def log_elementary(x: Tensor, degree: int) -> Tensor:
    r"""Logarithms of the elementary symmetric polynomials :math:`e_0, \dots, e_D` of :math:`e^{x_i}`: (..., D + 1).

    They are the coefficients of :math:`\prod_i (1 + e^{x_i} z)`. The factors are multiplied in pairs, and so on.
    """
    n = int(x.shape[-1])
    size = 1 << max(n - 1, 1).bit_length()  # a power of 2, at least 2
    x = F.pad(x, (0, size - n), value=ABSENT)
    product = torch.stack((torch.zeros_like(x), x), -1)
    while product.shape[-2] > 1:
        product = log_multiply(product[..., 0::2, :], product[..., 1::2, :], degree)
    product = product.squeeze(-2)
    return F.pad(product, (0, degree + 1 - product.shape[-1]), value=ABSENT)


def log_multiply(f: Tensor, g: Tensor, degree: int) -> Tensor:
    """The product of two polynomials of equal degree, all in logarithms, up to ``degree``."""
    n = f.shape[-1]
    terms = f.unsqueeze(-1) + g.unsqueeze(-2)  # f_i g_j, (n, n)
    # row i moves i places to the right: terms of equal i + j stand in one column
    skewed = F.pad(terms, (0, n), value=ABSENT).flatten(-2)[..., :-n]
    skewed = skewed.reshape(*terms.shape[:-1], 2 * n - 1)
    columns = skewed[..., : degree + 1].transpose(-1, -2)
    return log_sum(columns, ~(columns <= ABSENT / 2))
