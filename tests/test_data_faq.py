"""The split of the everyday questions that chapter 4 searches in."""

import torch

from lossbook.data import questions
from lossbook.data.faq import faq, stored_halves


def test_every_group_is_in_one_part():
    q = faq()
    parts = torch.cat([q.validation, *q.folds])
    assert parts.sort().values.tolist() == list(range(126))
    assert sum(len(q.rows(part)) for part in (q.validation, *q.folds)) == len(questions().text) == len(q.features)


def test_the_split_is_the_same_every_time():
    first, second = faq(), faq()
    assert first.validation.equal(second.validation)
    assert all(a.equal(b) for a, b in zip(first.folds, second.folds, strict=True))


def test_training_sees_no_question_of_the_fold():
    q = faq()
    for i, fold in enumerate(q.folds):
        assert not set(q.seen(i).tolist()) & set(fold.tolist())
        assert not set(q.texts(q.seen(i))) & set(q.texts(fold))


def test_labels_number_the_groups_in_order():
    q = faq()
    groups = torch.tensor([9, 3])
    assert q.labels(groups).unique().tolist() == [0, 1]
    for label, group in zip(q.labels(groups).tolist(), q.group[q.rows(groups)].tolist(), strict=True):
        assert [3, 9][label] == group
    assert q.texts(groups) == [q.text[i] for i in q.rows(groups).tolist()]


def test_whole_groups_are_stored_and_half_of_them():
    group = torch.arange(7).repeat_interleave(3)
    halves = list(stored_halves(group, n=5))
    assert len(halves) == 5
    assert len({tuple(half.tolist()) for half in halves}) > 1, "every way is the same"
    for half in halves:
        per_group = half.view(7, 3)
        assert per_group.all(1).sum() == 3, "half of seven groups, rounded down"
        assert (per_group.all(1) | ~per_group.any(1)).all(), "a group is stored in part"
