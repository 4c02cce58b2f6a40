"""Public data with spans: Chinese résumés with entities, and English news with entities and their relations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lossbook.data._fetch import content
from lossbook.data._parse import class_index, look_up, malformed, numbered_lines, parse_json
from lossbook.data._registry import public_file

__all__ = ["Conll04", "ResumeNer", "SpanSplit", "conll04", "resume_ner", "spans_of"]

Span = tuple[int, int, int]
Triple = tuple[int, int, int, int, int]


@dataclass(frozen=True, eq=False, repr=False)
class SpanSplit:
    """Sentences with their entities and relations.

    Attributes:
        tokens: n sentences, each a list of tokens.
        spans: For each sentence its entities (type, first token, last token).
        triples: For each sentence its relations (first and last token of the subject, predicate, first and last token
            of the object); empty lists where the data has none.
    """

    tokens: list[list[str]]
    spans: list[list[Span]]
    triples: list[list[Triple]]

    def __repr__(self) -> str:
        counts = {"spans": sum(map(len, self.spans)), "triples": sum(map(len, self.triples))}
        return f"SpanSplit({len(self.tokens)} sentences, {counts['spans']} spans, {counts['triples']} triples)"


@dataclass(frozen=True, eq=False)
class ResumeNer:
    """What :func:`resume_ner` returns: three splits and the names of the types."""

    train: SpanSplit
    validation: SpanSplit
    test: SpanSplit
    types: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Conll04:
    """What :func:`conll04` returns: three splits, the names of the types and of the predicates."""

    train: SpanSplit
    validation: SpanSplit
    test: SpanSplit
    types: tuple[str, ...]
    predicates: tuple[str, ...]


def resume_ner() -> ResumeNer:
    """Résumé NER: sentences of Chinese résumés, a token for each character.

    3,819 sentences with 13,438 entities to train, 463 (1,497) to validate, 477 (1,630) to test. 8 types: nationality,
    education, place, name, organisation, profession, ethnicity, title. The file breaks two sentences at a full stop
    inside an entity; they are joined, so it is 3,821 in the literature.

    Licence: not stated. Source: Zhang and Yang, "Chinese NER Using Lattice LSTM", 2018.
    """
    types = ("CONT", "EDU", "LOC", "NAME", "ORG", "PRO", "RACE", "TITLE")

    def split(part: str) -> SpanSplit:
        name = f"resume-ner/{part}.char.bmes"
        tokens, tags = parse_bmes(name, content(public_file(name)))
        spans = [spans_of(name, row, class_index(types), "BMES") for row in tags]
        return SpanSplit(tokens, spans, [[] for _ in tokens])

    return ResumeNer(split("train"), split("dev"), split("test"), types)


def conll04() -> Conll04:
    """CoNLL04: sentences of English news with entities and relations between them.

    922 sentences with 1,283 relations to train, 231 (343) to validate, 288 (422) to test. 4 types: place, organisation,
    person, other. 5 predicates: who killed whom, who lives where, what lies where, which organisation sits where, who
    works for whom.

    Licence: not stated. Source: Roth and Yih, "A Linear Programming Formulation for Global Inference in Natural
    Language Tasks", 2004.
    """
    types = ("Loc", "Org", "Other", "Peop")
    predicates = ("Kill", "Live_In", "Located_In", "OrgBased_In", "Work_For")

    def split(part: str) -> SpanSplit:
        name = f"conll04/{part}.json"
        rows = list(_sentences(name, parse_json(name, content(public_file(name)))))
        spans = [
            spans_of(f"{name}: sentence {i}", row["tags"], class_index(types), "BILU") for i, row in enumerate(rows)
        ]
        triples = []
        for i, (row, found) in enumerate(zip(rows, spans, strict=True)):
            try:
                triples.append([_triple(relation, found, class_index(predicates)) for relation in row["relations"]])
            except (KeyError, IndexError, TypeError) as error:
                raise malformed(name, f"sentence {i}", f"a relation cannot be read: {error!r}") from None
        return SpanSplit([row["tokens"] for row in rows], spans, triples)

    return Conll04(split("train"), split("dev"), split("test"), types, predicates)


def _sentences(file: str, document: Any) -> Iterator[dict[str, Any]]:
    """The sentences of a file, each with as many tags as tokens."""
    if not isinstance(document, list):
        raise malformed(file, None, "expected a list of sentences")
    for i, row in enumerate(document):
        known = isinstance(row, dict) and {"tokens", "tags", "relations"} <= row.keys()
        if not known or len(row["tokens"]) != len(row["tags"]):
            raise malformed(file, f"sentence {i}", "expected tokens, as many tags, and relations")
        yield row


def _triple(relation: dict[str, Any], spans: Sequence[Span], predicates: dict[str, int]) -> Triple:
    subject, object_ = spans[relation["head"]], spans[relation["tail"]]
    return (*subject[1:], predicates[relation["type"]], *object_[1:])


def parse_bmes(file: str, content: bytes) -> tuple[list[list[str]], list[list[str]]]:
    """Sentences and their tags from rows of a character, a space and a tag.

    An empty line ends a sentence, unless it stands inside an entity.
    """
    tokens: list[list[str]] = [[]]
    tags: list[list[str]] = [[]]
    for number, line in numbered_lines(file, content):
        if not line.strip():
            if tokens[-1] and tags[-1][-1][0] not in "BM":
                tokens.append([])
                tags.append([])
            continue
        character, _, tag = line.rpartition(" ")
        if not character or not tag:
            raise malformed(file, number, f"expected a character and a tag, got {line!r}")
        tokens[-1].append(character)
        tags[-1].append(tag)
    return (tokens, tags) if tokens[-1] else (tokens[:-1], tags[:-1])


def spans_of(file: str, tags: Sequence[str], types: dict[str, int], scheme: str = "BILU") -> list[Span]:
    """The spans that the tags of a sentence mark, by their first token.

    Args:
        file: What an error names.
        tags: A tag for each token: ``O``, or a letter, a hyphen and a type.
        types: The number of each type.
        scheme: The letters of a span's first token, of one inside, of its last one, and of a span of one token.

    Raises:
        lossbook.data.MalformedFileError: A tag is unknown, or continues or ends no span, or a span is left open.

    Example:
        >>> spans_of("a sentence", ["B-Peop", "L-Peop", "O", "U-Loc"], {"Loc": 0, "Peop": 1})
        [(1, 0, 1), (0, 3, 3)]
    """
    first, inside, last, alone = tuple(scheme)
    found: list[Span] = []
    begun: tuple[str, int] | None = None
    for place, tag in enumerate((*tags, "O")):
        letter, _, kind = tag.partition("-")
        where = f"token {place}"
        if begun and not (letter in (inside, last) and kind == begun[0]):
            raise malformed(file, where, f"the span of {begun[0]!r} from token {begun[1]} is not ended before {tag!r}")
        if tag == "O":
            continue
        number = look_up(file, where, kind, types, "type")
        if letter == first:
            begun = kind, place
        elif letter == alone:
            found.append((number, place, place))
        elif begun is None or letter not in (inside, last):
            raise malformed(file, where, f"the tag {tag!r} continues nothing")
        elif letter == last:
            found.append((number, begun[1], place))
            begun = None
    return found
