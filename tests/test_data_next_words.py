"""The help topics as pieces of words, and vectors from counts."""

import math
import re
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from lossbook.data import python_text
from lossbook.data.next_words import END, RARE, costs_to, count_vectors, distinct, help_words


def test_parts_read_the_paragraphs_in_order():
    text = help_words(1500, length=32)
    paragraphs = python_text()
    number = {word: i for i, word in enumerate(text.vocabulary)}
    for part, rests in (("train", range(8)), ("validation", [8]), ("test", [9])):
        chosen = [p for i, p in enumerate(paragraphs) if i % 10 in rests]
        stream = [i for p in chosen for i in [*(number.get(word, number[RARE]) for word in p), number[END]]]
        words, following = getattr(text, part)
        n = (len(stream) - 1) // 32
        assert words.shape == following.shape == (n, 32)
        assert words.dtype == following.dtype == torch.int64
        assert words.flatten().tolist() == stream[: n * 32]
        assert following.flatten().tolist() == stream[1 : n * 32 + 1]


def test_the_vocabulary_is_that_of_the_training_part():
    text = help_words(200)
    counts = Counter(word for i, p in enumerate(python_text()) if i % 10 < 8 for word in p)
    assert text.vocabulary[:2] == (END, RARE)
    assert len(set(text.vocabulary)) == 200
    least = min(counts[word] for word in text.vocabulary[2:])
    assert all(count <= least for word, count in counts.items() if word not in text.vocabulary)


@pytest.mark.parametrize("options", [{"size": 2}, {"length": 0}])
def test_sizes_that_make_no_sense(options):
    with pytest.raises(ValueError, match=re.escape(f"{next(iter(options))}={next(iter(options.values()))}")):
        help_words(**options)


def test_counted_vectors_rebuild_the_matrix_they_come_from():
    generator = torch.Generator().manual_seed(0)
    stream = torch.randint(6, (200,), generator=generator)
    pairs = [[0.0] * 6 for _ in range(6)]
    for gap in (1, 2):
        for a, b in zip(stream.tolist(), stream.tolist()[gap:], strict=False):
            pairs[a][b] += 1
            pairs[b][a] += 1
    total, everything = [sum(row) for row in pairs], sum(map(sum, pairs))
    wanted = torch.tensor(
        [
            [max(math.log(max(pairs[i][j] * everything / (total[i] * total[j]), 1e-9)), 0) for j in range(6)]
            for i in range(6)
        ]
    )
    found = count_vectors(stream, 6, dimensions=6)
    # the matrix is U S U^T with signs in S, the vectors are U |S|^(1/2): their products give |S| back
    root = torch.linalg.matrix_power(wanted.double(), 2)
    ours = torch.linalg.matrix_power((found @ found.T).double(), 2)
    torch.testing.assert_close(ours, root, atol=1e-4, rtol=1e-4)


def test_words_that_do_not_occur_have_no_vector():
    vectors = count_vectors(torch.tensor([[0, 1], [0, 2]]), 5, dimensions=2)
    assert vectors[3:].abs().max() < 1e-6
    assert vectors[:3].isfinite().all()


def test_costs():
    vectors = torch.randn(7, 3, generator=torch.Generator().manual_seed(1))
    wanted = torch.tensor([3, 0, 3])
    found = costs_to(vectors, wanted)
    for row, t in zip(found, wanted.tolist(), strict=True):
        torch.testing.assert_close(row, 1 - F.cosine_similarity(vectors, vectors[t : t + 1]))


@pytest.mark.parametrize(("k", "share"), [(1, 4 / 8), (2, 4 / 6), (3, 4 / 4), (4, 2 / 2)])
def test_distinct(k, share):
    assert distinct(torch.tensor([[1, 2, 1, 2], [1, 2, 3, 4]]), k) == share
