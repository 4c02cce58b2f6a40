"""One call of every public loss and helper, for the tests of what all of them promise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import lossbook

ROWS, CLASSES, SIZE = 4, 6, 3


@dataclass(frozen=True)
class Call:
    """A function with its tensors; ``scores`` says which of them take a gradient."""

    name: str
    tensors: tuple[Any, ...]
    scores: tuple[int, ...] = (0,)
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(lossbook, self.name)

    @property
    def twin(self) -> Any:
        """The module of the same name."""
        return getattr(lossbook, "".join(part.capitalize() for part in self.name.split("_")))

    def takes(self, option: str) -> bool:
        return option in inspect.signature(self.function).parameters

    def __call__(self, *tensors: Any, **options: Any) -> Any:
        return self.function(*(tensors or self.tensors), **{**dict(self.options), **options})


def half_cosine(cosine: torch.Tensor) -> torch.Tensor:
    """A margin of nobody's."""
    return cosine - 0.5


def calls() -> list[Call]:
    """Every function on four rows of six classes; the same numbers each time."""
    g = torch.Generator().manual_seed(0)

    def scores(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).requires_grad_()

    s, r = scores(ROWS, CLASSES), scores(ROWS, CLASSES)
    soft, t = torch.rand(ROWS, CLASSES, generator=g), torch.tensor([0, 5, 2, 2])
    hard, index = soft > 0.5, torch.tensor([[0, 3], [1, -100], [-100, -100], [2, 2]])
    cosine = (torch.rand(ROWS, CLASSES, generator=g) * 2 - 1).requires_grad_()
    hidden, weight, vectors = scores(ROWS, SIZE), scores(CLASSES, SIZE), torch.randn(CLASSES, SIZE, generator=g)
    psi = (("psi", half_cosine),)
    return [
        Call("multilabel_softmax_loss", (s, soft)),
        Call("multilabel_softmax_loss", (s, hard)),
        Call("sparse_multilabel_softmax_loss", (s, index)),
        Call("multilabel_pairwise_loss", (s, hard)),
        Call("subset_softmax_loss", (s, hard)),
        Call("multilabel_symmetric_kl", (s, r), (0, 1)),
        Call("hard_truncated_bce", (s, hard)),
        Call("soft_truncated_bce", (s, hard)),
        Call("sigmoid_focal_loss", (s, soft)),
        Call("asymmetric_loss", (s, soft)),
        Call("softmax_focal_loss", (s, t)),
        Call("softmax_focal_loss", (s, soft / soft.sum(-1, keepdim=True))),
        Call("soft_truncated_cross_entropy", (s, t)),
        Call("margin_softmax_loss", (cosine, t), options=psi),
        Call("am_softmax_loss", (cosine, t)),
        Call("linear_am_softmax_loss", (hidden, weight, t), (0, 1)),
        Call("linear_margin_softmax_loss", (hidden, weight, t), (0, 1), psi),
        Call("exact_loss", (s, t)),
        Call("soft_accuracy_loss", (s, t)),
        Call("power_bce", (s, soft), options=(("n", 4.0),)),
        Call("emo_loss", (s, t, vectors)),
        Call("emo_ce_loss", (s, t, vectors)),
        Call("linear_emo_loss", (hidden, weight, t, vectors), (0, 1)),
        Call("linear_emo_ce_loss", (hidden, weight, t, vectors), (0, 1)),
        Call("expected_accuracy", (s, t)),
        Call("log_expected_accuracy", (s, t)),
        Call("multilabel_predict", (s,), ()),
        Call("multilabel_probabilities", (s,)),
        Call("smooth_labels", (soft, 0.1), ()),
        Call("mixup", (s, soft)),
        Call("retrieval_accuracy", (hidden.detach(), t), ()),
    ]


ALL = calls()
# those that return one number for each row or element
LOSSES = [call for call in ALL if call.takes("reduction")]
# losses of rows: the classes lie in one dimension of the scores
OF_ROWS = [
    c
    for c in LOSSES
    if not c.name.startswith(("linear", "hard", "soft_truncated_bce", "sigmoid", "asymmetric", "power"))
]


def ids(call: Call) -> str:
    """The name of a call with the kind of its target."""
    target = call.tensors[1] if len(call.tensors) > 1 else None
    kind = str(target.dtype).removeprefix("torch.") if isinstance(target, torch.Tensor) else ""
    return f"{call.name}-{kind}"
