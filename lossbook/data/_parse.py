"""From the bytes of a public file to rows. What does not fit is an error with file and line. Private."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class MalformedFileError(ValueError):
    """A file has a row that does not fit its format."""


LONGEST = 300  # characters of what an error says about a place: a line of a file may have megabytes


def malformed(file: str, place: int | str | None, problem: str) -> MalformedFileError:
    """The error for a place in a file: the number of a line, a place in words, or None for the whole."""
    where = f", line {place}" if isinstance(place, int) else f", {place}" if place else ""
    if len(problem) > LONGEST:
        problem = f"{problem[: LONGEST // 2]} ... {problem[-LONGEST // 2 :]}"
    return MalformedFileError(f"{file}{where}: {problem}")


def decode(file: str, content: bytes) -> str:
    """UTF-8 text."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise malformed(file, line, f"not UTF-8 ({error.reason})") from error


def numbered_lines(file: str, content: bytes) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers, without line ends.

    Only ``\\n`` ends a line, with or without a ``\\r`` before it: some reviews hold other characters at which
    ``str.splitlines`` would cut.
    """
    lines = decode(file, content).split("\n")
    if lines[-1] == "":  # the end of the last line, not one more line
        lines.pop()
    return ((number, line.removesuffix("\r")) for number, line in enumerate(lines, 1))


def class_index(classes: Sequence[str]) -> dict[str, int]:
    """The place of each class by its name."""
    return {name: place for place, name in enumerate(classes)}


def look_up(file: str, line: int | str, name: str, places: dict[str, int], what: str = "class") -> int:
    """The place of a class, or an error that names the row."""
    if name not in places:
        raise malformed(file, line, f"{name!r} is not a known {what}")
    return places[name]


# ---------------------------------------------------------------- archives


def unzip(file: str, content: bytes, member: str) -> bytes:
    """One member of a zip archive."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.read(member)
    except (zipfile.BadZipFile, KeyError, EOFError, RuntimeError, ValueError, zlib.error) as error:
        # Broken archives make zipfile raise any of these: a missing member, a negative place, an unknown method.
        raise malformed(file, None, f"cannot read {member!r} from this zip archive: {error}") from error


def gunzip(file: str, content: bytes) -> bytes:
    """A gzip file, unpacked."""
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise malformed(file, None, f"not a whole gzip file: {error}") from error


# ---------------------------------------------------------------- pictures


