"""Made-up English sentences with entities, some inside others, and the relations between them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int, int]
Triple = tuple[int, int, int, int, int]

KINDS = {
    "person": ("captain", "doctor", "judge", "painter", "singer", "minister"),
    "place": ("town", "port", "island", "valley", "village", "province"),
    "organisation": ("University", "Bank", "Museum", "Theatre", "Club", "Institute"),
    "event": ("Marathon", "Festival", "Fair", "Congress", "Regatta", "Exhibition"),
}
"""The types of entities, each with the words that tell its kinds apart."""
TYPES = tuple(KINDS)
PREDICATES = ("born_in", "lives_in", "works_for", "founded", "visited", "located_in")

_FIRST = ("Ada", "Ben", "Cora", "Dina", "Emil", "Faye", "Hugo", "Ida", "Jon", "Lena", "Mara", "Nils")
# A family, a place and a ship may share a name: only the words around it tell which it is.
_NAMES = tuple(
    a + b
    for a in ("Bram", "Dal", "Fel", "Gran", "Hol", "Kel", "Lin", "Nor")
    for b in ("berg", "by", "dale", "ford", "mark", "ton")
)
_PARTS = ("New", "North", "Old", "East")  # a place's name may begin with one
_CLAUSES = (  # predicate, type that stands first, words between, type that stands second; the second is the subject?
    ("born_in", "person", "was born in", "place", False),
    ("born_in", "place", "is the birthplace of", "person", True),
    ("lives_in", "person", "lives in", "place", False),
    ("lives_in", "place", "is home to", "person", True),
    ("works_for", "person", "works for", "organisation", False),
    ("works_for", "organisation", "employs", "person", True),
    ("founded", "person", "founded", "organisation", False),
    ("founded", "organisation", "was founded by", "person", True),
    ("visited", "person", "went to", "event", False),
    ("visited", "event", "was opened by", "person", True),
    ("located_in", "organisation", "moved to", "place", False),
    ("located_in", "place", "is the seat of", "organisation", True),
)
_OPENINGS = ("last year ,", "in spring ,", "as the papers wrote ,", "two weeks ago ,")
_ASIDES = (", after the ship {} had sunk ,", ", says a book on the {} war ,", ", long before the {} affair ,")
_JOINTS = (", and", ", while", ", but", ";")

VOCABULARY = tuple(
    sorted(
        {
            *_FIRST,
            *_NAMES,
            *_PARTS,
            *(word for kinds in KINDS.values() for word in kinds),
            *(word for clause in _CLAUSES for word in clause[2].split()),
            *(word for text in (*_OPENINGS, *_ASIDES, *_JOINTS) for word in text.split() if word != "{}"),
            *("the", "of", "."),
        }
    )
)
"""All words of the sentences."""
_NUMBER = {word: i + 1 for i, word in enumerate(VOCABULARY)}


class Sentences(NamedTuple):
    """Sentences with their entities and relations (see :func:`made_up_sentences`)."""

    tokens: list[list[str]]
    """The words of each sentence."""
    spans: list[list[Span]]
    """Its entities: type, first and last word."""
    triples: list[list[Triple]]
    """Its relations: first and last word of the subject, predicate, first and last word of the object."""


def made_up_sentences(n: int, *, clauses: tuple[int, int] = (1, 3), kinds: bool = False, seed: int) -> Sentences:
    """Sentences of one or more clauses, each of which relates two entities.

    An organisation or an event has the name of a place in it, at its beginning ("Holberg Bank") or at its end ("Bank of
    Holberg"); that place is an entity as well, and the organisation is located there. The same names stand for
    families, places and, outside of all entities, for ships and wars.

    Args:
        n: How many sentences.
        clauses: The least and the largest number of clauses; one has about a dozen words.
        kinds: Every entity shows its kind ("doctor Ada Holberg", "the port of Holberg"), and the kind is its type:
            ``6 * type + kind``, so that there are 24 types. A place inside another entity has kind 0.
        seed: Same seed, same sentences.

    Returns:
        The sentences; types are numbered as in ``TYPES``, predicates as in ``PREDICATES``.

    Raises:
        ValueError: ``n`` is negative, or there is no number of clauses between the two.

    Example:
        >>> made = made_up_sentences(1, clauses=(1, 1), seed=1)
        >>> " ".join(made.tokens[0])
        'last year , captain Ida Kelberg works for the Bank of Holberg .'
        >>> made.spans[0]  # a person, an organisation, and a place inside it
        [(0, 4, 5), (2, 9, 11), (1, 11, 11)]
        >>> made.triples[0]  # she works for the bank; the bank is in Holberg
        [(4, 5, 2, 9, 11), (9, 11, 5, 11, 11)]
    """
    low, high = clauses
    if n < 0 or not 1 <= low <= high:
        raise ValueError(f"n must be at least 0 and clauses 1 <= low <= high, got n={n}, clauses={clauses}")
    rng = random.Random(seed)
    made = Sentences([], [], [])
    for _ in range(n):
        text = _Text(rng, kinds)
        text.say(rng.choice(("", *_OPENINGS)))
        for i in range(rng.randint(low, high)):
            text.say(rng.choice(_JOINTS) if i else "")
            text.clause()
        text.say(".")
        made.tokens.append(text.words)
        made.spans.append(sorted(text.spans, key=lambda span: (span[1], span[2])))
        made.triples.append(sorted(text.triples))
    return made


class _Text:
    """A sentence while it is written."""

    def __init__(self, rng: random.Random, kinds: bool) -> None:
        self.rng, self.kinds = rng, kinds
        self.words: list[str] = []
        self.spans: list[Span] = []
        self.triples: list[Triple] = []

    def say(self, text: str) -> None:
        self.words += text.split()

    def clause(self) -> None:
        predicate, first, verb, second, swapped = self.rng.choice(_CLAUSES)
        one = self.entity(first)
        if self.rng.random() < 0.3:
            self.say(self.rng.choice(_ASIDES).format(self.rng.choice(_NAMES)))
        self.say(verb)
        two = self.entity(second)
        self.relate(two if swapped else one, predicate, one if swapped else two)

    def entity(self, name: str) -> tuple[int, int]:
        """Write an entity of a type; return its first and its last word."""
        rng, kind = self.rng, self.rng.randrange(6)
        word, told = KINDS[name][kind], self.kinds or rng.random() < 0.5
        if name == "person":
            self.say(word if told else "")
            start = len(self.words)
            self.say(f"{rng.choice((*_FIRST, ''))} {rng.choice(_NAMES)}")
        elif name == "place":
            self.say(f"the {word} of" if told else "")
            start = len(self.words)
            self.place()
        else:
            self.say("the")
            start, last = len(self.words), rng.random() < 0.5
            self.say(f"{word} of" if last else "")
            inner = self.place()
            self.mark("place", 0, inner)
            self.say("" if last else word)
            self.relate((start, len(self.words) - 1), "located_in", inner)
        span = start, len(self.words) - 1
        self.mark(name, kind, span)
        return span

    def place(self) -> tuple[int, int]:
        start = len(self.words)
        self.say(f"{self.rng.choice((*_PARTS, '', '', ''))} {self.rng.choice(_NAMES)}")
        return start, len(self.words) - 1

    def mark(self, name: str, kind: int, span: tuple[int, int]) -> None:
        number = TYPES.index(name)
        self.spans.append((6 * number + kind if self.kinds else number, *span))

    def relate(self, subject: tuple[int, int], predicate: str, object_: tuple[int, int]) -> None:
        self.triples.append((*subject, PREDICATES.index(predicate), *object_))


def word_numbers(tokens: Sequence[Sequence[str]]) -> Tensor:
    """The words of sentences as numbers from 1 on, by their place in ``VOCABULARY``; 0 fills up to the longest.

    Args:
        tokens: The sentences.

    Returns:
        int64, ``(N, L)``.

    Raises:
        KeyError: A word is not in the vocabulary.

    Example:
        >>> word_numbers([["the", "Bank"], ["Bank"]]).eq(0).tolist()
        [[False, False], [False, True]]
    """
    numbers = torch.zeros(len(tokens), max(map(len, tokens), default=0), dtype=torch.long)
    for row, words in zip(numbers, tokens, strict=True):
        row[: len(words)] = torch.tensor([_NUMBER[word] for word in words], dtype=torch.long)
    return numbers
