"""The tables of chapter 5: sizes, splits that share no row, wrong labels where they belong."""

import pytest
import torch

from lossbook.data.small_tables import TABLES, small_table, split_table


@pytest.mark.parametrize(("name", "rows", "classes"), [("iris", 150, 3), ("wine", 178, 3), ("digits", 1797, 10)])
def test_a_whole_table_is_standardised(name, rows, classes):
    x, t = small_table(name)
    assert len(x) == len(t) == rows
    assert x.dtype == torch.float64
    assert t.dtype == torch.int64
    assert t.unique().tolist() == list(range(classes))
    assert x.mean(0).abs().max() < 1e-9
    varies = x.std(0, correction=0) > 0
    assert torch.allclose(x.std(0, correction=0)[varies], torch.ones(int(varies.sum())).double(), atol=1e-3)


def test_splits_share_no_row_and_use_all():
    parts = split_table("wine", splits=3)
    assert [part.x.shape for part in parts] == [(3, 89, 13), (3, 44, 13), (3, 45, 13)]
    assert parts.train.x.dtype == torch.float32
    _, classes = small_table("wine")
    for split in range(3):
        found = torch.cat([part.t[split] for part in parts])
        assert torch.equal(found.bincount(), classes.bincount())
        rows = torch.cat([part.x[split] for part in parts])
        assert len(rows.unique(dim=0)) == len(rows)
    assert parts.train.x.mean(1).abs().max() < 1e-4


def test_the_first_splits_do_not_depend_on_how_many_there_are():
    one, three = split_table("iris", splits=1), split_table("iris", splits=3)
    for a, b in zip(one, three, strict=True):
        assert torch.equal(a.x, b.x[:1])
        assert torch.equal(a.t, b.t[:1])


def test_wrong_labels_stand_in_training_and_validation_rows_only():
    clean, wrong = split_table("digits", splits=4), split_table("digits", splits=4, wrong=0.3)
    for part in ("train", "validation"):
        a, b = getattr(clean, part), getattr(wrong, part)
        assert torch.equal(a.x, b.x)
        assert abs((a.t != b.t).double().mean().item() - 0.3) < 0.03
        assert b.t.min() >= 0
        assert b.t.max() <= 9
    assert torch.equal(clean.test.t, wrong.test.t)
    changed = wrong.train.t[wrong.train.t != clean.train.t]
    assert changed.bincount(minlength=10).min() > 0.05 * len(changed)  # each class as often


def test_bad_arguments_are_refused():
    assert set(TABLES) == {"iris", "wine", "breast cancer", "digits"}
    with pytest.raises(ValueError, match="no table 'cars'"):
        split_table("cars")
    with pytest.raises(ValueError, match="splits"):
        split_table("iris", splits=0)
    with pytest.raises(ValueError, match="share"):
        split_table("iris", wrong=1.0)