def parse_idx(file: str, content: bytes, dimensions: int) -> NDArray[np.uint8]:
    """An IDX file of bytes: two zeros, type 8, the number of dimensions, the sizes, the values."""
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes([0, 0, 8, dimensions]):
        raise malformed(file, None, f"not an IDX file of bytes with {dimensions} dimensions")
    shape = tuple(int(size) for size in np.frombuffer(content[4:start], dtype=">u4"))
    if len(content) - start != math.prod(shape):
        raise malformed(
            file, None, f"sizes {shape} need {math.prod(shape)} values, the file has {len(content) - start}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape).copy()


# ---------------------------------------------------------------- texts


def parse_names(file: str, content: bytes) -> tuple[str, ...]:
    """One name a line, no two the same."""
    names: dict[str, None] = {}
    for number, line in numbered_lines(file, content):
        if not line or line in names:
            raise malformed(file, number, f"expected a new name, got {line!r}")
        names[line] = None
    return tuple(names)


def parse_json(file: str, content: bytes) -> Any:
    """A JSON document."""
    try:
        return json.loads(decode(file, content))
    except json.JSONDecodeError as error:
        raise malformed(file, error.lineno, f"not JSON: {error.msg}") from error


def parse_json_names(file: str, content: bytes) -> tuple[str, ...]:
    """A JSON list of names, no two the same."""
    names = parse_json(file, content)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len({*names}) < len(names):
        raise malformed(file, None, "expected a list of different names")
    return tuple(names)


def parse_json_groups(file: str, content: bytes) -> dict[str, list[str]]:
    """A JSON object of lists of names, no name twice."""
    groups = parse_json(file, content)
    seen: set[str] = set()
    if not isinstance(groups, dict):
        raise malformed(file, None, "expected an object of lists of names")
    for group, names in groups.items():
        if not isinstance(names, list):
            raise malformed(file, f"group {group!r}", "expected a list of names")
        for name in names:
            if not isinstance(name, str) or name in seen:
                raise malformed(file, f"group {group!r}", f"expected a new name, got {name!r}")
            seen.add(name)
    return groups


def parse_json_pairs(file: str, document: Any, split: str, places: dict[str, int]) -> tuple[list[str], Tensor]:
    """Texts and classes from ``[text, class]`` rows under one key of a JSON document."""
    rows = document.get(split) if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise malformed(file, None, f"no rows under {split!r}")
    texts, labels = [], []
    for number, row in enumerate(rows, 1):
        place = f"{split!r} row {number}"
        match row:
            case [str(text), str(name)]:
                texts.append(text)
                labels.append(look_up(file, place, name, places))
            case _:
                raise malformed(file, place, f"expected a text and a class, got {row!r}")
    return texts, torch.tensor(labels, dtype=torch.int64)


def parse_csv_pairs(file: str, content: bytes, header: list[str], places: dict[str, int]) -> tuple[list[str], Tensor]:
    """Texts and classes from a CSV file with two columns; a quoted text may have line ends."""
    reader = csv.reader(io.StringIO(decode(file, content), newline=""), strict=True)
    texts, labels = [], []
    line = 1  # where the row begins; the reader's own number is where it ends
    try:
        if (found := next(reader, None)) != header:
            raise malformed(file, line, f"expected the header {header}, got {found}")
        line = reader.line_num + 1
        for row in reader:
            if len(row) != 2:
                raise malformed(file, line, f"expected 2 fields, got {len(row)}")
            texts.append(row[0])
            labels.append(look_up(file, line, row[1], places))
            line = reader.line_num + 1
    except csv.Error as error:
        raise malformed(file, line, f"not CSV: {error}") from error
    return texts, torch.tensor(labels, dtype=torch.int64)


def parse_fields(file: str, content: bytes, count: int, separator: str = "\t") -> Iterator[tuple[int, list[str]]]:
    """Rows of ``count`` fields, none quoted, with their line numbers."""
    for number, line in numbered_lines(file, content):
        fields = line.split(separator)
        if len(fields) != count:
            raise malformed(file, number, f"expected {count} fields, got {len(fields)}")
        yield number, fields


def parse_text_class(file: str, content: bytes, places: dict[str, int]) -> tuple[list[str], Tensor]:
    """Texts and classes from rows of text, tab, class."""
    texts, labels = [], []
    for number, (text, name) in parse_fields(file, content, 2):
        texts.append(text)
        labels.append(look_up(file, number, name, places))
    return texts, torch.tensor(labels, dtype=torch.int64)


def unquote(file: str, number: int, field: str) -> str:
    """A field without its quotes: one with quotes inside stands in quotes and has them doubled."""
    if '"' not in field:
        return field
    inner = field[1:-1].replace('""', "")
    if len(field) < 2 or field[0] != '"' or field[-1] != '"' or '"' in inner:
        raise malformed(file, number, f"quotes do not match in {field!r}")
    return field[1:-1].replace('""', '"')


def parse_text_labels_id(file: str, content: bytes, labels: int) -> tuple[list[str], Tensor, list[str]]:
    """Texts, targets ``(rows, labels)`` and names from rows of text, tab, numbers of labels with commas, tab, name."""
    texts: list[str] = []
    names: list[str] = []
    rows: list[int] = []
    columns: list[int] = []
    known = {str(label): label for label in range(labels)}
    for number, (text, positives, name) in parse_fields(file, content, 3):
        found = [look_up(file, number, label, known, "label") for label in positives.split(",")]
        if len({*found}) < len(found):
            raise malformed(file, number, f"a label twice in {positives!r}")
        rows += [len(texts)] * len(found)
        columns += found
        texts.append(unquote(file, number, text))
        names.append(name)
    targets = torch.zeros(len(texts), labels, dtype=torch.bool)
    targets[rows, columns] = True
    return texts, targets, names


def parse_sentences(file: str, content: bytes) -> list[str]:
    """One sentence a line, without the space around it; no empty line."""
    sentences = []
    for number, line in numbered_lines(file, content):
        if not (sentence := line.strip(" ")):
            raise malformed(file, number, "expected a sentence, got an empty line")
        sentences.append(sentence)
    return sentences


def parse_words(file: str, content: bytes, vocabulary: dict[str, int], end: str, *, grow: bool) -> Tensor:
    """The words of a text as places in the vocabulary, ``end`` after each line. New words join it if it may grow."""
    words: list[int] = []
    for number, line in numbered_lines(file, content):
        for word in [*line.split(), end]:
            if word not in vocabulary:
                if not grow:
                    raise malformed(file, number, f"the word {word!r} is not in the vocabulary")
                vocabulary[word] = len(vocabulary)
            words.append(vocabulary[word])
    return torch.tensor(words, dtype=torch.int64)


def parse_conll(file: str, content: bytes, places: dict[str, int]) -> tuple[list[list[str]], list[Tensor]]:
    """Sentences of tokens and their tags from rows of token, tab, tag; a line of white space ends a sentence.

    Tags are ``O``, ``B-x`` and ``I-x``, and ``I-x`` stands only behind ``B-x`` or ``I-x``.
    """
    sentences: list[list[str]] = []
    tags: list[Tensor] = []
    tokens: list[str] = []
    names: list[str] = []

    def finish() -> None:
        if tokens:
            sentences.append(tokens.copy())
            tags.append(torch.tensor([places[name] for name in names], dtype=torch.int64))
            tokens.clear()
            names.clear()

    for number, line in numbered_lines(file, content):
        if not line.strip():
            finish()
            continue
        token, *rest = line.split("\t")
        if len(rest) != 1 or not token:
            raise malformed(file, number, f"expected a token and a tag, got {line!r}")
        look_up(file, number, rest[0], places, "tag")
        if rest[0].startswith("I-") and (not names or names[-1][1:] != rest[0][1:]):
            raise malformed(file, number, f"the tag {rest[0]!r} continues nothing")
        tokens.append(token)
        names.append(rest[0])
    finish()
    return sentences, tags


# ---------------------------------------------------------------- ARFF

Nominal = dict[str, int]  # the place of each value of a nominal attribute
Attributes = dict[str, Nominal | None]  # by name; None stands for a numeric attribute

QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
ATTRIBUTE = re.compile(rf"@attribute\s+({QUOTED}|[^\s'\"]\S*)\s+(.*)", re.IGNORECASE)
BALANCED = re.compile(rf"""(?:{QUOTED}|[^'"])*+""")  # quotes in pairs
FIELD = re.compile(rf"""((?:{QUOTED}|[^,'"])*+),""")
NUMERIC = ("numeric", "real", "integer")
ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


def parse_label_names(file: str, content: bytes) -> set[str]:
    """The labels of a data set of Mulan, from its XML file."""
    try:
        root = ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise malformed(file, error.position[0], f"not XML: {error}") from error
    names: set[str] = set()
    for label in root:
        name = label.get("name")
        if name is None or name in names:
            raise malformed(file, None, f"expected a new name of a label, got {name!r}")
        names.add(name)
    return names


def parse_arff(file: str, content: bytes, dtype: type[np.floating[Any]]) -> tuple[Attributes, NDArray[Any]]:
    """The attributes of an ARFF file and its values ``(rows, attributes)``.

    A number is itself, infinite where ``dtype`` cannot hold it; a nominal value is its place among the values of its
    attribute; ``?`` is NaN.
    """
    lines = numbered_lines(file, content)
    attributes = arff_header(file, lines)
    columns = list(attributes.items())
    with np.errstate(over="ignore"):
        rows = [
            arff_row(file, number, text, columns, dtype)
            for number, line in lines
            if (text := line.strip()) and not text.startswith("%")
        ]
    return attributes, np.array(rows, dtype=dtype).reshape(len(rows), len(columns))


def arff_header(file: str, lines: Iterator[tuple[int, str]]) -> Attributes:
    """What the lines declare, up to ``@data`` and including it."""
    attributes: Attributes = {}
    for number, line in lines:
        text = line.strip()
        keyword = text.split(maxsplit=1)[0].lower() if text else ""
        if keyword == "@attribute":
            name, values = arff_attribute(file, number, text)
            if name in attributes:
                raise malformed(file, number, f"a second attribute {name!r}")
            attributes[name] = values
        elif keyword == "@data":
            if not attributes:
                raise malformed(file, number, "no @attribute before @data")
            return attributes
        elif keyword and keyword != "@relation" and not keyword.startswith("%"):
            raise malformed(file, number, f"expected @relation, @attribute or @data, got {line!r}")
    raise malformed(file, None, "no @data")


def arff_attribute(file: str, number: int, text: str) -> tuple[str, Nominal | None]:
    """Name and values of one attribute; None for the values of a numeric one."""
    found = ATTRIBUTE.fullmatch(text)
    if not found:
        raise malformed(file, number, f"expected @attribute, a name and a type, got {text!r}")
    name, kind = arff_unquote(file, number, found[1]), found[2]
    if kind.lower() in NUMERIC:
        return name, None
    if not (kind.startswith("{") and kind.endswith("}")):
        raise malformed(file, number, f"expected the type numeric, real, integer or {{value,...}}, got {kind!r}")
    values: Nominal = {}
    for field in arff_fields(file, number, kind[1:-1]):
        value = arff_unquote(file, number, field)
        if not field or value in values:
            raise malformed(file, number, f"expected a new value of {name!r}, got {field!r}")
        values[value] = len(values)
    return name, values


def arff_row(
    file: str, number: int, text: str, columns: list[tuple[str, Nominal | None]], dtype: type[np.floating[Any]]
) -> NDArray[Any]:
    """One row of an ARFF file: all values, or in braces the places and values that are not 0."""
    if not text.startswith("{"):
        fields = arff_fields(file, number, text)
        if len(fields) != len(columns):
            raise malformed(file, number, f"expected {len(columns)} values, got {len(fields)}")
        values = [arff_value(file, number, field, *column) for field, column in zip(fields, columns, strict=True)]
        return np.array(values, dtype=dtype)
    if not text.endswith("}"):
        raise malformed(file, number, "no closing brace")
    row = np.zeros(len(columns), dtype=dtype)
    before = -1
    inside = text[1:-1].strip()
    for entry in arff_fields(file, number, inside) if inside else ():
        place, _, value = entry.partition(" ")
        if not re.fullmatch("[0-9]{1,9}", place) or not before < int(place) < len(columns):
            raise malformed(file, number, f"expected a place after {before} and before {len(columns)}, got {place!r}")
        before = int(place)
        row[before] = arff_value(file, number, value.strip(), *columns[before])
    return row


def arff_value(file: str, number: int, field: str, name: str, values: Nominal | None) -> float:
    """One value of an ARFF file."""
    if field == "?":
        return math.nan
    if values is None:
        return parse_number(file, number, field)
    return look_up(file, number, arff_unquote(file, number, field), values, f"value of {name!r}")


def arff_fields(file: str, number: int, text: str) -> list[str]:
    """What stands between the commas, without the spaces around it; a comma in quotes does not count."""
    if "'" not in text and '"' not in text:
        return [field.strip() for field in text.split(",")]
    if not BALANCED.fullmatch(text):
        raise malformed(file, number, f"quotes do not match in {text!r}")
    return [field.strip() for field in FIELD.findall(f"{text},")]


def arff_unquote(file: str, number: int, field: str) -> str:
    """A name or a value without its quotes; inside them a backslash stands before a quote or another backslash."""
    if not field.startswith(("'", '"')):
        return field
    if not re.fullmatch(QUOTED, field):
        raise malformed(file, number, f"quotes do not match in {field!r}")
    return re.sub(r"\\(.)", lambda found: ESCAPED.get(found[1], found[1]), field[1:-1])


NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")


def parse_number(file: str, line: int | str, field: str) -> float:
    """A finite number in decimal notation; ``float`` alone would also take ``1_000``, ``nan`` and foreign digits."""
    if not NUMBER.fullmatch(field):
        raise malformed(file, line, f"expected a number, got {field!r}")
    value = float(field)
    if not math.isfinite(value):
        raise malformed(file, line, f"expected a finite number, got {field!r}")
    return value


# ---------------------------------------------------------------- tables

Kind = Literal["number", "number or empty", "category", "class", "ignored"]


@dataclass(frozen=True)
class TableFormat:
    """How the file of a table looks.

    Attributes:
        columns: Name and kind of each column, in the file's order.
        classes: The name of each class by what the file says; more than one spelling may have the same name.
        separator: What stands between fields; spaces around a field do not count.
        header: The first line, where there is one.
        unknown: What a category says where the value is not known.
    """

    columns: tuple[tuple[str, Kind], ...]
    classes: dict[str, str]
    separator: str = ","
    header: tuple[str, ...] | None = None
    unknown: str | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes in their order."""
        return tuple(dict.fromkeys(self.classes.values()))


def check_header(file: str, line: int | str, expected: tuple[str, ...], found: list[str]) -> None:
    """An error for the first name of the header that is another one; a header is too long to be shown whole."""
    for place, (name, other) in enumerate(zip_longest(expected, found), 1):
        if name != other:
            raise malformed(file, line, f"expected {name!r} at place {place} of the header, got {other!r}")


def table_rows(file: str, content: bytes, form: TableFormat) -> Iterator[tuple[int | str, list[str]]]:
    """The rows of a text table with their line numbers. Empty lines do not count, the header must be there."""
    expected = form.header
    for number, line in numbered_lines(file, content):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split(form.separator)]
        if expected is not None:
            check_header(file, number, expected, fields)
            expected = None
            continue
        yield number, fields


@cache
def column_letters(column: int) -> str:
    """What a sheet calls a column: 0 is A, 25 is Z, 26 is AA."""
    return (column_letters(column // 26 - 1) if column >= 26 else "") + chr(ord("A") + column % 26)


def xlsx_rows(file: str, content: bytes, form: TableFormat) -> Iterator[tuple[int | str, list[str]]]:
    """The rows of the first sheet of an Office Open XML workbook, with their numbers in the sheet."""
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"

    def document(member: str) -> ElementTree.Element:
        try:
            return ElementTree.fromstring(unzip(file, content, member))
        except ElementTree.ParseError as error:
            raise malformed(file, f"{member} line {error.position[0]}", f"not XML: {error}") from error

    shared = ["".join(item.itertext()) for item in document("xl/sharedStrings.xml").iter(f"{space}si")]
    expected = form.header
    for row in document("xl/worksheets/sheet1.xml").iter(f"{space}row"):
        number = row.get("r")
        place = f"sheet row {number}"
        fields: list[str] = []
        for column, cell in enumerate(row):
            # A row leaves out empty cells, so that the next would slide into their place.
            if cell.get("r") != f"{column_letters(column)}{number}":
                raise malformed(file, place, f"expected the cell {column_letters(column)}, got {cell.get('r')}")
            value = cell.findtext(f"{space}v", "")
            if cell.get("t") == "s":
                if not value.isdigit() or int(value) >= len(shared):
                    raise malformed(file, place, f"there is no shared text {value!r}")
                value = shared[int(value)]
            fields.append(value.strip())
        if expected is not None:
            check_header(file, place, expected, fields)
            expected = None
            continue
        yield place, fields


RowReader = Callable[[str, bytes, TableFormat], Iterator[tuple[int | str, list[str]]]]


def parse_table(
    files: dict[str, bytes], form: TableFormat, reader: RowReader
) -> tuple[Tensor, Tensor, tuple[str, ...], list[int]]:
    """Features ``(rows, features)``, classes ``(rows,)``, names of features, and how many rows each file has.

    The rows of all files, one file after the other.

    A number is one feature, NaN where it is not known. A category is one feature for each of its values, 1 where the
    row has it, 0 elsewhere; values in the order of their names. An unknown category is the value ``?``.
    """
    names_of_classes = class_index(form.class_names)
    places = {spelling: names_of_classes[name] for spelling, name in form.classes.items()}
    cells: list[list[str]] = [[] for _ in form.columns]
    labels: list[int] = []
    numbers: dict[int, list[float]] = {i: [] for i, (_, kind) in enumerate(form.columns) if kind.startswith("number")}
    counts: list[int] = []
    for file, content in files.items():
        before = len(labels)
        for line, fields in reader(file, content, form):
            if len(fields) != len(form.columns):
                raise malformed(file, line, f"expected {len(form.columns)} fields, got {len(fields)}")
            for column, ((name, kind), field) in enumerate(zip(form.columns, fields, strict=True)):
                if kind == "class":
                    labels.append(look_up(file, line, field, places))
                elif kind == "category":
                    if not field:
                        raise malformed(file, line, f"{name} is empty")
                    cells[column].append("?" if field == form.unknown else field)
                elif column in numbers:
                    empty = not field and kind == "number or empty"
                    numbers[column].append(math.nan if empty else parse_number(file, line, field))
        counts.append(len(labels) - before)
    features: list[NDArray[Any]] = []
    names: list[str] = []
    for column, (name, kind) in enumerate(form.columns):
        if column in numbers:
            names.append(name)
            features.append(np.array(numbers[column]))
        elif kind == "category":
            values, place = np.unique(np.array(cells[column], dtype=str), return_inverse=True)
            for i, value in enumerate(values):
                names.append(f"{name}={value}")
                features.append(place == i)
    table = torch.from_numpy(np.stack(features, axis=1, dtype=np.float64))
    return table, torch.tensor(labels, dtype=torch.int64), tuple(names), counts
