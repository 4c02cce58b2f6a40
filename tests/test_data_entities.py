"""Entities and relations: what tags mark, and the numbers that the makers of the data state."""

import gzip
import json
import os

import pytest

from lossbook.data import _fetch, entities
from lossbook.data._parse import MalformedFileError
from lossbook.data._registry import public_sets
from lossbook.data.entities import conll04, parse_bmes, resume_ner, spans_of

TYPES = {"A": 0, "B": 1}
HERE = pytest.mark.skipif(
    not (os.environ.get("LOSSBOOK_DATA") and (_fetch.data_folder() / "conll04").exists()),
    reason="LOSSBOOK_DATA names no folder with conll04",
)


def test_spans_of_tags():
    assert spans_of("x", [], TYPES) == []
    assert spans_of("x", ["U-A", "B-B", "I-B", "L-B", "B-A", "L-A", "O"], TYPES) == [(0, 0, 0), (1, 1, 3), (0, 4, 5)]
    assert spans_of("x", ["S-A", "B-B", "M-B", "E-B"], TYPES, "BMES") == [(0, 0, 0), (1, 1, 3)]


@pytest.mark.parametrize(
    ("tags", "text"),
    [
        (["I-A"], "'I-A' continues nothing"),
        (["L-A"], "'L-A' continues nothing"),
        (["B-A", "L-B"], "the span of 'A' from token 0 is not ended before 'L-B'"),
        (["B-A", "O"], "is not ended before 'O'"),
        (["B-A"], "is not ended before 'O'"),
        (["B-A", "B-A", "L-A"], "is not ended before 'B-A'"),
        (["U-C"], "type"),
        (["X-A"], "'X-A' continues nothing"),
    ],
)
def test_tags_that_mark_no_span(tags, text):
    with pytest.raises(MalformedFileError, match=text):
        spans_of("x", tags, TYPES)


def test_rows_of_characters():
    tokens, tags = parse_bmes("x", "高 B-A\n勇 E-A\n\n\n  O\n。 O".encode())
    assert tokens == [["高", "勇"], [" ", "。"]]
    assert tags == [["B-A", "E-A"], ["O", "O"]]
    assert parse_bmes("x", b"a B-A\n\n. M-A\nb E-A\n")[0] == [["a", ".", "b"]]  # no sentence ends inside an entity
    with pytest.raises(MalformedFileError, match="expected a character and a tag, got 'B-A'"):
        parse_bmes("x", b"B-A\n")


@pytest.mark.parametrize(
    "rows",
    [
        {},
        [{"tokens": ["a"], "tags": [], "relations": []}],
        [{"tokens": ["a"], "tags": ["U-Loc"], "relations": [{"head": 0, "tail": 1, "type": "Kill"}]}],
        [{"tokens": ["a"], "tags": ["U-Loc"], "relations": [{"head": 0, "tail": 0, "type": "Love"}]}],
    ],
)
def test_sentences_that_cannot_be_read(rows, monkeypatch):
    monkeypatch.setattr(entities, "content", lambda _: json.dumps(rows).encode())
    with pytest.raises(MalformedFileError):
        conll04()


@HERE
def test_conll04_is_what_its_makers_say():
    data = conll04()
    parts = (data.train, data.validation, data.test)
    assert [len(part.tokens) for part in parts] == [922, 231, 288]
    assert [sum(map(len, part.triples)) for part in parts] == [1283, 343, 422]
    first = data.validation
    assert [first.tokens[0][a : b + 1] for _, a, b in first.spans[0]] == [
        ["John", "Wilkes", "Booth"],
        ["President", "Lincoln"],
    ]
    assert first.triples[0] == [(0, 2, data.predicates.index("Kill"), 6, 7)]
    for part in parts:
        for tokens, spans, triples in zip(part.tokens, part.spans, part.triples, strict=True):
            known = {span[1:] for span in spans}
            assert all(0 <= a <= b < len(tokens) for _, a, b in spans)
            assert all({t[:2], t[3:]} <= known for t in triples)
    assert repr(data.train) == "SpanSplit(922 sentences, 3377 spans, 1283 triples)"


@HERE
def test_resume_ner_is_what_its_makers_say():
    data = resume_ner()
    parts = (data.train, data.validation, data.test)
    assert [len(part.tokens) for part in parts] == [3819, 463, 477]
    assert sum(map(len, data.train.spans)) == 13438
    assert "".join(data.train.tokens[0][:2]) == "高勇"
    assert data.train.spans[0][0] == (data.types.index("NAME"), 0, 1)


@HERE
def test_the_registry_names_the_files():
    for name in ("conll04", "resume-ner"):
        for file in public_sets()[name].files:
            path = _fetch.data_folder() / file.name
            raw = (
                path.read_bytes() if path.exists() else gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes())
            )
            assert len(raw) == file.size
