"""Cosines with class vectors: unit vectors, and the layer with its hooks for FSDP and Hugging Face."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lossbook._checks import HALF, check_floating, check_integer, describe, refuse_sharded
from lossbook._torch import compiling, full_precision, readable


def inverse_norm(vectors: Tensor, look: bool = False) -> Tensor:
    """``1 / |v|`` of each vector as a column, 0 for a vector without direction, NaN where the squares overflow.

    With ``look`` it is seen, where nothing waits for that, that none of them is such a vector.
    """
    square = vectors.square().sum(-1, keepdim=True)
    if look and readable(square) and square.numel() > 0:
        low, high = (bound.item() for bound in torch.aminmax(square.detach()))
        if low >= 1e-24 and high < math.inf:
            return 1 / square.sqrt()  # the backward pass of rsqrt has a third power, which ends sooner
    square = square.masked_fill(square.isinf(), float("nan"))  # 1 / inf would be a silent cosine of 0
    long = ~(square < 1e-24)  # shorter than 1e-12: no direction. NaN stays NaN
    # the inner where keeps 1 / sqrt(0) and its derivatives out of the graph: inf * 0 would be NaN
    return torch.where(long, 1 / torch.where(long, square, 1.0).sqrt(), 0.0)


def unit(vectors: Tensor, *others: Tensor, look: bool = False) -> Tensor:
    """The vectors at length 1, in float64 where one of the tensors is, else in float32."""
    wide = any(v.dtype == torch.float64 for v in (vectors, *others))
    vectors = vectors.to(torch.float64 if wide else torch.float32)
    return vectors * inverse_norm(vectors, look)


def check_vectors(embedding: Tensor, weight: Tensor) -> None:
    """Raise if these are no embeddings ``(..., D)`` and class vectors ``(C, D)``."""
    check_floating(embedding, "embedding")
    refuse_sharded("weight", check_floating(weight, "weight", dims=2))
    classes, length = weight.shape
    if classes == 0:
        wanted = "at least one class vector"
        raise ValueError(f"weight must have {wanted}, got {describe(weight)}")
    if embedding.dim() < 1 or embedding.shape[-1] != length:
        wanted = f"the length of a class vector, {length}, as its last dimension"
        raise ValueError(f"embedding must have {wanted}, got {describe(embedding)}")


class CosineClassifier(nn.Module):
    r"""Cosines of embeddings with one vector per class: the last layer for a margin softmax.

    .. math:: \cos\theta_i = \frac{\langle z, w_i\rangle}{\lVert z\rVert\, \lVert w_i\rVert}

    Embeddings ``(..., in_features)`` become cosines ``(..., num_classes)`` in [-1, 1]: float32, or float64 where the
    embedding or the class vectors are. A vector shorter than 1e-12 has cosine 0 with every other and gradient 0. One
    whose squares overflow (longer than 1e19, 1e154 in float64), and one with NaN or infinity, have cosine NaN. An
    embedding with NaN spoils the gradient of all class vectors, even where the loss ignores its row: put zeros in its
    place, or take :func:`linear_am_softmax_loss`, which does so.

    The class vectors stay in float32: autocast, a half precision embedding, ``.half()`` and ``.to(torch.bfloat16)``
    leave them as they are, since bfloat16 would lose a step of a thousandth of a weight. ``.double()`` widens them.
    FSDP2 with ``MixedPrecisionPolicy(param_dtype=torch.bfloat16)`` steps them in float32, but hands a rounded copy to
    ``forward``, which warns. Give the head a group of its own, before the model's:
    ``fully_shard(head, mp_policy=MixedPrecisionPolicy())``.

    Class vectors made on the meta device are drawn when ``to_empty`` gives them memory. Those that a checkpoint lacks
    are drawn by ``from_pretrained`` of Hugging Face (transformers 5), unless the model's own ``_init_weights`` does it.

    Args:
        in_features: length of an embedding.
        num_classes: number of class vectors.
        device: where the class vectors are made.
        dtype: float32, which is the default, or float64.

    Attributes:
        weight: the class vectors ``(num_classes, in_features)``, of length about 1 at the start.

    Raises:
        TypeError: a size that is not an integer; an embedding that is not a real-valued tensor.
        ValueError: a size below 1; another dtype; an embedding of another length.

    Example:
        >>> import torch
        >>> head = CosineClassifier(2, 3)
        >>> with torch.no_grad():
        ...     _ = head.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 1.0], [-2.0, 0.0]]))
        >>> head(torch.tensor([[3.0, 4.0]])).detach()
        tensor([[ 0.6000,  0.8000, -0.6000]])

    Equation :eq:`am-cosine` of the chapter. Source: Su Jianlin, scientific spaces 5743 (2018); normalised class
    vectors also in arXiv 1801.05599.
    """

    weight: nn.Parameter

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_integer("in_features", in_features, low=1)
        self.num_classes = check_integer("num_classes", num_classes, low=1)
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        shape = (self.num_classes, self.in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype or torch.float32, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class vectors anew: directions uniform, lengths about 1."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        self._undrawn = self.weight.is_meta

    def forward(self, embedding: Tensor) -> Tensor:
        """Cosines ``(..., num_classes)`` of ``embedding`` ``(..., in_features)``."""
        check_floating(embedding, "embedding")
        if embedding.dim() < 1 or embedding.shape[-1] != self.in_features:
            raise ValueError(
                f"embedding must have in_features={self.in_features} as its last dimension, got {describe(embedding)}"
            )
        if self.weight.dtype in HALF and not compiling():
            warnings.warn(
                f"the class vectors are rounded to {self.weight.dtype}: give the CosineClassifier a group of its own, "
                "fully_shard(head, mp_policy=MixedPrecisionPolicy()), before the model's",
                stacklevel=2,
            )
        with full_precision(embedding.device):
            cosine = F.linear(unit(embedding, self.weight), unit(self.weight, embedding))
            return cosine.clamp(-1, 1)  # rounding gives 1 + 1e-7

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CosineClassifier:
        def keep_precision(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.is_floating_point() and changed.dtype in HALF:
                return tensor.to(changed.device)  # moves, and skips the rounding
            return changed

        undrawn = self.weight.is_meta
        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        if undrawn and not self.weight.is_meta:  # to_empty: memory with anything in it
            self.reset_parameters()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # transformers sets this once _init_weights, which knows no class vectors, has seen the module. Parameters read
        # from a checkpoint bear the mark already (since version 5), and what was drawn in place has a version.
        if name == "_is_hf_initialized" and getattr(self, "_undrawn", False) and not self.weight.is_meta:
            known = int(getattr(sys.modules.get("transformers"), "__version__", "0").partition(".")[0]) >= 5
            if known and not getattr(self.weight, name, False) and self.weight._version == 0:
                self.reset_parameters()
            self._undrawn = False
