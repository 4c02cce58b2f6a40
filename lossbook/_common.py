"""What the losses compute with: exact pieces of formulas, reducing, the base of the modules.

Everything is a few lines so that a loss reads as its formula. The pieces are exact by construction, in every
derivative: nothing is subtracted from a number that has been rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lossbook._checks import describe
from lossbook._torch import beside

# Infinite scores count as this: inf - inf and 0 * inf would be NaN.
FAR = 1e30
# Lower than every score that counts; finite, since -inf - -inf would be NaN where no class takes part at all.
ABSENT = -1e32


def softplus(x: Tensor) -> Tensor:
    r""":math:`\log(1 + e^x)`, with :math:`\sigma(x) = e^{-\log(1 + e^{-x})}` as its derivative to the last digit.

    torch's own loses its second derivative where :math:`1 - \sigma` rounds to 0, from x = 17 on in float32.
    """
    below = torch.where(x > 0, -x, x)  # -|x|, with slope 1 at 0: e^below never overflows
    return torch.where(x > 0, x, 0) + torch.log1p(torch.exp(below))


def sigmoid(x: Tensor) -> Tensor:
    r""":math:`\sigma(x)`, whose derivative :math:`\sigma(x)\,\sigma(-x)` keeps its digits where :math:`\sigma` is 1."""
    return torch.exp(-softplus(-x))


def finite(s: Tensor) -> Tensor:
    """The scores with infinities at +-1e30, and the gradient that a finite score would get: a clamp would stop it."""
    s = s.clone()
    s.detach().copy_(s.detach().clamp(-FAR, FAR))  # vmap knows no clamp_
    return s


def one_hot(t: Tensor, num_classes: int) -> Tensor:
    """True at the class ``t`` of each row: boolean (..., C)."""
    return beside(torch.arange(num_classes, device=t.device), t) == t.unsqueeze(-1)


def logsumexp(s: Tensor) -> Tensor:
    r""":math:`\log \sum_i e^{s_i}` of each row.

    The shares in torch's gradient, :math:`e^{s_i - r}`, are rounded as coarsely as the result r.
    """
    top = s.detach().amax(-1, keepdim=True)
    return (s - top).exp().sum(-1).log() + top.squeeze(-1)


def if_counted(x: Tensor, counted: Tensor | None) -> Tensor:
    """``x``, 0 in the rows where ``counted`` is False; None counts every row."""
    if counted is None:
        return x
    return x.masked_fill(~(counted if x.dim() == counted.dim() else counted.unsqueeze(-1)), 0)


def rest_margin(s: Tensor, t: Tensor, counted: Tensor | None = None) -> Tensor:
    r"""How far the other classes lie above class t: :math:`z = \log \sum_{i \ne t} e^{s_i - s_t}`, so that
    :math:`p_t = \sigma(-z)`, :math:`1 - p_t = \sigma(z)` and :math:`-\log p_t = \log(1 + e^z)`.

    With one class only it is far below 0, and so where ``counted`` is False, whatever the scores.
    """
    wanted = one_hot(t, s.shape[-1])
    own = wanted if counted is None else wanted & counted.unsqueeze(-1)
    away = wanted if counted is None else wanted | ~counted.unsqueeze(-1)
    others = s.masked_fill(away, ABSENT)
    top = others.detach().amax(-1, keepdim=True)
    # raw scores are subtracted first, so a common offset costs no digits
    s_t = s.masked_fill(~own, 0).sum(-1)
    return (others - top).exp().sum(-1).log() + (top.squeeze(-1) - s_t)


def rest_margins(s: Tensor) -> Tensor:
    """:func:`rest_margin` of every class, (..., C), for soft targets."""
    top = one_hot(s.detach().argmax(-1), s.shape[-1])
    # p <= 1/2 for all classes but the top one, whose rest is summed: log(1 - p) never cancels
    p = s.softmax(-1).masked_fill(top, 0)
    rest_of_top = s.masked_fill(top, ABSENT).logsumexp(-1, keepdim=True)
    log_rest = torch.where(top, rest_of_top, s.logsumexp(-1, keepdim=True) + torch.log1p(-p))
    return log_rest - s


def reduce_loss(loss: Tensor, reduction: str, counted: Tensor | None = None) -> Tensor:
    """Mean, sum or none of the losses of the rows.

    ``counted`` (boolean, broadcastable to ``loss``) says which rows enter the mean; the loss of the others must be 0
    already. The mean over no row is 0 with zero gradient, never NaN.
    """
    if reduction == "none":
        return loss
    total = loss.sum()
    if reduction == "sum":
        return total
    if counted is None:
        return total / max(loss.numel(), 1)
    return total / counted.sum().clamp(min=1)


class LossModule(nn.Module):
    """A module that keeps the options of a function; those that are tensors move with it and are saved with it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    @property
    def options(self) -> dict[str, Any]:
        """The options by name."""
        return {name: getattr(self, name) for name in self._names}

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            f"{type(self).__name__} cannot be scripted: torch.jit.script knows no keyword-only arguments. "
            "Use torch.compile, torch.export or torch.jit.trace."
        )

    def extra_repr(self) -> str:
        """The options; modules and large tensors by their kind."""
        shown = {n: v for n, v in self.options.items() if not isinstance(v, nn.Module)}
        texts = {n: f"{v:g}" if isinstance(v, float) else repr(v) for n, v in shown.items()}
        texts |= {n: describe(v) for n, v in shown.items() if isinstance(v, Tensor)}
        return ", ".join(f"{name}={text}" for name, text in texts.items())
