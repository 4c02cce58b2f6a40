"""The public interface: names, order and kind of arguments, defaults. A change here breaks the code of users."""

# ruff: noqa: E501 - a signature stays on one line

import importlib
import inspect
import re

import pytest

INTERFACE = """
multilabel_softmax
    multilabel_softmax_loss(input, target, *, mask=None, threshold=0.0, dim=-1, reduction='mean')
    sparse_multilabel_softmax_loss(input, index, *, mask=None, threshold=0.0, ignore_index=-100, dim=-1, reduction='mean')
    multilabel_pairwise_loss(input, target, *, scale=1.0, margin=0.0, mask=None, dim=-1, reduction='mean')
    subset_softmax_loss(input, target, *, max_positives=None, threshold=0.0, mask=None, dim=-1, reduction='mean')
    multilabel_predict(input, *, mask=None, threshold=0.0)
    MultilabelSoftmaxLoss(*, threshold=0.0, dim=-1, reduction='mean')
    SparseMultilabelSoftmaxLoss(*, threshold=0.0, ignore_index=-100, dim=-1, reduction='mean')
    MultilabelPairwiseLoss(*, scale=1.0, margin=0.0, dim=-1, reduction='mean')
    SubsetSoftmaxLoss(*, max_positives=None, threshold=0.0, dim=-1, reduction='mean')
    MultilabelPredict(*, threshold=0.0)
soft_labels
    multilabel_probabilities(input, *, threshold=0.0)
    smooth_labels(target, smoothing, *, mask=None)
    mixup(input, target, *, alpha=0.2, generator=None, mask=None)
    multilabel_symmetric_kl(input, other, *, scale=1.0, mask=None, dim=-1, reduction='mean')
    MultilabelProbabilities(*, threshold=0.0)
    SmoothLabels(smoothing)
    Mixup(*, alpha=0.2, generator=None)
    MultilabelSymmetricKl(*, scale=1.0, dim=-1, reduction='mean')
focal
    hard_truncated_bce(input, target, *, margin=0.5, mask=None, reduction='mean')
    soft_truncated_bce(input, target, *, sharpness=1.0, mask=None, reduction='mean')
    sigmoid_focal_loss(input, target, *, gamma=2.0, alpha=None, mask=None, reduction='mean')
    asymmetric_loss(input, target, *, gamma_neg=4.0, gamma_pos=1.0, clip=0.05, detach_weight=False, mask=None, reduction='mean')
    softmax_focal_loss(input, target, *, gamma=2.0, weight=None, ignore_index=-100, dim=-1, reduction='mean')
    soft_truncated_cross_entropy(input, target, *, sharpness=1.0, ignore_index=-100, dim=-1, reduction='mean')
    HardTruncatedBce(*, margin=0.5, reduction='mean')
    SoftTruncatedBce(*, sharpness=1.0, reduction='mean')
    SigmoidFocalLoss(*, gamma=2.0, alpha=None, reduction='mean')
    AsymmetricLoss(*, gamma_neg=4.0, gamma_pos=1.0, clip=0.05, detach_weight=False, reduction='mean')
    SoftmaxFocalLoss(*, gamma=2.0, weight=None, ignore_index=-100, dim=-1, reduction='mean')
    SoftTruncatedCrossEntropy(*, sharpness=1.0, ignore_index=-100, dim=-1, reduction='mean')
am_softmax
    CosineClassifier(in_features, num_classes, *, device=None, dtype=None)
    margin_softmax_loss(cosine, target, *, psi, scale=30.0, ignore_index=-100, dim=-1, reduction='mean')
    additive_cosine_margin(m=0.35)
    additive_angular_margin(m=0.5)
    multiplied_angle(m=4)
    am_softmax_loss(cosine, target, *, margin=0.35, scale=30.0, ignore_index=-100, dim=-1, reduction='mean')
    linear_margin_softmax_loss(embedding, weight, target, *, psi, scale=30.0, chunk_size=None, ignore_index=-100, reduction='mean')
    linear_am_softmax_loss(embedding, weight, target, *, margin=0.35, scale=30.0, chunk_size=None, ignore_index=-100, reduction='mean')
    retrieval_accuracy(embedding, label, *, k=(1, 5, 10))
    AdditiveCosineMargin(m=0.35)
    AdditiveAngularMargin(m=0.5)
    MultipliedAngle(m=4)
    MarginSoftmaxLoss(*, psi, scale=30.0, ignore_index=-100, dim=-1, reduction='mean')
    AmSoftmaxLoss(*, margin=0.35, scale=30.0, ignore_index=-100, dim=-1, reduction='mean')
    LinearMarginSoftmaxLoss(*, psi, scale=30.0, chunk_size=None, ignore_index=-100, reduction='mean')
    LinearAmSoftmaxLoss(*, margin=0.35, scale=30.0, chunk_size=None, ignore_index=-100, reduction='mean')
    RetrievalAccuracy(*, k=(1, 5, 10))
accuracy
    expected_accuracy(input, target, *, sigma=1.0, nodes=32, dim=-1)
    log_expected_accuracy(input, target, *, sigma=1.0, nodes=32, dim=-1)
    exact_loss(input, target, *, sigma=1.0, log=False, nodes=32, ignore_index=-100, dim=-1, reduction='mean')
    soft_accuracy_loss(input, target, *, ignore_index=-100, dim=-1, reduction='mean')
    ExpectedAccuracy(*, sigma=1.0, nodes=32, dim=-1)
    LogExpectedAccuracy(*, sigma=1.0, nodes=32, dim=-1)
    ExactLoss(*, sigma=1.0, log=False, nodes=32, ignore_index=-100, dim=-1, reduction='mean')
    SoftAccuracyLoss(*, ignore_index=-100, dim=-1, reduction='mean')
emo
    emo_loss(input, target, embedding, *, ignore_index=-100, dim=-1, reduction='mean')
    emo_ce_loss(input, target, embedding, *, ignore_index=-100, dim=-1, reduction='mean')
    linear_emo_loss(hidden, weight, target, embedding, *, bias=None, logit_scale=1.0, logit_softcap=None, chunk_size=1024, accumulate='float32', ignore_index=-100, reduction='mean')
    linear_emo_ce_loss(hidden, weight, target, embedding, *, bias=None, logit_scale=1.0, logit_softcap=None, chunk_size=1024, accumulate='float32', ignore_index=-100, reduction='mean')
    EmoLoss(*, ignore_index=-100, dim=-1, reduction='mean')
    EmoCeLoss(*, ignore_index=-100, dim=-1, reduction='mean')
    LinearEmoLoss(*, logit_scale=1.0, logit_softcap=None, chunk_size=1024, accumulate='float32', ignore_index=-100, reduction='mean')
    LinearEmoCeLoss(*, logit_scale=1.0, logit_softcap=None, chunk_size=1024, accumulate='float32', ignore_index=-100, reduction='mean')
spans
    GlobalPointer(in_features, num_types, *, head_features=64, triangular=True, efficient=False)
    span_mask(lengths, *, length=None, triangular=True)
    spans_to_index(spans, length, num_types, *, lengths=None, triangular=True, ignore_index=-100)
    index_to_spans(index, length, *, ignore_index=-100)
    span_loss(input, index, *, mask=None, threshold=0.0, ignore_index=-100, reduction='mean')
    decode_spans(input, *, mask=None, threshold=0.0, overlaps=True)
    decode_triples(subjects, objects, heads, tails, *, mask=None, threshold=0.0)
    span_f1(predicted, true)
    triple_f1(predicted, true)
    power_bce(input, target, n, *, mask=None, reduction='mean')
    SpanLoss(*, threshold=0.0, ignore_index=-100, reduction='mean')
    PowerBce(n, *, reduction='mean')
distributed
    sharded_multilabel_softmax_loss(input, target, *, group=None, mask=None, threshold=0.0, reduction='mean')
    sharded_am_softmax_loss(embedding, weight, target, *, group=None, psi=None, margin=0.35, scale=30.0, sample=None, generator=None, ignore_index=-100, reduction='mean')
    sharded_emo_loss(input, target, embedding, *, group=None, ignore_index=-100, reduction='mean')
    sharded_emo_ce_loss(input, target, embedding, *, group=None, ignore_index=-100, reduction='mean')
    sharded_linear_emo_loss(hidden, weight, target, embedding, *, group=None, bias=None, logit_scale=1.0, logit_softcap=None, chunk_size=1024, accumulate='float32', ignore_index=-100, reduction='mean')
    sharded_linear_emo_ce_loss(hidden, weight, target, embedding, *, group=None, bias=None, logit_scale=1.0, logit_softcap=None, chunk_size=1024, accumulate='float32', ignore_index=-100, reduction='mean')
    ShardedCosineClassifier(in_features, num_classes, *, group=None, device=None, dtype=None)
    ShardedMultilabelSoftmaxLoss(*, group=None, threshold=0.0, reduction='mean')
    ShardedAmSoftmaxLoss(*, group=None, psi=None, margin=0.35, scale=30.0, sample=None, generator=None, ignore_index=-100, reduction='mean')
    ShardedEmoLoss(*, group=None, ignore_index=-100, reduction='mean')
    ShardedEmoCeLoss(*, group=None, ignore_index=-100, reduction='mean')
    ShardedLinearEmoLoss(*, group=None, logit_scale=1.0, logit_softcap=None, chunk_size=1024, accumulate='float32', ignore_index=-100, reduction='mean')
    ShardedLinearEmoCeLoss(*, group=None, logit_scale=1.0, logit_softcap=None, chunk_size=1024, accumulate='float32', ignore_index=-100, reduction='mean')
metrics
    micro_f1(pred, target)
    macro_f1(pred, target)
    exact_match(pred, target)
    best_threshold(scores, target, *, per_label=False)
    average_precision(scores, target)
    calibration_error(p, target, *, bins=15)
    fit_scale(scores, target)
    ScoreScale(factor, before, after)
    paired_difference(a, b, *, test_share=None, train_share=None)
    PairedDifference(mean, half_width, n)
training
    train(model, loss_fn, data, *, epochs=None, batch_size=64, lr=0.001, seed=0, device=None, metric=None, validation=None, desc='')
    predict(model, inputs, *, batch_size=1024)
    base_rate_bias(target, num_classes=None, *, smoothing=1.0, ignore_index=-100)
    seeded(seed)
    run_seeds(fn, seeds)
    Runs(values)
    History(loss=<factory>, metric=<factory>, validation=<factory>, best_epoch=None)
"""
MODULES = dict(re.findall(r"^(\w+)\n((?: .*\n)+)", INTERFACE, re.MULTILINE))


def signature(thing) -> str:
    """Name and arguments as a user writes them, without types."""
    found = inspect.signature(thing)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return f"{thing.__name__}{found.replace(parameters=bare, return_annotation=inspect.Signature.empty)}"


@pytest.mark.parametrize("slug", MODULES)
def test_the_interface_is_what_users_rely_on(slug):
    module = importlib.import_module(f"lossbook.{slug}")
    wanted = [line.strip() for line in MODULES[slug].strip().splitlines()]
    assert sorted(module.__all__) == sorted(line.partition("(")[0] for line in wanted)
    assert [signature(getattr(module, line.partition("(")[0])) for line in wanted] == wanted
