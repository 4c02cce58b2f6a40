"""Public data sets at full size, one function each, and :func:`read_arff` for files of your own.

A loader takes the files from the folder that ``LOSSBOOK_DATA`` names, else from the cache, else it downloads them
into the cache. It compares every file with its SHA-256 before it reads a row, and refuses a row that does not fit.
``python -m lossbook.data list`` says what there is, where it comes from, under which licence, and what is here.

Pictures, labels, targets and features are tensors on the CPU, texts are lists of ``str``, names of classes are tuples
in the order of the labels. Splits are those of the set's makers; a set that has none comes in one piece.

Every loader raises:

- ``MissingFileError`` (a ``FileNotFoundError``): a file is not here and could not be downloaded. The message says what
  to download, from where, to where.
- ``WrongFileError`` (a ``ValueError``): a file is cut off, altered or another one.
- ``MalformedFileError`` (a ``ValueError``): a row does not fit; the message names file and line.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossbook.data import _tables
from lossbook.data._fetch import MissingFileError, WrongFileError, content
from lossbook.data._parse import (
    MalformedFileError,
    class_index,
    gunzip,
    malformed,
    parse_arff,
    parse_conll,
    parse_csv_pairs,
    parse_idx,
    parse_json,
    parse_json_groups,
    parse_json_names,
    parse_json_pairs,
    parse_label_names,
    parse_names,
    parse_sentences,
    parse_table,
    parse_text_class,
    parse_text_labels_id,
    parse_words,
    unzip,
)
from lossbook.data._registry import PublicFile, PublicSet, public_file, public_sets

__all__ = [
    "UCI",
    "ArffTable",
    "Banking77",
    "Clinc150",
    "FashionMnist",
    "GoEmotions",
    "ImageSplit",
    "MalformedFileError",
    "MissingFileError",
    "MultilabelSplit",
    "MultilabelTable",
    "MultilabelTextSplit",
    "PublicFile",
    "PublicSet",
    "SentimentZh",
    "Table",
    "TaggedSplit",
    "TextSet",
    "TextSplit",
    "WikiText2",
    "Wnut17",
    "WrongFileError",
    "banking77",
    "bibtex",
    "clinc150",
    "delicious",
    "enron",
    "fashion_mnist",
    "goemotions",
    "medical",
    "public_sets",
    "read_arff",
    "rt_polarity",
    "scene",
    "sentiment_zh",
    "tmc2007",
    "uci",
    "wikitext2",
    "wnut17",
    "yeast",
]

UCI = tuple(_tables.TABLES)  # the names that uci() takes
GZIP = b"\x1f\x8b"  # how a gzip file begins


class _Brief:
    """Prints sizes instead of thousands of rows."""

    def __repr__(self) -> str:
        parts = []
        for field in fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value: Any = getattr(self, field.name)
            if isinstance(value, Tensor):
                value = f"<{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}>"
            elif isinstance(value, list | tuple | dict):
                value = f"<{len(value)}>"
            parts.append(f"{field.name}={value}")
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, eq=False, repr=False)
class ImageSplit(_Brief):
    """Grey pictures and their classes.

    Attributes:
        images: uint8 ``(n, height, width)``, 0 is black.
        labels: int64 ``(n,)``.
    """

    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class TextSplit(_Brief):
    """Texts and their classes.

    Attributes:
        texts: n texts.
        labels: int64 ``(n,)``.
    """

    texts: list[str]
    labels: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class TextSet(_Brief):
    """Texts and their classes, not split.

    Attributes:
        texts: n texts.
        labels: int64 ``(n,)``.
        classes: Their names.
    """

    texts: list[str]
    labels: Tensor
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class MultilabelTextSplit(_Brief):
    """Texts and the labels that each has.

    Attributes:
        texts: n texts.
        targets: bool ``(n, labels)``.
        ids: What the makers call each text.
    """

    texts: list[str]
    targets: Tensor
    ids: list[str]


@dataclass(frozen=True, eq=False, repr=False)
class MultilabelSplit(_Brief):
    """Rows of features and the labels that each has.

    Attributes:
        features: float32 ``(n, features)``.
        targets: bool ``(n, labels)``.
    """

    features: Tensor
    targets: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class TaggedSplit(_Brief):
    """Sentences with a tag for each token.

    Attributes:
        tokens: n sentences, each a list of tokens.
        tags: n tensors, int64 ``(tokens,)``.
    """

    tokens: list[list[str]]
    tags: list[Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class FashionMnist(_Brief):
    """What :func:`fashion_mnist` returns: two splits and the names of the classes."""

    train: ImageSplit
    test: ImageSplit
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Banking77(_Brief):
    """What :func:`banking77` returns: two splits and the names of the classes."""

    train: TextSplit
    test: TextSplit
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Clinc150(_Brief):
    """What :func:`clinc150` returns.

    Attributes:
        train: Requests with an intent.
        validation: More of them.
        test: More of them.
        oos_train: Requests that have none of the intents (out of scope).
        oos_validation: More of them.
        oos_test: More of them.
        classes: The names of the intents.
        domains: The domain of each intent.
    """

    train: TextSplit
    validation: TextSplit
    test: TextSplit
    oos_train: list[str]
    oos_validation: list[str]
    oos_test: list[str]
    classes: tuple[str, ...]
    domains: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class WikiText2(_Brief):
    """What :func:`wikitext2` returns.

    Attributes:
        train: int64 ``(words,)``, places in the vocabulary.
        validation: The same.
        test: The same.
        vocabulary: The words, in the order in which the training text has them first.
    """

    train: Tensor
    validation: Tensor
    test: Tensor
    vocabulary: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class GoEmotions(_Brief):
    """What :func:`goemotions` returns: three splits and the names of the labels."""

    train: MultilabelTextSplit
    validation: MultilabelTextSplit
    test: MultilabelTextSplit
    labels: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class MultilabelTable(_Brief):
    """What the loaders of the Mulan collection return (:func:`bibtex` and others).

    Attributes:
        train: The rows to train.
        test: The rows to test.
        features: The names of the features.
        labels: The names of the labels.
    """

    train: MultilabelSplit
    test: MultilabelSplit
    features: tuple[str, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class ArffTable(_Brief):
    """What :func:`read_arff` returns.

    Attributes:
        values: float64 ``(rows, attributes)``: a number itself, a nominal value as its place in ``nominal``. NaN where
            a value is not known.
        names: The names of the attributes.
        nominal: The values of each nominal attribute, by its name and in the order of the file.
    """

    values: Tensor
    names: tuple[str, ...]
    nominal: dict[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False, repr=False)
class SentimentZh(_Brief):
    """What :func:`sentiment_zh` returns: three splits and the names of the classes."""

    train: TextSplit
    validation: TextSplit
    test: TextSplit
    classes: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Wnut17(_Brief):
    """What :func:`wnut17` returns: three splits and the names of the tags."""

    train: TaggedSplit
    validation: TaggedSplit
    test: TaggedSplit
    tags: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class Table(_Brief):
    """What :func:`uci` returns.

    Attributes:
        features: float64 ``(n, features)``. NaN where a number is not known.
        labels: int64 ``(n,)``.
        feature_names: ``name`` of a number, ``name=value`` of one value of a category.
        classes: The names of the classes.
        train_rows: How many of the first rows are the makers' training split; the rest are their test split. None where
            they split nothing.
    """

    features: Tensor
    labels: Tensor
    feature_names: tuple[str, ...]
    classes: tuple[str, ...]
    train_rows: int | None


def _bytes(name: str) -> bytes:
    """The checked content of a file of the registry."""
    return content(public_file(name))


def fashion_mnist() -> FashionMnist:
    """Fashion-MNIST: pictures of clothes, 28 x 28 pixels.

    60,000 pictures to train, 10,000 to test, 10 classes, all equally frequent.

    Licence: MIT. Source: Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning
    Algorithms", 2017.
    """
    classes = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )

    def split(part: str) -> ImageSplit:
        pictures, names = f"fashion-mnist/{part}-images-idx3-ubyte.gz", f"fashion-mnist/{part}-labels-idx1-ubyte.gz"
        images = parse_idx(pictures, gunzip(pictures, _bytes(pictures)), 3)
        labels = parse_idx(names, gunzip(names, _bytes(names)), 1)
        if len(images) != len(labels):
            raise malformed(names, None, f"{len(labels)} labels for {len(images)} pictures")
        if labels.size and labels.max() >= len(classes):
            raise malformed(names, f"label {int(labels.argmax())}", f"there is no class {labels.max()}")
        return ImageSplit(torch.from_numpy(images), torch.from_numpy(labels).long())

    return FashionMnist(split("train"), split("t10k"), classes)


def banking77() -> Banking77:
    """BANKING77: questions of a bank's customers and what they want.

    10,003 questions to train, 3,080 to test, 77 intents. In the test split each has 40, in the other 35 to 187.

    Licence: CC BY 4.0. Source: Casanueva and others, "Efficient Intent Detection with Dual Sentence Encoders", 2020.
    """
    classes = parse_json_names("banking77/categories.json", _bytes("banking77/categories.json"))

    def split(part: str) -> TextSplit:
        name = f"banking77/{part}.csv"
        return TextSplit(*parse_csv_pairs(name, _bytes(name), ["text", "category"], class_index(classes)))

    return Banking77(split("train"), split("test"), classes)


def clinc150(*, imbalanced: bool = False) -> Clinc150:
    """CLINC150: short requests, what they want, and requests that want none of it.

    15,000 requests to train, 3,000 to validate, 4,500 to test, 150 intents in 10 domains, all equally frequent. Out of
    scope are 100, 100 and 1,000 more.

    Args:
        imbalanced: The makers' form with 10,525 training requests: 25, 50, 75 or 100 of an intent. Other splits do not
            change.

    Licence: CC BY 3.0. Source: Larson and others, "An Evaluation Dataset for Intent Classification and Out-of-Scope
    Prediction", 2019.
    """
    groups = parse_json_groups("clinc150/domains.json", _bytes("clinc150/domains.json"))
    pairs = [(intent, domain) for domain, intents in groups.items() for intent in intents]
    classes = tuple(intent for intent, _ in pairs)
    name = f"clinc150/data_{'imbalanced' if imbalanced else 'full'}.json"
    document = parse_json(name, _bytes(name))

    def inside(part: str) -> TextSplit:
        return TextSplit(*parse_json_pairs(name, document, part, class_index(classes)))

    def outside(part: str) -> list[str]:
        return parse_json_pairs(name, document, part, {"oos": 0})[0]

    return Clinc150(
        inside("train"),
        inside("val"),
        inside("test"),
        outside("oos_train"),
        outside("oos_val"),
        outside("oos_test"),
        classes,
        tuple(domain for _, domain in pairs),
    )


def wikitext2() -> WikiText2:
    """WikiText-2: articles of the English Wikipedia, word by word.

    2,088,628 words to train, 217,646 to validate, 245,569 to test, the word ``<eos>`` after each line included. The
    vocabulary has 33,278 words; rarer ones were replaced by ``<unk>`` by the makers.

    Licence: CC BY-SA, as the data set's card says; the repository of the files says nothing. Source: Merity and others,
    "Pointer Sentinel Mixture Models", 2017.
    """
    vocabulary: dict[str, int] = {}

    def split(part: str) -> Tensor:
        name = f"wikitext-2/{part}.txt"
        return parse_words(name, _bytes(name), vocabulary, "<eos>", grow=part == "train")

    train, validation, test = split("train"), split("valid"), split("test")
    return WikiText2(train, validation, test, tuple(vocabulary))


def goemotions() -> GoEmotions:
    """GoEmotions: comments from Reddit and the emotions that readers found in them.

    43,410 comments to train, 5,426 to validate, 5,427 to test. 28 labels, the last is ``neutral``; a comment has at
    least one and 1.18 on average.

    Licence: CC BY 4.0. Source: Demszky and others, "GoEmotions: A Dataset of Fine-Grained Emotions", 2020.
    """
    labels = parse_names("goemotions/labels.txt", _bytes("goemotions/labels.txt"))

    def split(part: str) -> MultilabelTextSplit:
        name = f"goemotions/{part}.tsv"
        return MultilabelTextSplit(*parse_text_labels_id(name, _bytes(name), len(labels)))

    return GoEmotions(split("train"), split("dev"), split("test"), labels)


def _mulan(name: str) -> MultilabelTable:
    """A set of the Mulan collection: an XML file that says which columns are labels, and two ARFF files."""
    header = f"mulan-{name}/{name}.xml"
    labels = parse_label_names(header, _bytes(header))

    def split(part: str) -> tuple[MultilabelSplit, tuple[str, ...], tuple[str, ...]]:
        file = f"mulan-{name}/{name}-{part}.arff"
        attributes, values = parse_arff(file, _bytes(file), np.float32)
        binary = {column for column, places in attributes.items() if places == {"0": 0, "1": 1}}
        if not labels <= binary:
            raise malformed(file, None, f"no 0/1 column for the label {min(labels - binary)!r}")
        table = torch.from_numpy(values)
        if not (known := table.isfinite().all(1)).all():
            raise malformed(file, f"row {int(known.int().argmin()) + 1}", "a value is unknown or too large")
        is_label = torch.tensor([column in labels for column in attributes])
        return (
            MultilabelSplit(table[:, ~is_label], table[:, is_label].bool()),
            tuple(column for column in attributes if column not in labels),
            tuple(column for column in attributes if column in labels),
        )

    train, *names = split("train")
    test, *others = split("test")
    if others != names:
        raise malformed(f"mulan-{name}/{name}-test.arff", None, "its columns are not those of the training file")
    return MultilabelTable(train, test, *names)


def bibtex() -> MultilabelTable:
    """bibtex: bookmarks and BibTeX entries of BibSonomy and their tags.

    4,880 rows to train, 2,515 to test; 1,836 features, each 0 or 1: whether a word occurs. 159 labels, 2.4 of them true
    on average. 9 rows to test also stand, with the same labels, in the training split.

    Licence: not stated. Source: Katakis, Tsoumakas, Vlahavas, "Multilabel Text Classification for Automated Tag
    Suggestion", 2008.
    """
    return _mulan("bibtex")


def delicious() -> MultilabelTable:
    """delicious: web pages and the tags that their readers gave them.

    12,920 rows to train, 3,185 to test; 500 features, each 0 or 1: whether a word occurs. 983 labels, 19 of them true
    on average. 63 rows to test also stand, with the same labels, in the training split.

    Licence: not stated. Source: Tsoumakas, Katakis, Vlahavas, "Effective and Efficient Multilabel Classification in
    Domains with Large Number of Labels", 2008.
    """
    return _mulan("delicious")


def enron() -> MultilabelTable:
    """enron: e-mails of a company and what they are about.

    1,123 rows to train, 579 to test; 1,001 features, each 0 or 1: whether a word occurs. 53 labels, 3.4 of them true on
    average. 10 rows to test also stand, with the same labels, in the training split.

    Licence: not stated. Source: Klimt, Yang, "The Enron Corpus: A New Dataset for Email Classification Research", 2004;
    the labels are those of the UC Berkeley Enron Email Analysis Project.
    """
    return _mulan("enron")


def medical() -> MultilabelTable:
    """medical: reports of radiologists and the codes of the diseases.

    333 rows to train, 645 to test; 1,449 features, each 0 or 1: whether a word occurs. 45 labels, 1.2 of them true on
    average. 4 rows to test also stand, with the same labels, in the training split.

    Licence: not stated. Source: Pestian and others, "A Shared Task Involving Multi-label Classification of Clinical
    Free Text", 2007.
    """
    return _mulan("medical")


def scene() -> MultilabelTable:
    """scene: pictures and what they show, from ``Beach`` to ``Urban``.

    1,211 rows to train, 1,196 to test; 294 real features between 0 and 1. 6 labels, 1.1 of them true on average. 5 rows
    to test also stand, with the same labels, in the training split.

    Licence: not stated. Source: Boutell, Luo, Shen, Brown, "Learning Multi-label Scene Classification", 2004.
    """
    return _mulan("scene")


def tmc2007() -> MultilabelTable:
    """tmc2007-500: reports of crews about the safety of flights and the kinds of problems in them.

    21,519 rows to train, 7,077 to test; 500 features, each 0 or 1: whether a word occurs. 22 labels, 2.2 of them true
    on average. 108 rows to test also stand, with the same labels, in the training split.

    Licence: not stated. Source: Srivastava, Zane-Ulman, "Discovering Recurring Anomalies in Text Reports Regarding
    Complex Space Systems", 2005.
    """
    return _mulan("tmc2007-500")


def yeast() -> MultilabelTable:
    """yeast: genes of yeast and their functions.

    1,500 rows to train, 917 to test; 103 real features. 14 labels, 4.2 of them true on average.

    Licence: not stated. Source: Elisseeff, Weston, "A Kernel Method for Multi-Labelled Classification", 2001.
    """
    return _mulan("yeast")


def read_arff(path: str | os.PathLike[str]) -> ArffTable:
    r"""Any ARFF file with numeric and nominal attributes, such as those of Mulan, MEKA and Weka.

    The text is UTF-8 and may be packed with gzip. ``numeric``, ``real`` and ``integer`` are the same, and numbers are
    finite. A nominal value is read as its place in the list of its attribute, from 0 on. ``?`` stands for an unknown
    value. A row gives all values with commas between them, or in braces the places and values of those that are not 0;
    a nominal value that is left out is the first of its list. Names and values may stand in single or double quotes. A
    line that begins with ``%`` is a comment.

    Strings, dates, relations and weights of rows are refused.

    Args:
        path: The file.

    Returns:
        Values ``(rows, attributes)``, names, and the values of nominal attributes.

    Raises:
        FileNotFoundError: There is no such file.
        MalformedFileError: Something does not fit the format; the message names file and line.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> head = "@relation days\n@attribute heat real\n@attribute sky {clear,rain}\n@data\n"
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "days.arff"
        ...     _ = path.write_text(head + "21.5,rain\n?,clear\n{0 -3}\n", encoding="utf-8")
        ...     table = read_arff(path)
        >>> table.names, table.nominal
        (('heat', 'sky'), {'sky': ('clear', 'rain')})
        >>> table.values
        tensor([[21.5000,  1.0000],
                [    nan,  0.0000],
                [-3.0000,  0.0000]], dtype=torch.float64)

    Source: the description of the format in the manual of Weka.
    """
    file, packed = os.fspath(path), Path(path).read_bytes()
    text = gunzip(file, packed) if packed.startswith(GZIP) else packed
    attributes, values = parse_arff(file, text, np.float64)
    nominal = {name: tuple(places) for name, places in attributes.items() if places is not None}
    return ArffTable(torch.from_numpy(values), tuple(attributes), nominal)


def rt_polarity() -> TextSet:
    """rt-polarity: sentences of film reviews, against the film or for it.

    5,331 negative sentences, then 5,331 positive ones, in lower case. Not split.

    Licence: CC BY 4.0. Source: Pang, Lee, "Seeing Stars: Exploiting Class Relationships for Sentiment Categorization
    with Respect to Rating Scales", 2005.
    """
    archive = "rt-polarity/sentence_polarity.zip"
    packed = _bytes(archive)
    texts: list[str] = []
    labels: list[int] = []
    for label, part in enumerate(("neg", "pos")):
        member = f"sentence_polarity/rt-polarity.{part}"
        sentences = parse_sentences(f"{archive}: {member}", unzip(archive, packed, member))
        texts += sentences
        labels += [label] * len(sentences)
    return TextSet(texts, torch.tensor(labels, dtype=torch.int64), ("negative", "positive"))


def sentiment_zh() -> SentimentZh:
    """sentiment-zh: Chinese reviews of products and hotels, against or for them.

    16,883 reviews to train, 2,111 to validate, 2,111 to test, 2 classes of about the same size. The splits are not
    separate: 677 of the reviews to test and 666 of those to validate also stand in the training split.

    Licence: not stated. Source: bert4keras (its examples), 2019.
    """
    archive = "sentiment-zh/sentiment.zip"
    packed = _bytes(archive)

    def split(part: str) -> TextSplit:
        member = f"sentiment/sentiment.{part}.data"
        rows = unzip(archive, packed, member)
        return TextSplit(*parse_text_class(f"{archive}: {member}", rows, {"0": 0, "1": 1}))

    return SentimentZh(split("train"), split("valid"), split("test"), ("negative", "positive"))


def wnut17() -> Wnut17:
    """WNUT17: posts whose named entities are rare or new.

    3,394 sentences (62,730 tokens) to train, 1,009 (15,733) to validate, 1,287 (23,394) to test. 13 tags: ``O``, and
    ``B-`` and ``I-`` with each of 6 types. From 92 to 95 % of the tokens have ``O``.

    Licence: CC BY 4.0. Source: Derczynski and others, "Results of the WNUT2017 Shared Task on Novel and Emerging Entity
    Recognition", 2017.
    """
    types = ("corporation", "creative-work", "group", "location", "person", "product")
    tags = ("O", *(f"{place}-{kind}" for kind in types for place in "BI"))

    def split(file: str) -> TaggedSplit:
        name = f"wnut17/{file}"
        return TaggedSplit(*parse_conll(name, _bytes(name), class_index(tags)))

    return Wnut17(split("wnut17train.conll"), split("emerging.dev.conll"), split("emerging.test.annotated"), tags)


def uci(name: str) -> Table:
    """A table of the UCI Machine Learning Repository.

    ============= ====== ======== ======= =========================================================
    name          rows   features classes what the classes are
    ============= ====== ======== ======= =========================================================
    abalone       4,177  10       28      rings of a shell, a measure of its age
    adult         48,842 108      2       income above 50,000 dollars
    audit-risk    776    70       2       fraudulent firm
    balance-scale 625    4        3       side to which a scale tips
    car           1,728  21       4       how acceptable a car is
    dry-bean      13,611 16       7       kind of bean
    german        1,000  61       2       whether a loan was good
    iris          150    4        3       species
    spambase      4,601  57       2       spam
    wdbc          569    30       2       malignant or benign tumour
    wine          178    13       3       grower
    ============= ====== ======== ======= =========================================================

    A category of the file has become one feature for each of its values. In adult the unknown value of a category is
    one of its values, ``?``; in audit-risk one number is unknown and NaN. Nothing is scaled. Numbers that only name a
    row are left out. adult is split by its makers: 32,561 rows to train, 16,281 to test.

    In audit-risk the feature ``Audit_Risk`` gives the class away: it is above 1 exactly where the class is 1.

    Args:
        name: One of the names above, which are also in ``UCI``.

    Raises:
        ValueError: There is no table of this name.

    Licence: CC BY 4.0, by the policy of the repository. Source: see ``python -m lossbook.data list uci-iris`` and the
    like.
    """
    if name not in _tables.TABLES:
        raise ValueError(f"name must be one of {', '.join(map(repr, UCI))}, got {name!r}")
    files, form, reader = _tables.TABLES[name]
    contents = {f"uci/{file}": _bytes(f"uci/{file}") for file in files}
    features, labels, feature_names, rows = parse_table(contents, form, reader)
    return Table(features, labels, feature_names, form.class_names, rows[0] if len(files) > 1 else None)
