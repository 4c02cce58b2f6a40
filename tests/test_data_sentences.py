"""Made-up sentences: what their spans and triples say is what stands there."""

import itertools

import pytest
import torch

from lossbook.data.sentences import (
    _FIRST,
    _NAMES,
    _PARTS,
    KINDS,
    PREDICATES,
    TYPES,
    VOCABULARY,
    made_up_sentences,
    word_numbers,
)

BOTH = pytest.mark.parametrize("kinds", [False, True])


def words(tokens, start, end):
    return tokens[start : end + 1]


@BOTH
def test_entities_are_what_their_types_say(kinds):
    made = made_up_sentences(200, kinds=kinds, seed=3)
    seen = set()
    for tokens, spans in zip(made.tokens, made.spans, strict=True):
        assert spans == sorted(spans, key=lambda span: (span[1], span[2]))
        for number, start, end in spans:
            kind, name = (number % 6, TYPES[number // 6]) if kinds else (None, TYPES[number])
            own, before = words(tokens, start, end), tokens[start - 1] if start else ""
            seen.add(number)
            if name == "person":
                assert own[-1] in _NAMES
                assert len(own) == 1 or own[0] in _FIRST
                assert not kinds or before == KINDS[name][kind]
            elif name == "place":
                assert own[-1] in _NAMES
                assert len(own) == 1 or own[0] in _PARTS
                inside = any(s <= start and end <= e and (s, e) != (start, end) for _, s, e in spans)
                assert not kinds or (kind == 0 if inside else tokens[start - 2 : start] == [KINDS[name][kind], "of"])
            else:
                assert before == "the"
                word = own[-1] if own[-1] in KINDS[name] else own[0]
                assert word in KINDS[name]
                assert not kinds or word == KINDS[name][kind]
                places = [s for s in spans if s[0] // (6 if kinds else 1) == 1 and start <= s[1] and s[2] <= end]
                assert len(places) == 1
                assert (places[0][1] == start) != (places[0][2] == end)
    assert seen == set(range(24 if kinds else 4))


@BOTH
def test_relations_hold_between_entities_of_the_right_types(kinds):
    made = made_up_sentences(200, kinds=kinds, seed=4)
    types = {"born_in": (0, 1), "lives_in": (0, 1), "works_for": (0, 2), "founded": (0, 2), "visited": (0, 3)}
    seen = set()
    for spans, triples in zip(made.spans, made.triples, strict=True):
        found = {(s, e): number // (6 if kinds else 1) for number, s, e in spans}
        assert len(found) == len(spans)
        for a, b, predicate, c, d in triples:
            name = PREDICATES[predicate]
            pair = found[a, b], found[c, d]
            assert pair == types[name] if name in types else pair in {(2, 1), (3, 1)}
            seen.add((name, a < c))
    assert seen == set(itertools.product(PREDICATES, (False, True)))  # either may stand first


def test_words_and_numbers():
    made = made_up_sentences(300, clauses=(1, 4), kinds=True, seed=5)
    assert {word for tokens in made.tokens for word in tokens} == set(VOCABULARY)
    numbers = word_numbers(made.tokens)
    assert numbers.dtype == torch.int64
    assert numbers.shape == (300, max(map(len, made.tokens)))
    for row, tokens in zip(numbers.tolist(), made.tokens, strict=True):
        assert [VOCABULARY[i - 1] for i in row if i] == tokens
        assert not any(row[len(tokens) :])
    assert word_numbers([]).shape == (0, 0)
    with pytest.raises(KeyError, match="tree"):
        word_numbers([["tree"]])


def test_clauses_make_a_sentence_long():
    one = made_up_sentences(50, clauses=(1, 1), seed=6)
    assert all(10 >= len(triples) >= 1 for triples in one.triples)
    longest = max(map(len, one.tokens))
    many = made_up_sentences(50, clauses=(6, 6), seed=6)
    assert longest < sum(map(len, many.tokens)) / 50 < 6 * longest


def test_a_seed_gives_the_same_sentences():
    assert made_up_sentences(5, seed=1) == made_up_sentences(5, seed=1)
    assert made_up_sentences(5, seed=1).tokens != made_up_sentences(5, seed=2).tokens
    assert made_up_sentences(0, seed=0).tokens == []


@pytest.mark.parametrize(("n", "clauses"), [(-1, (1, 3)), (1, (0, 3)), (1, (3, 2))])
def test_what_is_refused(n, clauses):
    with pytest.raises(ValueError, match="n must be at least 0 and clauses 1 <= low <= high, got n="):
        made_up_sentences(n, clauses=clauses, seed=0)
