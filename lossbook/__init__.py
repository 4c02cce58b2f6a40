"""Classification losses, derived, checked and measured: the package of the book *lossbook*.

Each chapter has one module of the same name, for example :mod:`lossbook.multilabel_softmax`. Every public name of these
modules can be imported from here as well, which loads its module alone::

    from lossbook import sigmoid_focal_loss
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0.dev0"

# name -> module; a test compares it with the modules
_EXPORTS = {
    "MultilabelPairwiseLoss": "multilabel_softmax",
    "MultilabelPredict": "multilabel_softmax",
    "MultilabelSoftmaxLoss": "multilabel_softmax",
    "SparseMultilabelSoftmaxLoss": "multilabel_softmax",
    "SubsetSoftmaxLoss": "multilabel_softmax",
    "multilabel_pairwise_loss": "multilabel_softmax",
    "multilabel_predict": "multilabel_softmax",
    "multilabel_softmax_loss": "multilabel_softmax",
    "sparse_multilabel_softmax_loss": "multilabel_softmax",
    "subset_softmax_loss": "multilabel_softmax",
    "Mixup": "soft_labels",
    "MultilabelProbabilities": "soft_labels",
    "MultilabelSymmetricKl": "soft_labels",
    "SmoothLabels": "soft_labels",
    "mixup": "soft_labels",
    "multilabel_probabilities": "soft_labels",
    "multilabel_symmetric_kl": "soft_labels",
    "smooth_labels": "soft_labels",
    "AsymmetricLoss": "focal",
    "HardTruncatedBce": "focal",
    "SigmoidFocalLoss": "focal",
    "SoftTruncatedBce": "focal",
    "SoftTruncatedCrossEntropy": "focal",
    "SoftmaxFocalLoss": "focal",
    "asymmetric_loss": "focal",
    "hard_truncated_bce": "focal",
    "sigmoid_focal_loss": "focal",
    "soft_truncated_bce": "focal",
    "soft_truncated_cross_entropy": "focal",
    "softmax_focal_loss": "focal",
    "AdditiveAngularMargin": "am_softmax",
    "AdditiveCosineMargin": "am_softmax",
    "AmSoftmaxLoss": "am_softmax",
    "CosineClassifier": "am_softmax",
    "LinearAmSoftmaxLoss": "am_softmax",
    "LinearMarginSoftmaxLoss": "am_softmax",
    "MarginSoftmaxLoss": "am_softmax",
    "MultipliedAngle": "am_softmax",
    "RetrievalAccuracy": "am_softmax",
    "additive_angular_margin": "am_softmax",
    "additive_cosine_margin": "am_softmax",
    "am_softmax_loss": "am_softmax",
    "linear_am_softmax_loss": "am_softmax",
    "linear_margin_softmax_loss": "am_softmax",
    "margin_softmax_loss": "am_softmax",
    "multiplied_angle": "am_softmax",
    "retrieval_accuracy": "am_softmax",
    "ExactLoss": "accuracy",
    "ExpectedAccuracy": "accuracy",
    "LogExpectedAccuracy": "accuracy",
    "SoftAccuracyLoss": "accuracy",
    "exact_loss": "accuracy",
    "expected_accuracy": "accuracy",
    "log_expected_accuracy": "accuracy",
    "soft_accuracy_loss": "accuracy",
    "EmoCeLoss": "emo",
    "EmoLoss": "emo",
    "LinearEmoCeLoss": "emo",
    "LinearEmoLoss": "emo",
    "emo_ce_loss": "emo",
    "emo_loss": "emo",
    "linear_emo_ce_loss": "emo",
    "linear_emo_loss": "emo",
    "GlobalPointer": "spans",
    "PowerBce": "spans",
    "SpanLoss": "spans",
    "decode_spans": "spans",
    "decode_triples": "spans",
    "index_to_spans": "spans",
    "power_bce": "spans",
    "span_f1": "spans",
    "span_loss": "spans",
    "span_mask": "spans",
    "spans_to_index": "spans",
    "triple_f1": "spans",
    "ShardedAmSoftmaxLoss": "distributed",
    "ShardedCosineClassifier": "distributed",
    "ShardedEmoCeLoss": "distributed",
    "ShardedEmoLoss": "distributed",
    "ShardedLinearEmoCeLoss": "distributed",
    "ShardedLinearEmoLoss": "distributed",
    "ShardedMultilabelSoftmaxLoss": "distributed",
    "sharded_am_softmax_loss": "distributed",
    "sharded_emo_ce_loss": "distributed",
    "sharded_emo_loss": "distributed",
    "sharded_linear_emo_ce_loss": "distributed",
    "sharded_linear_emo_loss": "distributed",
    "sharded_multilabel_softmax_loss": "distributed",
    "PairedDifference": "metrics",
    "ScoreScale": "metrics",
    "average_precision": "metrics",
    "best_threshold": "metrics",
    "calibration_error": "metrics",
    "exact_match": "metrics",
    "fit_scale": "metrics",
    "macro_f1": "metrics",
    "micro_f1": "metrics",
    "paired_difference": "metrics",
}

__all__ = list(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"lossbook.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'lossbook' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
