"""The reading of arguments that all losses share."""

import inspect

import pytest
import torch
from torch._subclasses import FakeTensorMode

from lossbook import accuracy, am_softmax, emo, focal, multilabel_softmax, soft_labels
from lossbook._common import check_index_target


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_index_targets_of_a_small_dtype_do_not_wrap(dtype):
    """In uint8, -100 is 156 and 300 is 44: neither may be what a class index is compared with."""
    target = torch.tensor([0, 44, 156 if dtype == torch.uint8 else 299], dtype=dtype)
    assert check_index_target(target, (3,), 300, -100).tolist() == [True, True, True]
    with pytest.raises(ValueError, match=r"target must be class indices in \[0, 44\) or ignore_index=-100, got 44"):
        check_index_target(target[:2], (2,), 44, -100)


@pytest.mark.parametrize("ignored", [1.0, True, "x", torch.tensor(1)])
def test_what_is_ignored_is_an_int(ignored):
    with pytest.raises(TypeError, match="ignore_index must be an integer, got"):
        check_index_target(torch.tensor([0, 1]), (2,), 3, ignored)


def every_loss():
    """One call of every function of the six modules, as (name, function, arguments)."""
    rows, n, size = 4, 6, 3
    scores, labels = torch.randn(rows, n, requires_grad=True), torch.rand(rows, n)
    target, index = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, 2, dtype=torch.long)
    cosine = torch.rand(rows, n, requires_grad=True)
    hidden, weight = (torch.randn(k, size, requires_grad=True) for k in (rows, n))
    vectors = torch.randn(n, size)
    arguments = {
        multilabel_softmax: {
            "multilabel_softmax_loss": (scores, labels),
            "sparse_multilabel_softmax_loss": (scores, index),
            "multilabel_pairwise_loss": (scores, labels > 0.5),
            "subset_softmax_loss": (scores, labels > 0.5),
            "multilabel_predict": (scores,),
        },
        soft_labels: {
            "multilabel_probabilities": (scores,),
            "smooth_labels": (labels, 0.1),
            "mixup": (scores, labels),
            "multilabel_symmetric_kl": (scores, cosine),
        },
        focal: {
            "hard_truncated_bce": (scores, labels > 0.5),
            "soft_truncated_bce": (scores, labels > 0.5),
            "sigmoid_focal_loss": (scores, labels),
            "softmax_focal_loss": (scores, target),
            "soft_truncated_cross_entropy": (scores, target),
        },
        am_softmax: {
            "am_softmax_loss": (cosine, target),
            "linear_am_softmax_loss": (hidden, weight, target),
            "retrieval_accuracy": (hidden, target),
        },
        accuracy: {
            "expected_accuracy": (scores, target),
            "log_expected_accuracy": (scores, target),
            "exact_loss": (scores, target),
            "soft_accuracy_loss": (scores, target),
        },
        emo: {
            "emo_loss": (scores, target, vectors),
            "emo_ce_loss": (scores, target, vectors),
            "linear_emo_loss": (hidden, weight, target, vectors),
            "linear_emo_ce_loss": (hidden, weight, target, vectors),
        },
    }
    for module, functions in arguments.items():
        for name, given in functions.items():
            yield name, getattr(module, name), given


def ignoring():
    """The losses that leave out rows, as (name, function, arguments), and their modules."""
    for name, function, arguments in every_loss():
        if "ignore_index" in inspect.signature(function).parameters:
            yield pytest.param(lambda i, f=function, a=arguments: f(*a, ignore_index=i), id=name)
    for module in (accuracy, am_softmax, emo, focal, multilabel_softmax):
        for name in module.__all__:
            twin = getattr(module, name)
            if inspect.isclass(twin) and "ignore_index" in inspect.signature(twin).parameters:
                more = {"psi": lambda cosine: cosine} if "psi" in inspect.signature(twin).parameters else {}
                yield pytest.param(lambda i, f=twin, m=more: f(ignore_index=i, **m), id=name)


@pytest.mark.parametrize("ignored", [None, True, 1.0, "x"])
@pytest.mark.parametrize("call", list(ignoring()))
def test_every_loss_says_at_once_that_what_is_ignored_is_no_int(call, ignored):
    with pytest.raises(TypeError, match="ignore_index must be an integer, got"):
        call(ignored)
    call(-1)


def tensors(result):
    """The tensors of a result that may be a tuple or a dict."""
    parts = result.values() if isinstance(result, dict) else result if isinstance(result, tuple) else (result,)
    return [part for part in parts if isinstance(part, torch.Tensor)]


def test_every_loss_works_on_fake_tensors():
    """Tracers run a model on tensors with shapes and no values: nothing may look at a value there."""
    real = {name: [(x.shape, x.dtype) for x in tensors(f(*given))] for name, f, given in every_loss()}
    with FakeTensorMode():
        for name, f, given in every_loss():
            fake = tensors(f(*given))
            assert [(x.shape, x.dtype) for x in fake] == real[name], name
            for x in fake:
                if x.requires_grad:
                    x.sum().backward()
