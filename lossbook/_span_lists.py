"""Spans and triples as lists: to indices and back, off the scores, and how many of them are right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lossbook._checks import (
    _check_tensor,
    check_flag,
    check_floating,
    check_ignore_index,
    check_integer,
    check_mask,
    check_number,
    describe,
)

Span = tuple[int, int, int]
Triple = tuple[int, int, int, int, int]


def span_mask(lengths: Tensor, *, length: int | None = None, triangular: bool = True) -> Tensor:
    """Which pairs of tokens are spans of their sentence: those inside it, whose end is not before their start.

    Args:
        lengths: The number of tokens of each sentence, integers ``(B,)``.
        length: L, the length to which the sentences are padded; None for the longest.
        triangular: False admits an end before its start, for pairs of heads and of tails.

    Returns:
        A boolean tensor ``(B, 1, L, L)``, to be broadcast over the types.

    Raises:
        TypeError: ``lengths`` is no integer tensor.
        ValueError: A length is negative or above L.

    Example:
        >>> span_mask(torch.tensor([2, 3]))[0, 0]
        tensor([[ True,  True, False],
                [False,  True, False],
                [False, False, False]])

    Equation :eq:`spans-mask` of the chapter.
    """
    lengths = _one_each(lengths)
    longest = int(lengths.max()) if lengths.numel() else 0
    size = longest if length is None else check_integer("length", length, low=0)
    if longest > size or (lengths.numel() and int(lengths.min()) < 0):
        raise ValueError(f"lengths must lie in [0, {size}], got {int(lengths.min())} to {longest}")
    places = torch.arange(size, device=lengths.device)
    inside = places < lengths.unsqueeze(-1)
    pairs = inside.unsqueeze(-1) & inside.unsqueeze(-2)
    if check_flag("triangular", triangular):
        pairs = pairs & (places.unsqueeze(-1) <= places)
    return pairs.unsqueeze(1)


def spans_to_index(
    spans: Sequence[Iterable[Span]],
    length: int,
    num_types: int,
    *,
    lengths: Sequence[int] | Tensor | None = None,
    triangular: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    r"""Spans as padded positions in the flattened matrix of their type, the labels of :func:`span_loss`.

    .. math:: (\text{type}, \text{start}, \text{end}) \mapsto \text{start} \cdot L + \text{end}

    A position needs 8 bytes, a matrix of zeros and ones :math:`L^2` numbers for every type.

    Args:
        spans: For each sentence its (type, start, end), tokens counted from 0, the end included.
        length: L, the length to which the sentences are padded.
        num_types: How many types there are.
        lengths: The number of tokens of each sentence; None if all have L.
        triangular: False admits an end before its start, for pairs of heads and of tails.
        ignore_index: What pads the rows.

    Returns:
        Integers ``(B, num_types, k)``, k being the largest number of spans of one type in one sentence, at least 1.

    Raises:
        TypeError: A span is not three integers.
        ValueError: A span ends before it starts or outside its sentence, or has no such type: no label gets lost.

    Example:
        >>> spans_to_index([[(0, 1, 2), (1, 0, 0)], []], length=4, num_types=2)
        tensor([[[   6],
                 [   0]],
        <BLANKLINE>
                [[-100],
                 [-100]]])

    Equation :eq:`spans-index` of the chapter.
    """
    size, types = check_integer("length", length, low=0), check_integer("num_types", num_types, low=1)
    ignored = check_ignore_index(ignore_index)
    if 0 <= ignored < size * size:
        raise ValueError(f"ignore_index must be no position, below 0 or from {size * size} on, got {ignored}")
    given, triangular = _lists("spans", spans, "type, start, end"), check_flag("triangular", triangular)
    real = [size] * len(given) if lengths is None else _integers(lengths)
    if len(real) != len(given) or any(not 0 <= n <= size for n in real):
        raise ValueError(f"lengths must be {len(given)} numbers in [0, {size}], one a sentence, got {real}"[:300])
    rows: list[list[list[int]]] = []
    for i, (found, tokens) in enumerate(zip(given, real, strict=True)):
        row: list[list[int]] = [[] for _ in range(types)]
        for span in found:
            kind, start, end = _span(span, i, types, tokens, triangular)
            row[kind].append(start * size + end)
        rows.append(row)
    most = max((len(places) for row in rows for places in row), default=0)
    index = torch.full((len(rows), types, max(most, 1)), ignored)
    for i, row in enumerate(rows):
        for kind, places in enumerate(row):
            index[i, kind, : len(places)] = torch.tensor(places, dtype=torch.long)
    return index


def _check_integers(tensor: Tensor, name: str) -> Tensor:
    _check_tensor(tensor, name, " of integers")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {describe(tensor)}")
    return tensor.long()  # torch computes little in the unsigned dtypes


def _one_each(lengths: Tensor) -> Tensor:
    lengths = _check_integers(lengths, "lengths")
    if lengths.dim() != 1:
        raise ValueError(f"lengths must have the shape (B,), got {describe(lengths)}")
    return lengths


def _integers(lengths: Sequence[int] | Tensor) -> list[int]:
    if isinstance(lengths, Tensor):
        return [int(n) for n in _one_each(lengths).tolist()]
    if not isinstance(lengths, Iterable):
        raise TypeError(f"lengths must be integers, one a sentence, got {describe(lengths)}")
    return [check_integer("each of lengths", n) for n in lengths]


def _lists(name: str, given: Iterable[Iterable[Iterable[int]]], parts: str) -> list[list[list[int]]]:
    """For each sentence its spans or triples."""
    try:
        return [[list(one) for one in row] for row in given]
    except TypeError:
        wanted = f"a list for each sentence, [[({parts}), ...], ...]"
        raise TypeError(f"{name} must hold {wanted}, got {describe(given)}") from None


def _span(parts: list[int], sentence: int, types: int, tokens: int, triangular: bool) -> Span:
    """The span as three integers, or the error that names it."""
    if len(parts) != 3:
        raise TypeError(f"a span must be (type, start, end), got {str(parts)[:60]} in sentence {sentence}")
    kind, start, end = (check_integer(n, x) for n, x in zip(("type", "start", "end"), parts, strict=True))
    where = f"the span {(kind, start, end)} of sentence {sentence}"
    if not 0 <= kind < types:
        raise ValueError(f"{where} has no type in [0, {types})")
    if not (0 <= start < tokens and 0 <= end < tokens):
        raise ValueError(f"{where} is not inside its {tokens} tokens")
    if triangular and end < start:
        raise ValueError(f"{where} ends before it starts")
    return kind, start, end


def index_to_spans(index: Tensor, length: int, *, ignore_index: int = -100) -> list[list[Span]]:
    """The spans that :func:`spans_to_index` was given, in the order of types, then as they were.

    Args:
        index: Integers ``(B, num_types, k)``.
        length: L, as in :func:`spans_to_index`.
        ignore_index: What pads the rows.

    Raises:
        TypeError: ``index`` is no integer tensor.
        ValueError: ``index`` has another shape, or holds a number that is no position.

    Example:
        >>> index_to_spans(torch.tensor([[[6], [0]], [[-100], [-100]]]), length=4)
        [[(0, 1, 2), (1, 0, 0)], []]

    Equation :eq:`spans-back` of the chapter's evidence.
    """
    index = _check_integers(index, "index")
    if index.dim() != 3:
        raise ValueError(f"index must have the shape (B, num_types, k), got {describe(index)}")
    size, ignored = check_integer("length", length, low=0), check_ignore_index(ignore_index)
    found: list[list[Span]] = []
    for row in index.tolist():
        places = [(kind, place) for kind, each in enumerate(row) for place in each if place != ignored]
        wrong = [place for _, place in places if not 0 <= place < size * size]
        if wrong:
            raise ValueError(f"index must hold positions in [0, {size * size}) or {ignored}, got {wrong[0]}")
        found.append([(kind, *divmod(place, size)) for kind, place in places])
    return found


def decode_spans(
    input: Tensor, *, mask: Tensor | None = None, threshold: float = 0.0, overlaps: bool = True
) -> list[list[Span]]:
    """The spans whose score lies above the threshold.

    Args:
        input: Scores ``(B, num_types, L, L)``.
        mask: Boolean, broadcastable to ``input``, as :func:`span_mask` makes it; where it is False there is no span.
        threshold: The score that a span must exceed.
        overlaps: False takes spans by their score, the highest first, and leaves out what shares a token with one taken
            before, of whatever type, and pairs whose end is before their start, which hold no token.

    Returns:
        For each sentence its (type, start, end), by start, end and type.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: ``input`` has another shape, the mask does not fit, or the threshold is not finite.

    Example:
        >>> scores = torch.full((1, 1, 3, 3), -1.0)
        >>> scores[0, 0, 0, 1], scores[0, 0, 1, 2] = 2.0, 3.0
        >>> decode_spans(scores)
        [[(0, 0, 1), (0, 1, 2)]]
        >>> decode_spans(scores, overlaps=False)
        [[(0, 1, 2)]]

    Equation :eq:`spans-decode` of the chapter's evidence.
    """
    scores = check_pairs(input)
    above = scores > check_number("threshold", threshold)
    if (m := check_mask(mask, input.shape)) is not None:
        above = above & m
    keep_all = check_flag("overlaps", overlaps)
    found: list[list[tuple[float, Span]]] = [[] for _ in range(len(scores))]
    places = above.nonzero()
    values = scores[above].tolist()
    for (sentence, kind, start, end), value in zip(places.tolist(), values, strict=True):
        found[sentence].append((value, (kind, start, end)))
    return [_in_order([s for _, s in row] if keep_all else _apart(row)) for row in found]


def _in_order(spans: list[Span]) -> list[Span]:
    return sorted(spans, key=lambda span: (span[1], span[2], span[0]))


def _apart(scored: list[tuple[float, Span]]) -> list[Span]:
    """Spans that share no token: greedily, the highest score first."""
    taken: set[int] = set()
    kept = []
    for _, span in sorted(scored, key=lambda pair: -pair[0]):
        tokens = set(range(span[1], span[2] + 1))
        if tokens and not tokens & taken:
            taken |= tokens
            kept.append(span)
    return kept


def decode_triples(
    subjects: Tensor,
    objects: Tensor,
    heads: Tensor,
    tails: Tensor,
    *,
    mask: Tensor | None = None,
    threshold: float = 0.0,
) -> list[list[Triple]]:
    r"""The triples that all four matrices admit.

    .. math::

        S_{\mathrm s}(s_h, s_t) > s_0, \quad S_{\mathrm o}(o_h, o_t) > s_0, \quad
        S_p(s_h, o_h) > s_0, \quad S_p(s_t, o_t) > s_0

    Args:
        subjects: Scores of subjects ``(B, 1, L, L)``: start and end.
        objects: Scores of objects ``(B, 1, L, L)``.
        heads: Scores of predicates ``(B, P, L, L)``: start of the subject and start of the object.
        tails: Scores of predicates ``(B, P, L, L)``: end of the subject and end of the object.
        mask: Boolean, broadcastable to ``subjects``, as :func:`span_mask` makes it, for subjects and objects.
        threshold: :math:`s_0`.

    Returns:
        For each sentence its (subject start, subject end, predicate, object start, object end), sorted.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Shapes do not fit, or the threshold is not finite.

    Example:
        >>> spans, pairs = torch.full((1, 1, 3, 3), -1.0), torch.full((1, 2, 3, 3), -1.0)
        >>> subjects, objects, heads, tails = spans.clone(), spans.clone(), pairs.clone(), pairs.clone()
        >>> subjects[0, 0, 0, 1] = objects[0, 0, 2, 2] = heads[0, 1, 0, 2] = tails[0, 1, 1, 2] = 1.0
        >>> decode_triples(subjects, objects, heads, tails)
        [[(0, 1, 1, 2, 2)]]

    Equation :eq:`spans-triples` of the chapter. Source: Su Jianlin, scientific spaces 8888 (2022), "GPLinker".
    """
    matrices = {"subjects": subjects, "objects": objects, "heads": heads, "tails": tails}
    for name, scores in matrices.items():
        check_pairs(scores, name)
    for name, scores in matrices.items():
        wanted = (len(subjects), 1 if name in ("subjects", "objects") else heads.shape[1], *subjects.shape[2:])
        if tuple(scores.shape) != wanted:
            raise ValueError(f"{name} must have the shape {wanted}, got {describe(scores)}")
    s_0 = check_number("threshold", threshold)
    starts = decode_spans(subjects, mask=mask, threshold=s_0)
    ends = decode_spans(objects, mask=mask, threshold=s_0)
    head, tail = (heads > s_0).cpu(), (tails > s_0).cpu()
    found: list[list[Triple]] = []
    for i, (these, those) in enumerate(zip(starts, ends, strict=True)):
        pairs = [(s, o) for s in these for o in those]
        corners = torch.tensor([(*s[1:], *o[1:]) for s, o in pairs], dtype=torch.long, device="cpu").reshape(-1, 4)
        s_h, s_t, o_h, o_t = corners.unbind(1)
        both = head[i][:, s_h, o_h] & tail[i][:, s_t, o_t]
        found.append(sorted((*pairs[n][0][1:], p, *pairs[n][1][1:]) for p, n in both.nonzero().tolist()))
    return found


def check_pairs(input: Tensor, name: str = "input") -> Tensor:
    """Scores ``(B, types, L, L)`` as they are."""
    check_floating(input, name, what=" of scores")
    if input.dim() != 4 or input.shape[-1] != input.shape[-2]:
        raise ValueError(f"{name} must have the shape (B, types, L, L), got {describe(input)}")
    return input


def span_f1(predicted: Sequence[Iterable[Span]], true: Sequence[Iterable[Span]]) -> float:
    """F1 over the spans of all sentences: a span is right if its type, start and end are.

    Args:
        predicted: For each sentence its spans; a span that is given twice counts once.
        true: The same, as they should be.

    Returns:
        ``2 right / (predicted + true)``, 0 where there is nothing to count.

    Raises:
        TypeError: A span is not three integers.
        ValueError: There is no sentence, or the numbers of sentences differ.

    Example:
        >>> span_f1([[(0, 1, 2), (1, 0, 0)], []], [[(0, 1, 2)], [(1, 0, 0)]])
        0.5

    Equation :eq:`spans-f1` of the chapter's evidence.
    """
    return _f1(predicted, true, "type, start, end")


def triple_f1(predicted: Sequence[Iterable[Triple]], true: Sequence[Iterable[Triple]]) -> float:
    """F1 over the triples of all sentences: a triple is right if its five numbers are; see :func:`span_f1`.

    Example:
        >>> triple_f1([[(0, 1, 1, 2, 2)]], [[(0, 1, 1, 2, 2), (0, 1, 0, 2, 2)]]).__round__(4)
        0.6667

    Equation :eq:`spans-f1` of the chapter's evidence.
    """
    return _f1(predicted, true, "subject start, subject end, predicate, object start, object end")


def _f1(predicted: Iterable[Iterable[Iterable[int]]], true: Iterable[Iterable[Iterable[int]]], parts: str) -> float:
    found, wanted = _sets("predicted", predicted, parts), _sets("true", true, parts)
    if len(found) != len(wanted) or not wanted:
        raise ValueError(f"predicted and true must have one list a sentence, got {len(found)} and {len(wanted)}")
    pairs = list(zip(found, wanted, strict=True))
    counted = sum(len(p) + len(t) for p, t in pairs)
    return 2 * sum(len(p & t) for p, t in pairs) / max(counted, 1)


def _sets(name: str, given: Iterable[Iterable[Iterable[int]]], parts: str) -> list[set[tuple[int, ...]]]:
    rows = _lists(name, given, parts)
    for one in (one for row in rows for one in row):
        if len(one) != parts.count(",") + 1:
            raise TypeError(f"{name} must hold ({parts}), got {str(one)[:60]}")
        one[:] = [check_integer(f"each number of {name}", n) for n in one]
    return [set(map(tuple, row)) for row in rows]
