"""Loaders of public data: the real files where they are, made files for the formats, a local server for downloads."""

import contextlib
import gzip
import hashlib
import http.server
import inspect
import io
import json
import os
import re
import runpy
import socket
import struct
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch

from lossbook import data
from lossbook.data import __main__ as command
from lossbook.data import _fetch, _parse, _registry, _tables, public
from lossbook.data._parse import MalformedFileError
from lossbook.data._registry import PublicFile, public_sets
from tools.chapters import ROOT, all_notebooks, imported_modules

FILE = "set/file.txt"  # what parsers are told


LOADERS = {name for name in public.__all__ if inspect.isfunction(getattr(public, name))} - {"public_sets", "read_arff"}


def test_public_names_are_found_without_being_imported(monkeypatch):
    for name in public.__all__:
        assert getattr(data, name) is getattr(public, name)
        assert name in dir(data)
    assert "digit_canvases" in dir(data)
    with pytest.raises(AttributeError, match=r"module 'lossbook\.data' has no attribute 'imagenet'"):
        data.imagenet  # noqa: B018
    with monkeypatch.context() as patch:
        patch.setattr(data.importlib, "import_module", None)  # nothing is imported to say that there is no private name
        assert not hasattr(data, "_imagenet")
    source = (ROOT / "lossbook/data/__init__.py").read_text(encoding="utf-8")
    assert not [name for name in imported_modules(source, "lossbook.data") if name.startswith("lossbook.data.")]
    for path in (ROOT / "lossbook/data").glob("*.py"):
        imported = imported_modules(path.read_text(encoding="utf-8"), "lossbook.data")
        others = {name for name in imported if name.startswith("lossbook") and not name.startswith("lossbook.data")}
        rooms = {"lossbook._extras", "lossbook._extras.require", "lossbook.models", "lossbook.models.text_features"}
        assert others <= rooms, "a room of the book imports no loss"
    of_public_data = {"public.py", "_fetch.py", "_parse.py", "_registry.py", "_tables.py", "__main__.py"}
    for page in all_notebooks():
        assert not [m for m in page.modules if m.startswith("lossbook/data/") and m.split("/")[-1] in of_public_data]


def test_registry():
    sets = public_sets()
    files = [file for entry in sets.values() for file in entry.files]
    assert len({file.name for file in files}) == len(files) == 69
    assert len({file.sha256 for file in files}) == len(files)
    for file in files:
        assert _registry.public_file(file.name) is file
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
        assert re.fullmatch(r"https://raw\.githubusercontent\.com/[^/]+/[^/]+/[0-9a-f]{40}/\S+", file.url)
        assert file.size > 0
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", file.name)
    for name, entry in sets.items():
        assert entry.name == name
        assert entry.size == sum(file.size for file in entry.files)
        assert entry.licence
        assert entry.licence_source
        assert entry.citation.endswith((".", "bert4keras"))
        assert entry.files[0].url.startswith(entry.source.replace("//github.com", "//raw.githubusercontent.com"))
    of_entities = {"entities.conll04", "entities.resume_ner"}
    assert {entry.loader.partition("(")[0] for entry in sets.values()} == LOADERS | of_entities
    assert {entry.loader for entry in sets.values() if "uci" in entry.name} == {f'uci("{name}")' for name in public.UCI}
    lines = "".join(sorted(f"{file.sha256}  {file.name}\n" for file in sets["banking77"].files))
    assert sets["banking77"].sha256 == hashlib.sha256(lines.encode()).hexdigest()


# ---------------------------------------------------------------- the real files


@pytest.fixture
def real():
    """The folder of the real files."""
    if not os.environ.get("LOSSBOOK_DATA"):
        pytest.skip("LOSSBOOK_DATA names no folder with the public data")


def ends(split):
    return split.texts[0], int(split.labels[0]), split.texts[-1], int(split.labels[-1])


def positives(row):
    return row.nonzero().flatten().tolist()


@pytest.mark.usefixtures("real")
class TestRealFiles:
    def test_fashion_mnist(self):
        it = data.fashion_mnist()
        assert it.classes == (
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        )
        for split, each, first, last in ((it.train, 6000, 76247, 16684), (it.test, 1000, 33456, 24390)):
            assert split.images.shape == (10 * each, 28, 28)
            assert split.images.dtype == torch.uint8
            assert split.labels.dtype == torch.int64
            assert split.labels.bincount().tolist() == [each] * 10
            assert (int(split.images[0].sum()), int(split.labels[0])) == (first, 9)
            assert (int(split.images[-1].sum()), int(split.labels[-1])) == (last, 5)
        assert repr(it.test) == "ImageSplit(images=<uint8 (10000, 28, 28)>, labels=<int64 (10000,)>)"

    def test_banking77(self):
        it = data.banking77()
        assert len(it.classes) == 77
        assert (it.classes[0], it.classes[-1]) == ("card_arrival", "country_support")
        assert ends(it.train) == ("I am still waiting on my card?", 0, "Which countries are represented?", 76)
        assert ends(it.test) == ("How do I locate my card?", 0, "Can the card be mailed and used in Europe?", 76)
        assert len(it.train.texts) == len(it.train.labels) == 10003
        assert len(it.test.texts) == len(it.test.labels) == 3080
        counts = it.train.labels.bincount(minlength=77)
        assert (int(counts.min()), int(counts.max())) == (35, 187)
        assert it.test.labels.bincount().tolist() == [40] * 77

    def test_clinc150(self):
        it = data.clinc150()
        assert (len(it.classes), len(set(it.classes)), len(set(it.domains))) == (150, 150, 10)
        assert (it.classes[0], it.domains[0]) == ("freeze_account", "banking")
        assert (it.classes[-1], it.domains[-1]) == ("maybe", "meta")
        for split, each in ((it.train, 100), (it.validation, 20), (it.test, 30)):
            assert len(split.texts) == 150 * each
            assert split.labels.bincount().tolist() == [each] * 150
            assert it.classes[split.labels[0]] == "translate"
            assert it.classes[split.labels[-1]] == "card_declined"
        assert it.train.texts[0] == "what expression would i use to say i love you if i were an italian"
        assert it.test.texts[-1] == "why didn't my card work"
        assert [len(texts) for texts in (it.oos_train, it.oos_validation, it.oos_test)] == [100, 100, 1000]
        assert it.oos_train[0] == "how much is an overdraft fee for bank"
        assert it.oos_test[-1] == "let me know where jim is right now"
        rare = data.clinc150(imbalanced=True)
        assert sorted(set(rare.train.labels.bincount().tolist())) == [25, 50, 75, 100]
        assert len(rare.train.texts) == 10525
        assert rare.test.texts == it.test.texts

    def test_wikitext2(self):
        it = data.wikitext2()
        assert len(it.vocabulary) == 33278
        assert it.vocabulary[:4] == ("<eos>", "=", "Valkyria", "Chronicles")
        assert it.vocabulary[-1] == "gallinae"
        assert [len(it.train), len(it.validation), len(it.test)] == [2088628, 217646, 245569]
        assert it.train.unique().equal(torch.arange(33278))
        words = {
            split: [it.vocabulary[place] for place in (*getattr(it, split)[:4], *getattr(it, split)[-4:])]
            for split in ("train", "validation", "test")
        }
        assert words == {
            "train": ["<eos>", "=", "Valkyria", "Chronicles", "taste", ".", "<eos>", "<eos>"],
            "validation": ["<eos>", "=", "Homarus", "gammarus", "=", "<eos>", "<eos>", "<eos>"],
            "test": ["<eos>", "=", "Robert", "<unk>", "<unk>", ".", "<eos>", "<eos>"],
        }

    def test_goemotions(self):
        it = data.goemotions()
        assert len(it.labels) == 28
        assert (it.labels[0], it.labels[-1]) == ("admiration", "neutral")
        for split, rows, pairs in ((it.train, 43410, 51103), (it.validation, 5426, 6380), (it.test, 5427, 6329)):
            assert split.targets.shape == (rows, 28)
            assert split.targets.dtype == torch.bool
            assert int(split.targets.sum()) == pairs
            assert split.targets.any(1).all()
            assert len(split.texts) == rows
            assert len(set(split.ids)) == rows
        assert it.train.texts[0] == "My favourite food is anything I didn't have to cook myself."
        assert (positives(it.train.targets[0]), it.train.ids[0]) == ([27], "eebbqej")
        assert it.train.texts[-1] == "Enjoy the ride!"
        assert (positives(it.train.targets[-1]), it.train.ids[-1]) == ([17], "eecwmbq")
        assert (it.validation.ids[0], it.validation.ids[-1]) == ("edgurhb", "ed5h3jh")
        assert (it.test.ids[0], it.test.ids[-1]) == ("eecwqtt", "edtjpv6")
        assert it.test.texts[-1].startswith('Had to watch "Elmo in Grouchland" one')

    @pytest.mark.parametrize(
        ("name", "features", "first_label", "last_label", "train", "test"),
        [
            (
                "bibtex",
                1836,
                "TAG_2005",
                "TAG_wiki",
                (4880, 11616, [3, 23, 61, 63, 76], [48, 117], 87, 52),
                (2515, 6146, [16, 27, 77], [6], 113, 113),
            ),
            (
                "delicious",
                500,
                "TAG_.imported",
                "TAG_youtube",
                (12920, 246088, [77, 91, 315, 544, 575, 621, 718, 818, 819, 834, 908], None, 5, 2),
                (3185, 60229, None, [19, 20, 80, 239, 444, 540, 560, 593, 617, 636, 773, 777, 809, 849], 2, 1),
            ),
            (
                "enron",
                1001,
                "A.A8",
                "D.D14",
                (1123, 3803, [6, 11, 25], [14, 24, 39, 44], 78, 26),
                (579, 1947, [11, 22], [14, 39, 49], 53, 17),
            ),
            (
                "medical",
                1449,
                "Class-0-593_70",
                "Class-44-786_07",
                (333, 418, [44], [38], 8, 7),
                (645, 800, [4], [24], 7, 10),
            ),
            (
                "scene",
                294,
                "Beach",
                "Urban",
                (1211, 1286, [0, 4], [5], 84.179515, 86.715275),
                (1196, 1299, [0, 4], [5], 93.805286, 74.33503),
            ),
            (
                "tmc2007",
                500,
                "class01",
                "class22",
                (21519, 47892, [1, 5, 6], [12], 14, 22),
                (7077, 13816, [18], [12], 16, 42),
            ),
            (
                "yeast",
                103,
                "Class1",
                "Class14",
                (1500, 6342, [2, 3], [1, 2, 11, 12], -0.341427, 0.167961),
                (917, 3899, [6, 7, 11, 12], [0, 1, 5, 6, 10, 11], 0.842548, 0.217884),
            ),
        ],
        ids=["bibtex", "delicious", "enron", "medical", "scene", "tmc2007", "yeast"],
    )
    def test_mulan(self, name, features, first_label, last_label, train, test):
        it = getattr(data, name)()
        assert (it.labels[0], it.labels[-1]) == (first_label, last_label)
        assert len(it.features) == features
        for split, (rows, pairs, first, last, first_sum, last_sum) in ((it.train, train), (it.test, test)):
            assert split.features.shape == (rows, features)
            assert split.features.dtype == torch.float32
            assert split.targets.shape == (rows, len(it.labels))
            assert split.targets.dtype == torch.bool
            assert int(split.targets.sum()) == pairs
            assert first is None or positives(split.targets[0]) == first
            assert last is None or positives(split.targets[-1])[: len(last)] == last
            assert float(split.features[0].double().sum()) == pytest.approx(first_sum, abs=1e-5)
            assert float(split.features[-1].double().sum()) == pytest.approx(last_sum, abs=1e-5)
        if name not in ("scene", "yeast"):
            assert set(it.train.features.unique().tolist()) == {0, 1}
        train, test = (
            [row.numpy().tobytes() for row in torch.cat([split.features, split.targets], 1)]
            for split in (it.train, it.test)
        )
        known = set(train)
        twice = {"bibtex": 9, "delicious": 63, "enron": 10, "medical": 4, "scene": 5, "tmc2007": 108, "yeast": 0}
        assert sum(row in known for row in test) == twice[name]

    @pytest.mark.parametrize("name", ["bibtex", "delicious", "enron", "medical", "scene", "tmc2007-500", "yeast"])
    def test_mulan_by_hand(self, name):
        """The first and last rows beside a reading of the files in a few lines."""
        xml = _fetch.content(_registry.public_file(f"mulan-{name}/{name}.xml")).decode()
        labels = re.findall(r'<label name="(.*?)"', xml)
        it = getattr(data, name.removesuffix("-500"))()
        assert len(labels) == len(it.labels)
        assert set(labels) == set(it.labels)
        for part in ("train", "test"):
            text = _fetch.content(_registry.public_file(f"mulan-{name}/{name}-{part}.arff")).decode()
            head, body = text.split("@data\n")
            names = [line.split(" ")[1] for line in head.split("\n") if line.startswith("@attribute ")]
            is_label = torch.tensor([column in set(labels) for column in names])
            lines = re.findall(r"\{(.*)\}", body) or body.split()
            split = getattr(it, part)
            assert len(lines) == len(split.features)
            for place in (0, 1, 2, len(lines) // 2, len(lines) - 1):
                row = torch.zeros(len(names))
                if " " in lines[place]:
                    for entry in lines[place].split(","):
                        column, value = entry.split()
                        row[int(column)] = float(value)
                else:
                    row[:] = torch.tensor([float(value) for value in lines[place].split(",")])
                assert split.features[place].equal(row[~is_label])
                assert split.targets[place].equal(row[is_label].bool())

    @pytest.mark.parametrize("name", ["medical", "scene"])
    def test_read_arff(self, name):
        """The user's reader on a sparse and on a dense file gives what the loader gives."""
        path, _ = _fetch.find(_registry.public_file(f"mulan-{name}/{name}-train.arff"))
        table, it = data.read_arff(path), getattr(data, name)()
        assert table.names == it.features + it.labels
        assert {column for column, values in table.nominal.items() if values == ("0", "1")} >= set(it.labels)
        assert table.values.float().equal(torch.cat([it.train.features, it.train.targets.float()], 1))

    def test_rt_polarity(self):
        it = data.rt_polarity()
        assert it.classes == ("negative", "positive")
        assert it.labels.tolist() == [0] * 5331 + [1] * 5331
        assert ends(it) == (
            "simplistic , silly and tedious .",
            0,
            "provides a porthole into that noble , trembling incoherence that defines us all .",
            1,
        )
        assert len(it.texts) == 10662

    def test_sentiment_zh(self):
        it = data.sentiment_zh()
        counts = [split.labels.bincount().tolist() for split in (it.train, it.validation, it.test)]
        assert counts == [[8295, 8588], [1074, 1037], [1059, 1052]]
        assert [len(split.texts) for split in (it.train, it.validation, it.test)] == [16883, 2111, 2111]
        assert it.train.texts[0].startswith("贝贝好爱干净")
        assert it.train.labels[0] == 1
        assert (it.train.texts[-1], it.train.labels[-1]) == ("哎！ 不会是蒙牛干的吧 严惩真凶！", 0)
        assert it.validation.texts[0].startswith("我是在看了大家的评论后买的这套书")
        assert it.test.texts[-1].endswith("双核处理器”？")
        known = set(it.train.texts)
        assert [sum(text in known for text in split.texts) for split in (it.validation, it.test)] == [666, 677]

    def test_wnut17(self):
        it = data.wnut17()
        assert len(it.tags) == 13
        sizes = {"train": (3394, 62730, 59570), "validation": (1009, 15733, 14483), "test": (1287, 23394, 21654)}
        for name, (sentences, tokens, outside) in sizes.items():
            split = getattr(it, name)
            assert len(split.tokens) == len(split.tags) == sentences
            assert [len(words) for words in split.tokens] == [len(tags) for tags in split.tags]
            tags = torch.cat(split.tags)
            assert len(tags) == tokens
            assert int((tags == 0).sum()) == outside
        assert it.train.tokens[0][14:19] == ["Empire", "State", "Building", "=", "ESB"]
        named = [it.tags[tag] for tag in it.train.tags[0][14:19]]
        assert named == ["B-location", "I-location", "I-location", "O", "B-location"]
        assert it.train.tokens[-1][:3] == ["Sat", "Jan", "10"]
        assert it.validation.tokens[0][:4] == ["Stabilized", "approach", "or", "not"]
        assert [it.tags[tag] for tag in it.validation.tags[-1][-3:]] == ["B-corporation", "I-corporation", "O"]
        assert it.test.tokens[0][20] == "Sonmarg"
        assert [it.tags[tag] for tag in it.test.tags[-1][:3]] == ["B-person", "I-person", "O"]

    TABLES = {  # noqa: RUF012
        "abalone": (10, {9: 689, 15: 103, 29: 1}, {"sex=M": 1, "length": 0.455}, "15", {"shell": 0.495}, "12"),
        "adult": (
            108,
            {"<=50K": 37155, ">50K": 11687},
            {"age": 39, "workclass=State-gov": 1, "workclass=?": 0},
            "<=50K",
            {"hours-per-week": 60, "native-country=United-States": 1},
            ">50K",
        ),
        "audit-risk": (
            70,
            {"not fraudulent": 471, "fraudulent": 305},
            {"Sector_score": 3.89, "LOCATION_ID=23": 1, "Score_B.1": 0.2, "Score_B.2": 0.2, "Money_Value": 3.38},
            "fraudulent",
            {"Audit_Risk": 0.2928},
            "not fraudulent",
        ),
        "balance-scale": (
            4,
            {"left": 288, "right": 288, "balanced": 49},
            {"left-weight": 1, "right-distance": 1},
            "balanced",
            {"left-weight": 5, "right-distance": 5},
            "balanced",
        ),
        "car": (
            21,
            {"unacc": 1210, "acc": 384, "good": 69, "vgood": 65},
            {"buying=vhigh": 1, "buying=low": 0, "doors=2": 1},
            "unacc",
            {"doors=5more": 1, "safety=high": 1},
            "vgood",
        ),
        "dry-bean": (
            16,
            {
                **{"SEKER": 2027, "BARBUNYA": 1322, "BOMBAY": 522, "CALI": 1630},
                **{"HOROZ": 1928, "SIRA": 2636, "DERMASON": 3546},
            },
            {"Area": 28395},
            "SEKER",
            {"Area": 42159, "ShapeFactor4": 0.99817962330546783},
            "DERMASON",
        ),
        "german": (
            61,
            {"good": 700, "bad": 300},
            {"status=A11": 1, "amount": 1169, "savings=A65": 1, "age": 67},
            "good",
            {"status=A12": 1, "amount": 4576, "foreign=A201": 1},
            "good",
        ),
        "iris": (
            4,
            {"setosa": 50, "versicolor": 50, "virginica": 50},
            {"sepal-length": 5.1, "petal-width": 0.2},
            "setosa",
            {"sepal-length": 5.9, "petal-width": 1.8},
            "virginica",
        ),
        "spambase": (
            57,
            {"mail": 2788, "spam": 1813},
            {"word:address": 0.64, "character:!": 0.778, "capitals:total": 278},
            "spam",
            {"word:re": 1.97, "character:!": 0.125, "capitals:total": 40},
            "mail",
        ),
        "wdbc": (
            30,
            {"benign": 357, "malignant": 212},
            {"radius:mean": 17.99, "fractal_dimension:worst": 0.1189},
            "malignant",
            {"radius:mean": 7.76, "fractal_dimension:worst": 0.07039},
            "benign",
        ),
        "wine": (
            13,
            {"1": 59, "2": 71, "3": 48},
            {"alcohol": 14.23, "nonflavanoid-phenols": 0.28, "proline": 1065},
            "1",
            {"alcohol": 14.13, "proline": 560},
            "3",
        ),
    }

    @pytest.mark.parametrize("name", TABLES)
    def test_uci(self, name):
        columns, counts, first, first_class, last, last_class = self.TABLES[name]
        it = data.uci(name)
        assert it.features.dtype == torch.float64
        assert it.features.shape == (len(it.labels), columns)
        assert len(it.feature_names) == len(set(it.feature_names)) == columns
        found = dict(zip(it.classes, it.labels.bincount(minlength=len(it.classes)).tolist(), strict=True))
        assert {**found, **{str(key): count for key, count in counts.items()}} == found
        assert sum(counts.values()) == len(it.labels) or name == "abalone"
        for row, expected in ((0, first), (-1, last)):
            values = dict(zip(it.feature_names, it.features[row].tolist(), strict=True))
            assert {key: values[key] for key in expected} == expected
        assert (it.classes[it.labels[0]], it.classes[it.labels[-1]]) == (first_class, last_class)
        assert it.train_rows == (32561 if name == "adult" else None)
        unknown = {it.feature_names[column] for column in it.features.isnan().any(0).nonzero()}
        assert unknown == ({"Money_Value"} if name == "audit-risk" else set())

    def test_balance_scale_classes_are_what_the_weights_say(self):
        it = data.uci("balance-scale")
        left, right = it.features[:, 0] * it.features[:, 1], it.features[:, 2] * it.features[:, 3]
        assert it.labels.equal(torch.where(left > right, 0, torch.where(left < right, 1, 2)))

    def test_every_file_of_the_registry_is_right(self):
        for entry in public_sets().values():
            for file in entry.files:
                if found := _fetch.find(file):
                    _fetch.read(file, found[0])


# ---------------------------------------------------------------- made files


def packed(**members):
    """A zip archive, __ in a name stands for a slash."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("_DOT_", "."), content)
    return buffer.getvalue()


def idx(*sizes, values, kind=8):
    return bytes([0, 0, kind, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + bytes(values)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Puts made files where the loaders look, with a registry that names their digests."""
    monkeypatch.setenv("LOSSBOOK_DATA", str(tmp_path))
    known = {file.name for entry in public_sets().values() for file in entry.files}
    files = {}

    def put(contents):
        for name, content in contents.items():
            content = content.encode() if isinstance(content, str) else content
            assert name in known
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            files[name] = PublicFile(name, "http://127.0.0.1:9/none", digest, len(content))

    monkeypatch.setattr(public, "public_file", files.__getitem__)
    return put


def fashion_files(**changes):
    files = {
        "train-images": idx(2, 1, 3, values=range(6)),
        "train-labels": idx(2, values=[9, 0]),
        "t10k-images": idx(1, 1, 3, values=[7, 8, 9]),
        "t10k-labels": idx(1, values=[3]),
    }
    ending = {"images": "idx3-ubyte.gz", "labels": "idx1-ubyte.gz"}
    files.update({name.replace("_", "-"): content for name, content in changes.items()})
    return {f"fashion-mnist/{name}-{ending[name[-6:]]}": gzip.compress(content) for name, content in files.items()}


def test_fashion_mnist(made):
    made(fashion_files())
    it = data.fashion_mnist()
    assert it.train.images.tolist() == [[[0, 1, 2]], [[3, 4, 5]]]
    assert it.train.labels.tolist() == [9, 0]
    it.test.images[0, 0, 0] = 1  # a tensor of its own, not a view of the file's bytes
    assert repr(it).startswith("FashionMnist(train=ImageSplit(images=<uint8 (2, 1, 3)>")
    made(fashion_files(train_labels=idx(1, values=[9])))
    with pytest.raises(MalformedFileError, match=r"train-labels-idx1-ubyte\.gz: 1 labels for 2 pictures"):
        data.fashion_mnist()
    made(fashion_files(t10k_labels=idx(1, values=[10])))
    with pytest.raises(MalformedFileError, match="there is no class 10"):
        data.fashion_mnist()
    made(fashion_files(t10k_labels=idx(0, values=[]), t10k_images=idx(0, 1, 3, values=[])))
    assert len(data.fashion_mnist().test.labels) == 0  # the fourth call reads what three others did not harm


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file of bytes with 1 dimensions"),
        (idx(2, values=[1, 2], kind=13), "not an IDX file of bytes"),
        (idx(1, 2, values=[1, 2]), "with 1 dimensions"),
        (idx(3, values=[1, 2]), r"sizes \(3,\) need 3 values, the file has 2"),
        (idx(1, values=[1, 2]), r"sizes \(1,\) need 1 values, the file has 2"),
    ],
)
def test_bad_idx(content, message):
    with pytest.raises(MalformedFileError, match=message):
        _parse.parse_idx(FILE, content, 1)


def test_archives():
    assert _parse.gunzip(FILE, gzip.compress(b"abc")) == b"abc"
    assert _parse.unzip(FILE, packed(a__b_DOT_txt=b"abc"), "a/b.txt") == b"abc"
    for broken in (b"abc", gzip.compress(b"abc" * 100)[:-9], gzip.compress(b"abc" * 100)[:15] + b"\xff" * 30):
        with pytest.raises(MalformedFileError, match=r"set/file\.txt: not a whole gzip file"):
            _parse.gunzip(FILE, broken)
    for broken in (b"abc", packed(c=b"abc")):
        with pytest.raises(MalformedFileError, match=r"set/file\.txt: cannot read 'a/b\.txt' from this zip archive"):
            _parse.unzip(FILE, broken, "a/b.txt")
    archive = packed(a__b_DOT_txt=b"abc" * 20)
    for length in range(len(archive)):
        with pytest.raises(MalformedFileError):
            _parse.unzip(FILE, archive[:length], "a/b.txt")
        altered = archive[:length] + bytes([archive[length] ^ 255]) + archive[length + 1 :]
        with contextlib.suppress(MalformedFileError):  # any other error is a fault
            _parse.unzip(FILE, altered, "a/b.txt")


def test_lines():
    text = "one\r\ntwo\x85\x0b still two\n\nfour".encode()
    assert list(_parse.numbered_lines(FILE, text)) == [(1, "one"), (2, "two\x85\x0b still two"), (3, ""), (4, "four")]
    assert list(_parse.numbered_lines(FILE, b"one\n")) == [(1, "one")]
    assert list(_parse.numbered_lines(FILE, b"")) == []
    with pytest.raises(MalformedFileError, match=r"set/file\.txt, line 3: not UTF-8"):
        _parse.numbered_lines(FILE, b"a\nb\nc\xff\n")


BANKING = {
    "banking77/categories.json": '["lost", "found"]',
    "banking77/train.csv": 'text,category\nwhere?,lost\n"two\nlines, ""quoted""",found\r\n',
    "banking77/test.csv": "text,category\nhere,found\n",
}


def test_banking77(made):
    made(BANKING)
    it = data.banking77()
    assert it.classes == ("lost", "found")
    assert it.train.texts == ["where?", 'two\nlines, "quoted"']
    assert it.train.labels.tolist() == [0, 1]
    assert it.test.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("categories.json", '["lost", "lost"]', r"categories\.json: expected a list of different names"),
        ("categories.json", '["lost", 3]', "expected a list of different names"),
        ("categories.json", '{"lost": 3}', "expected a list of different names"),
        ("categories.json", '["lost",\n 3', r"categories\.json, line 2: not JSON"),
        ("train.csv", "", r"train\.csv, line 1: expected the header \['text', 'category'\], got None"),
        ("train.csv", "text\n", r"line 1: expected the header .*, got \['text'\]"),
        ("train.csv", "text,category\na,lost\nb\n", r"train\.csv, line 3: expected 2 fields, got 1"),
        ("train.csv", 'text,category\n"a\n",lost\nb,c,found\n', r"train\.csv, line 4: expected 2 fields, got 3"),
        ("train.csv", 'text,category\n"a\n",gone\n', r"train\.csv, line 2: 'gone' is not a known class"),
        ("train.csv", 'text,category\na,lost\n"b"c,lost\n', r"train\.csv, line 3: not CSV"),
        ("test.csv", 'text,category\na,lost\n"b', r"test\.csv, line 3: not CSV"),
    ],
)
def test_bad_banking77(made, name, content, message):
    made({**BANKING, f"banking77/{name}": content})
    with pytest.raises(MalformedFileError, match=message):
        data.banking77()


CLINC = {
    "train": [["hello", "greet"], ["bye", "leave"]],
    "val": [["hi", "greet"]],
    "test": [["ciao", "leave"]],
    "oos_train": [["rain?", "oos"]],
    "oos_val": [],
    "oos_test": [["sun?", "oos"], ["snow?", "oos"]],
}
DOMAINS = {"talk": ["greet"], "go": ["leave"]}


@pytest.mark.parametrize("imbalanced", [False, True])
def test_clinc150(made, imbalanced):
    name = f"clinc150/data_{'imbalanced' if imbalanced else 'full'}.json"
    made({"clinc150/domains.json": json.dumps(DOMAINS), name: json.dumps(CLINC)})
    it = data.clinc150(imbalanced=imbalanced)
    assert (it.classes, it.domains) == (("greet", "leave"), ("talk", "go"))
    assert it.train.texts == ["hello", "bye"]
    assert it.train.labels.tolist() == [0, 1]
    assert it.test.labels.tolist() == [1]
    assert (it.oos_train, it.oos_validation, it.oos_test) == (["rain?"], [], ["sun?", "snow?"])


@pytest.mark.parametrize(
    ("domains", "rows", "message"),
    [
        ([], CLINC, r"domains\.json: expected an object of lists of names"),
        ({"talk": "greet"}, CLINC, r"domains\.json, group 'talk': expected a list of names"),
        ({"talk": [1]}, CLINC, "group 'talk': expected a new name, got 1"),
        ({"talk": ["greet"], "go": ["greet"]}, CLINC, "group 'go': expected a new name, got 'greet'"),
        (DOMAINS, [], r"data_full\.json: no rows under 'train'"),
        (DOMAINS, {**CLINC, "test": {}}, "no rows under 'test'"),
        (DOMAINS, {**CLINC, "val": [["a", "greet"], ["b", "oos"]]}, "'val' row 2: 'oos' is not a known class"),
        (DOMAINS, {**CLINC, "oos_val": [["a", "greet"]]}, "'oos_val' row 1: 'greet' is not a known class"),
        (DOMAINS, {**CLINC, "test": [["a"]]}, r"'test' row 1: expected a text and a class, got \['a'\]"),
        (DOMAINS, {**CLINC, "test": [["a", 1]]}, "'test' row 1: expected a text and a class"),
    ],
)
def test_bad_clinc150(made, domains, rows, message):
    made({"clinc150/domains.json": json.dumps(domains), "clinc150/data_full.json": json.dumps(rows)})
    with pytest.raises(MalformedFileError, match=message):
        data.clinc150()


def test_wikitext2(made):
    made(
        {
            "wikitext-2/train.txt": " \n a b  a \n",
            "wikitext-2/valid.txt": " b \n",
            "wikitext-2/test.txt": " a a",
        }
    )
    it = data.wikitext2()
    assert it.vocabulary == ("<eos>", "a", "b")
    assert it.train.tolist() == [0, 1, 2, 1, 0]
    assert it.validation.tolist() == [2, 0]
    assert it.test.tolist() == [1, 1, 0]
    made({"wikitext-2/test.txt": " a \n b c \n"})
    with pytest.raises(MalformedFileError, match=r"test\.txt, line 2: the word 'c' is not in the vocabulary"):
        data.wikitext2()


EMOTIONS = {
    "goemotions/labels.txt": "joy\nfear",
    "goemotions/train.tsv": 'so good\t0\tid1\n"a ""b"" c"\t0,1\tid2\n',
    "goemotions/dev.tsv": "no\t1\tid3\n",
    "goemotions/test.tsv": "yes\t0\tid4\n",
}


def test_goemotions(made):
    made(EMOTIONS)
    it = data.goemotions()
    assert it.labels == ("joy", "fear")
    assert it.train.texts == ["so good", 'a "b" c']
    assert it.train.targets.tolist() == [[True, False], [True, True]]
    assert it.train.ids == ["id1", "id2"]
    assert it.validation.targets.tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("labels.txt", "joy\n\nfear", r"labels\.txt, line 2: expected a new name, got ''"),
        ("labels.txt", "joy\njoy", r"labels\.txt, line 2: expected a new name, got 'joy'"),
        ("train.tsv", "a\t0\tid\nb\t0\n", r"train\.tsv, line 2: expected 3 fields, got 2"),
        ("train.tsv", "a\t2\tid\n", r"line 1: '2' is not a known label"),
        ("train.tsv", "a\t\tid\n", r"line 1: '' is not a known label"),
        ("train.tsv", "a\t1,1\tid\n", r"line 1: a label twice in '1,1'"),
        ("train.tsv", 'a "b"\t1\tid\n', "line 1: quotes do not match"),
        ("train.tsv", '"a "b"\t1\tid\n', "line 1: quotes do not match"),
        ("train.tsv", '"a\t1\tid\n', "line 1: quotes do not match"),
        ("train.tsv", '"\t1\tid\n', "line 1: quotes do not match"),
    ],
)
def test_bad_goemotions(made, name, content, message):
    made({**EMOTIONS, f"goemotions/{name}": content})
    with pytest.raises(MalformedFileError, match=message):
        data.goemotions()


XML = '<?xml version="1.0"?><labels xmlns="http://x.org/labels"><label name="L2"/><label name="L1"/></labels>'
HEAD = (
    "% a comment\n@relation x\n\n"
    "@attribute f1 numeric\n@attribute L1 {0,1}\n@ATTRIBUTE f2 Numeric\n@attribute L2 {0,1}\n"
)
YEAST = {
    "mulan-yeast/yeast.xml": XML,
    "mulan-yeast/yeast-train.arff": HEAD + "\n@data\n0.5,1,-2e1,0\n\n{0 .25,3 1}\n{}",
    "mulan-yeast/yeast-test.arff": HEAD + "@Data\n1,0,2,1\n",
}


def test_mulan(made):
    made(YEAST)
    it = data.yeast()
    assert it.features == ("f1", "f2")
    assert it.labels == ("L1", "L2")  # in the order of the columns, not of the XML file
    assert it.train.features.tolist() == [[0.5, -20], [0.25, 0], [0, 0]]
    assert it.train.targets.tolist() == [[True, False], [False, True], [False, False]]
    assert it.test.features.dtype == torch.float32
    for name in ("bibtex", "delicious", "enron", "medical", "scene", "tmc2007-500"):
        made({file.replace("yeast", name): content for file, content in YEAST.items()})
        assert getattr(data, name.removesuffix("-500"))().labels == it.labels


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (".xml", "<labels>\n<label", r"yeast\.xml, line 2: not XML"),
        (".xml", '<labels><label name="L1"/><label name="L1"/></labels>', "expected a new name of a label, got 'L1'"),
        (".xml", "<labels><label/></labels>", "expected a new name of a label, got None"),
        (".xml", '<labels><label name="f1"/></labels>', r"yeast-train\.arff: no 0/1 column for the label 'f1'"),
        ("-train.arff", HEAD, r"yeast-train\.arff: no @data"),
        ("-train.arff", HEAD.replace("L1 {0,1}", "L1 {1,0}"), r"arff: no @data"),
        ("-train.arff", HEAD.replace("L1 {0,1}", "L1 {1,0}") + "@data\n", r"arff: no 0/1 column for the label 'L1'"),
        ("-train.arff", HEAD.replace("L1 {0,1}", "L1 numeric") + "@data\n", r"arff: no 0/1 column for the label 'L1'"),
        ("-train.arff", HEAD + "@data\n1,0,2,1\n\n1,?,2,1\n", r"arff, row 2: a value is unknown or too large"),
        ("-train.arff", HEAD + "@data\n1,0,2,1\n1,0,1e39,1\n", r"arff, row 2: a value is unknown or too large"),
        ("-train.arff", HEAD + "@data\n1,0,2,01\n", "line 9: '01' is not a known value of 'L2'"),
        ("-train.arff", "@relation x\nhello\n", "line 2: expected @relation, @attribute or @data, got 'hello'"),
        ("-train.arff", HEAD + "@data\n1,0,2\n", r"yeast-train\.arff, line 9: expected 4 values, got 3"),
        ("-train.arff", HEAD + "@data\n1,0,2,1\n1,0,x,1\n", "line 10: expected a number, got 'x'"),
        ("-train.arff", HEAD + "@data\n1,0,nan,1\n", "line 9: expected a number, got 'nan'"),
        ("-train.arff", HEAD + "@data\n1,0,-1e999,1\n", "line 9: expected a finite number, got '-1e999'"),
        ("-train.arff", HEAD + "@data\n1,0,2,0.5\n", "line 9: '0.5' is not a known value of 'L2'"),
        ("-train.arff", HEAD + "@data\n{3 2}\n", "line 9: '2' is not a known value of 'L2'"),
        ("-train.arff", HEAD + "@data\n{1 1\n", "line 9: no closing brace"),
        ("-train.arff", HEAD + "@data\n{4 1}\n", "line 9: expected a place after -1 and before 4, got '4'"),
        ("-train.arff", HEAD + "@data\n{1 1,1 1}\n", "line 9: expected a place after 1 and before 4, got '1'"),
        ("-train.arff", HEAD + "@data\n{-1 1}\n", "line 9: expected a place after -1 and before 4, got '-1'"),
        ("-train.arff", HEAD + "@data\n{² 1}\n", "line 9: expected a place"),
        ("-train.arff", HEAD + "@data\n{1}\n", "line 9: '' is not a known value of 'L1'"),
        ("-train.arff", HEAD + "@data\n{0}\n", "line 9: expected a number, got ''"),
        ("-test.arff", HEAD.replace("f2", "f3") + "@data\n", r"yeast-test\.arff: its columns are not those of the tr"),
    ],
)
def test_bad_mulan(made, name, content, message):
    made({**YEAST, f"mulan-yeast/yeast{name}": content})
    with pytest.raises(MalformedFileError, match=message):
        data.yeast()


def test_rt_polarity(made):
    def files(positive):
        return {
            "rt-polarity/sentence_polarity.zip": packed(
                **{
                    "sentence_polarity__rt-polarity_DOT_neg": "bad . \ndull\n",
                    "sentence_polarity__rt-polarity_DOT_pos": positive,
                }
            )
        }

    made(files("é good \n"))
    it = data.rt_polarity()
    assert it.texts == ["bad .", "dull", "é good"]
    assert it.labels.tolist() == [0, 0, 1]
    made(files("good\n \n"))
    with pytest.raises(MalformedFileError, match=r"zip: sentence_polarity/rt-polarity\.pos, line 2: expected a sent"):
        data.rt_polarity()


def test_sentiment_zh(made):
    def files(test):
        members = {"train": "好\t1\n坏\t0\n", "valid": "好好\t1\n", "test": test}
        return {
            "sentiment-zh/sentiment.zip": packed(
                **{f"sentiment__sentiment_DOT_{part}_DOT_data": content for part, content in members.items()}
            )
        }

    made(files("不\t0\n"))
    it = data.sentiment_zh()
    assert it.train.texts == ["好", "坏"]
    assert it.train.labels.tolist() == [1, 0]
    assert it.test.labels.tolist() == [0]
    for bad, message in (
        ("不\t2\n", "line 1: '2' is not a known class"),
        ("不\t1\n不", "line 2: expected 2 fields, got 1"),
    ):
        made(files(bad))
        with pytest.raises(MalformedFileError, match=rf"sentiment/sentiment\.test\.data, {message}"):
            data.sentiment_zh()


def wnut_files(train):
    return {
        "wnut17/wnut17train.conll": train,
        "wnut17/emerging.dev.conll": "a\tO\n\nb\tO\n\n\n",
        "wnut17/emerging.test.annotated": "",
    }


def test_wnut17(made):
    made(wnut_files("\t\nBig\tB-location\nBen\tI-location\n!\tO\n\t\nA\tB-group\nB\tB-group"))
    it = data.wnut17()
    assert it.train.tokens == [["Big", "Ben", "!"], ["A", "B"]]
    assert [[it.tags[tag] for tag in tags] for tags in it.train.tags] == [
        ["B-location", "I-location", "O"],
        ["B-group", "B-group"],
    ]
    assert it.validation.tokens == [["a"], ["b"]]
    assert it.test.tokens == []


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("a\tO\nb\n", "line 2: expected a token and a tag, got 'b'"),
        ("a\tO\tO\n", "line 1: expected a token and a tag"),
        ("\tO\n", "line 1: expected a token and a tag"),
        ("a\tB-animal\n", "line 1: 'B-animal' is not a known tag"),
        ("a\tI-group\n", "line 1: the tag 'I-group' continues nothing"),
        ("a\tB-group\n\nb\tI-group\n", "line 3: the tag 'I-group' continues nothing"),
        ("a\tB-group\nb\tI-person\n", "line 2: the tag 'I-person' continues nothing"),
        ("a\tO\nb\tI-person\n", "line 2: the tag 'I-person' continues nothing"),
    ],
)
def test_bad_wnut17(made, train, message):
    made(wnut_files(train))
    with pytest.raises(MalformedFileError, match=rf"wnut17train\.conll, {message}"):
        data.wnut17()


def test_uci_names():
    with pytest.raises(ValueError, match=r"name must be one of 'abalone', 'adult', .*, got 'titanic'"):
        data.uci("titanic")
    known = {file.name for entry in public_sets().values() for file in entry.files}
    assert {f"uci/{file}" for files, _, _ in _tables.TABLES.values() for file in files} == {
        name for name in known if name.startswith("uci/")
    }
    widths = {name: len(form.columns) for name, (_, form, _) in _tables.TABLES.items()}
    assert widths == {
        **{"abalone": 9, "adult": 15, "audit-risk": 27, "balance-scale": 5, "car": 7, "dry-bean": 17, "german": 21},
        **{"iris": 5, "spambase": 58, "wdbc": 32, "wine": 14},
    }


def test_uci_text_tables(made):
    made({"uci/iris.data": "5.1,3.5,1.4,.2,Iris-virginica\n\n 4.9, 3.0,1.4,0.2 ,Iris-setosa\n\n"})
    it = data.uci("iris")
    assert it.features.tolist() == [[5.1, 3.5, 1.4, 0.2], [4.9, 3.0, 1.4, 0.2]]
    assert it.classes == ("setosa", "versicolor", "virginica")
    assert it.labels.tolist() == [2, 0]
    assert it.train_rows is None
    person = "39, {}, 77516, Bachelors, 13, Single, Clerk, Alone, White, Male, 2174, 0, 40, {}, {}\n"
    made(
        {
            "uci/adult.data": person.format("Private", "Cuba", "<=50K") + person.format("0", "0", ">50K"),
            "uci/adult.test": person.format("State-gov", "Cuba", ">50K."),
        }
    )
    it = data.uci("adult")
    assert it.feature_names[:4] == ("age", "workclass=?", "workclass=Private", "workclass=State-gov")
    assert it.features[:, 1:4].tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert [name for name in it.feature_names if "country" in name] == ["native-country=?", "native-country=Cuba"]
    assert it.classes == ("<=50K", ">50K")
    assert it.labels.tolist() == [0, 1, 1]
    assert it.train_rows == 2
    made({"uci/wdbc.data": "842302,M" + ",1.5" * 30 + "\n"})
    it = data.uci("wdbc")
    assert it.features.tolist() == [[1.5] * 30]
    assert it.classes[it.labels[0]] == "malignant"
    header = ",".join(_tables._AUDIT)
    rows = "3.89,LOHARU" + ",1" * 10 + ",{}" + ",2" * 13 + ",1\r\n"
    made({"uci/audit_risk.csv": f"{header}\r\n{rows.format('')}{rows.format('7')}"})
    it = data.uci("audit-risk")
    money = it.features[:, it.feature_names.index("Money_Value")]
    assert money.isnan().tolist() == [True, False]
    assert money[1] == 7
    assert it.feature_names[:2] == ("Sector_score", "LOCATION_ID=LOHARU")


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("iris", "iris.data", "1,2,3,4,Iris-setosa\n\n1,2,3,Iris-setosa\n", "line 3: expected 5 fields, got 4"),
        ("iris", "iris.data", "1,2,3,4,Rose\n", "line 1: 'Rose' is not a known class"),
        ("iris", "iris.data", "1,2,x,4,Iris-setosa\n", "line 1: expected a number, got 'x'"),
        ("iris", "iris.data", "1,2,,4,Iris-setosa\n", "line 1: expected a number, got ''"),
        ("iris", "iris.data", "1,2,1_0,4,Iris-setosa\n", "line 1: expected a number, got '1_0'"),
        ("car", "car.data", "a,b,,d,e,f,acc\n", "line 1: doors is empty"),
        ("german", "german.data", "\nA11\t6\n", "line 2: expected 21 fields, got 2"),
        (
            "audit-risk",
            "audit_risk.csv",
            "\na,b\n",
            "line 2: expected 'Sector_score' at place 1 of the header, got 'a'",
        ),
    ],
)
def test_bad_uci(made, name, file, content, message):
    made({f"uci/{file}": content})
    with pytest.raises(MalformedFileError, match=rf"uci/{re.escape(file)}, {message}"):
        data.uci(name)


def workbook(*rows, texts=(*_tables._BEAN, "Class", "SIRA"), sheet=None):
    """An .xlsx file of the first columns of each row; an int is a number, a str a shared text, a dict is written so."""
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    body = ""
    for number, row in enumerate(rows, 1):
        cells = ""
        for column, value in enumerate(row):
            cell = f"{_parse.column_letters(column)}{number}"
            if isinstance(value, str):
                cells += f'<c r="{cell}" t="s"><v>{texts.index(value) if value in texts else value}</v></c>'
            elif value is not None:
                cells += f'<c r="{cell}"><v>{value}</v></c>'
        body += f'<row r="{number}">{cells}</row>'
    shared = "".join(f"<si><t>{text}</t></si>" for text in texts)
    return packed(
        xl__sharedStrings_DOT_xml=f"<sst {space}>{shared}</sst>",
        xl__worksheets__sheet1_DOT_xml=sheet or f"<worksheet {space}><sheetData>{body}</sheetData></worksheet>",
    )


BEAN_HEAD = (*_tables._BEAN, "Class")


def test_uci_workbook(made):
    made({"uci/Dry_Bean_Dataset.xlsx": workbook(BEAN_HEAD, (*range(16), "SIRA"), (*(0.5,) * 16, "SIRA"))})
    it = data.uci("dry-bean")
    assert it.features.tolist() == [list(range(16)), [0.5] * 16]
    assert [it.classes[label] for label in it.labels] == ["SIRA", "SIRA"]
    names = [_parse.column_letters(column) for column in (0, 25, 26, 51, 52, 701, 702)]
    assert names == ["A", "Z", "AA", "AZ", "BA", "ZZ", "AAA"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (workbook(BEAN_HEAD[1:]), "xlsx, sheet row 1: expected 'Area' at place 1 of the header, got 'Perimeter'"),
        (workbook(BEAN_HEAD[:-1]), "xlsx, sheet row 1: expected 'Class' at place 17 of the header, got None"),
        (workbook(BEAN_HEAD, (1, None, *range(14), "SIRA")), "sheet row 2: expected the cell B, got C2"),
        (workbook(BEAN_HEAD, (1, "SIRA")), "sheet row 2: expected 17 fields, got 2"),
        (workbook(BEAN_HEAD, (*range(16), "99")), "sheet row 2: there is no shared text '99'"),
        (workbook(BEAN_HEAD, (*range(16), "x")), "sheet row 2: there is no shared text 'x'"),
        (workbook(BEAN_HEAD, (*range(15), "SIRA", "SIRA")), "sheet row 2: expected a number, got 'SIRA'"),
        (workbook(BEAN_HEAD, (*range(16), "Area")), "sheet row 2: 'Area' is not a known class"),
        (workbook(sheet="<worksheet>\n<"), r"xlsx, xl/worksheets/sheet1\.xml line 2: not XML"),
        (packed(a=b""), r"xlsx: cannot read 'xl/sharedStrings\.xml'"),
    ],
)
def test_bad_uci_workbook(made, content, message):
    made({"uci/Dry_Bean_Dataset.xlsx": content})
    with pytest.raises(MalformedFileError, match=message):
        data.uci("dry-bean")


# ---------------------------------------------------------------- files that are here

CONTENT = b"line of the file\n" * 4000


def described(url="http://127.0.0.1:9/none", content=CONTENT, name=FILE):
    return PublicFile(name, url, hashlib.sha256(content).hexdigest(), len(content))


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An empty folder of the user and an empty cache."""
    own, cache = tmp_path / "own", tmp_path / "cache"
    (own / "set").mkdir(parents=True)
    monkeypatch.setenv("LOSSBOOK_DATA", str(own))
    monkeypatch.setenv("LOSSBOOK_CACHE", str(cache))
    return own, cache


@pytest.mark.parametrize("forms", [["", ".gz"], [""], [".gz"]])
def test_the_users_folder_comes_first_and_is_never_written(places, forms):
    own, cache = places
    for form in forms:
        (own / f"{FILE}{form}").write_bytes(gzip.compress(CONTENT) if form else CONTENT)
    path = own / f"{FILE}{forms[0]}"
    (cache / "set").mkdir(parents=True)
    (cache / FILE).write_bytes(CONTENT)
    before = {entry: entry.stat().st_mtime_ns for entry in own.rglob("*")}
    assert _fetch.find(described()) == (path, "LOSSBOOK_DATA")
    assert _fetch.fetch(described()) == path
    assert _fetch.content(described()) == CONTENT
    assert {entry: entry.stat().st_mtime_ns for entry in own.rglob("*")} == before


ALTERED = CONTENT[:50] + b"X" + CONTENT[51:]


@pytest.mark.parametrize(
    ("ending", "content", "message"),
    [
        (
            "",
            CONTENT[:-1],
            r"is not set/file\.txt: expected 68000 bytes with SHA-256 .*, found 67999 bytes; replace it",
        ),
        ("", CONTENT + b"x", "found 68001 bytes; replace it or remove it"),
        ("", b"", "found 0 bytes;"),
        ("", ALTERED, "found other content of the same size, SHA-256 [0-9a-f]{64}; replace it"),
        (".gz", gzip.compress(CONTENT[:-1]), "found 67999 bytes after unpacking;"),
        (".gz", gzip.compress(CONTENT + b"more"), "found more than 68000 bytes after unpacking;"),
        (".gz", gzip.compress(ALTERED), "found other content of the same size, .* after unpacking;"),
        (".gz", gzip.compress(CONTENT)[:-12], r"file\.txt\.gz is not a whole gzip file"),
        (".gz", gzip.compress(CONTENT)[:-8] + bytes(8), "is not a whole gzip file .*CRC"),
        (".gz", gzip.compress(CONTENT)[:12] + b"\xff" * 40, "is not a whole gzip file"),
        (".gz", CONTENT, "is not a whole gzip file"),
    ],
)
def test_a_wrong_file_of_the_user_is_refused(places, ending, content, message):
    path = places[0] / f"{FILE}{ending}"
    path.write_bytes(content)
    for use in (_fetch.fetch, _fetch.content):
        with pytest.raises(public.WrongFileError, match=message):
            use(described())
    assert path.read_bytes() == content


def test_folders(monkeypatch, tmp_path):
    monkeypatch.delenv("LOSSBOOK_DATA", raising=False)
    monkeypatch.delenv("LOSSBOOK_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "platform"))
    assert _fetch.data_folder() is None
    assert _fetch.cache_folder().name == "lossbook"
    if sys.platform == "linux":
        assert _fetch.cache_folder() == tmp_path / "platform" / "lossbook"
    monkeypatch.setenv("LOSSBOOK_DATA", str(tmp_path / "none"))
    with pytest.raises(NotADirectoryError, match=r"LOSSBOOK_DATA names .*none, and there is no such folder"):
        _fetch.content(described())
    monkeypatch.setenv("LOSSBOOK_CACHE", "~/somewhere")
    assert _fetch.cache_folder() == Path.home() / "somewhere"


def test_files_that_are_here_need_no_pooch(places, monkeypatch):
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ModuleNotFoundError, match=r'pooch; install it with: pip install "lossbook\[data\]"'):
        _fetch.content(described())
    (places[0] / FILE).write_bytes(CONTENT)
    assert _fetch.content(described()) == CONTENT


# ---------------------------------------------------------------- downloads


class Server(http.server.ThreadingHTTPServer):
    """Answers each request by the next of ``answers``, the last one again and again."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = [whole]
        self.requests = 0
        self.go = threading.Event()
        self.lock = threading.Lock()

    def url(self, path="file"):
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"

    def handle_error(self, request, client_address):
        """A client that gives up is part of the tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        with self.server.lock:
            number = self.server.requests
            self.server.requests += 1
        answers = self.server.answers
        answers[min(number, len(answers) - 1)](self)

    def log_message(self, *arguments):
        pass

    def head(self, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()


def whole(handler):
    handler.head(Content_Length=len(CONTENT))
    handler.wfile.write(CONTENT)


def cut_off(handler):
    handler.head(Content_Length=len(CONTENT))
    handler.wfile.write(CONTENT[:30000])


def cut_off_unannounced(handler):
    handler.head()
    handler.wfile.write(CONTENT[:30000])


def other_bytes(handler):
    handler.head(Content_Length=len(ALTERED))
    handler.wfile.write(ALTERED)


def status(number):
    return lambda handler: handler.head(number, Content_Length=0)


def stalled(handler):
    handler.head(Content_Length=len(CONTENT))
    handler.wfile.write(CONTENT[:30000])
    handler.wfile.flush()
    handler.server.go.wait(20)


def in_two_parts(handler):
    stalled(handler)
    handler.wfile.write(CONTENT[30000:])


def slow(handler):
    handler.head(Content_Length=len(CONTENT))
    for start in range(0, len(CONTENT), 17000):
        handler.wfile.write(CONTENT[start : start + 17000])
        handler.wfile.flush()
        handler.server.go.wait(0.1)


def squeezed(handler):
    body = gzip.compress(CONTENT)
    handler.head(Content_Length=len(body), Content_Encoding="gzip")
    handler.wfile.write(body)


def redirect(to):
    return lambda handler: handler.head(302, Location=to, Content_Length=0)


@pytest.fixture
def server(monkeypatch, places):
    """A local HTTP server; waits between attempts are left out."""
    pytest.importorskip("pooch")
    monkeypatch.delenv("LOSSBOOK_DATA")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    with Server() as it:
        thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield it
        it.go.set()
        it.shutdown()
        thread.join()


def files_of(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("answers", "requests"),
    [
        ([whole], 1),
        ([squeezed], 1),
        ([slow], 1),
        ([cut_off, whole], 2),
        ([cut_off_unannounced, cut_off, whole], 3),
        ([other_bytes, whole], 2),
        ([status(500), status(503), whole], 3),
        ([status(429), whole], 2),
        ([status(408), whole], 2),
        ([stalled, whole], 2),
        ([redirect("/elsewhere"), whole], 2),
    ],
    ids=lambda value: "-".join(a.__name__ for a in value) if isinstance(value, list) else str(value),
)
def test_download(server, places, monkeypatch, answers, requests, capsys):
    if stalled in answers:  # elsewhere a busy machine could be taken for a stalled server
        monkeypatch.setattr(_fetch, "TIMEOUT", 1)
    server.answers = answers
    assert _fetch.content(described(server.url())) == CONTENT
    assert server.requests == requests
    path = places[1] / FILE
    assert path.read_bytes() == CONTENT
    assert files_of(places[1]) == [FILE]
    assert path.stat().st_mode & 0o777 == 0o644
    assert "%|" in capsys.readouterr().err, "a progress bar"
    assert _fetch.fetch(described(server.url())) == path
    assert server.requests == requests, "the second call uses the first one's file"


FAILURES = {
    "cut off": (cut_off, 3, "IncompleteRead|broken"),
    "cut off, unannounced": (cut_off_unannounced, 3, "SHA256 hash of downloaded file"),
    "wrong bytes": (other_bytes, 3, "SHA256 hash of downloaded file"),
    "404": (status(404), 1, "404 Client Error"),
    "403": (status(403), 1, "403 Client Error"),
    "500": (status(500), 3, "500 Server Error"),
    "stalled": (stalled, 3, "timed out"),
    "redirected to itself": (redirect("/file"), 93, "30 redirects"),
    "redirected to nothing": (redirect("http://127.0.0.1:1/"), 3, "refused"),
}


@pytest.mark.parametrize("cached", [None, b"wrong", CONTENT], ids=["nothing cached", "wrong cached", "right cached"])
@pytest.mark.parametrize("failure", FAILURES)
def test_failed_download(server, places, monkeypatch, failure, cached):
    answer, requests, reason = FAILURES[failure]
    if answer is stalled:
        monkeypatch.setattr(_fetch, "TIMEOUT", 0.2)
    server.answers = [answer]
    path = places[1] / FILE
    if cached is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(cached)
    file = described(server.url())
    if cached == CONTENT:
        assert _fetch.content(file) == CONTENT
        assert server.requests == 0
        return
    with pytest.raises(public.MissingFileError) as caught:
        _fetch.content(file)
    message = str(caught.value)
    assert re.search(reason, message)
    assert server.requests == requests
    state = "is not here" if cached is None else f"is wrong in the cache ({path} is not {FILE}: expected 68000 bytes"
    assert message.startswith(f"{FILE} {state}")
    assert (
        f"Download {server.url()}\n(68000 bytes, SHA-256 {file.sha256})\nand save it as {path}\nor as {FILE} in"
        in message
    )
    assert files_of(places[1]) == ([] if cached is None else [FILE]), "nothing half done is left"
    assert cached is None or path.read_bytes() == cached


def test_a_wrong_file_in_the_cache_is_replaced(server, places):
    path = places[1] / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:-1])
    assert _fetch.content(described(server.url())) == CONTENT
    assert path.read_bytes() == CONTENT
    assert server.requests == 1


def test_what_killed_downloads_left_is_removed_after_a_day(server, places):
    folder = places[1] / "set"
    folder.mkdir(parents=True)
    for name, age in (("tmp1", 25), ("tmp2", 23), ("other", 25)):
        (folder / name).touch()
        os.utime(folder / name, (0, time.time() - 3600 * age))
    (folder / "tmp3").symlink_to(folder / "nothing")  # cannot be looked at, as if another process had been quicker
    _fetch.fetch(described(server.url()))
    assert files_of(places[1]) == [FILE, "set/other", "set/tmp2"]


def test_offline(places, monkeypatch):
    pytest.importorskip("pooch")
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file"  # bound but not listening: refuses
        with pytest.raises(FileNotFoundError, match=f"could not be downloaded: (?s:.*)Download {url}"):
            _fetch.fetch(described(url))
    assert files_of(places[0]) == files_of(places[1]) == []


def test_a_cache_that_cannot_be_written(server, places):
    places[1].write_text("a file where the folder should be")
    with pytest.raises(public.MissingFileError, match=r"set/file\.txt is not here and could not be downloaded"):
        _fetch.fetch(described(server.url()))
    assert server.requests == 0


def test_a_half_downloaded_file_is_never_in_its_place(server, places, monkeypatch):
    monkeypatch.setattr(_fetch, "CHUNK", 1000)  # so that a part is written before all is here
    server.answers = [in_two_parts]
    file = described(server.url())
    with_result = []
    thread = threading.Thread(target=lambda: with_result.append(_fetch.content(file)))
    thread.start()
    for _ in range(1000):
        begun = [path for path in places[1].rglob("*") if path.is_file() and path.stat().st_size]
        if begun:
            break
        threading.Event().wait(0.02)
    assert begun
    assert _fetch.find(file) is None
    server.go.set()
    thread.join()
    assert with_result == [CONTENT]
    assert files_of(places[1]) == [FILE]


def test_two_downloads_at_once(server, places, monkeypatch):
    def too_late(*arguments):
        raise FileExistsError("the other download made this folder first")

    monkeypatch.setattr("pooch.core.os.makedirs", too_late)
    both = threading.Barrier(2, timeout=20)

    def together(handler):
        both.wait()
        whole(handler)

    server.answers = [together]
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(_fetch.content(described(server.url())))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [CONTENT, CONTENT]
    assert server.requests == 2
    assert files_of(places[1]) == [FILE]


# ---------------------------------------------------------------- python -m lossbook.data


@pytest.fixture
def two_sets(server, monkeypatch):
    """A registry with two small sets whose files the local server has."""

    def entry(name, loader, files):
        return _registry.PublicSet(name, loader, f"{name}: rows", "MIT", "its README", "A. Author.", "https://x", files)

    sets = {
        "one": entry("one", "one()", (described(server.url(), name="one/a"), described(server.url(), name="one/b"))),
        "uci-two": entry("uci-two", 'uci("two")', (described(server.url(), name="uci/c"),)),
    }
    monkeypatch.setattr(command, "public_sets", lambda: sets)
    return sets


def test_command_list(two_sets, places, capsys, monkeypatch):
    assert command.main(["list"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"one +0\.1 MB +MIT +not here +one: rows", out)
    assert "A. Author" not in out
    assert f"LOSSBOOK_DATA: not set\ncache: {places[1]}" in out
    _fetch.fetch(two_sets["one"].files[0])
    monkeypatch.setenv("LOSSBOOK_DATA", str(places[0]))
    (places[0] / "uci").mkdir()
    (places[0] / "uci/c.gz").touch()
    capsys.readouterr()
    assert command.main(["list", "one", "uci"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"one +0\.1 MB +MIT +partly here +one: rows", out)
    assert re.search(r"uci-two +0\.1 MB +MIT +LOSSBOOK_DATA +uci-two: rows", out)
    assert "cite        A. Author." in out
    assert two_sets["one"].files[1].sha256 in out
    assert two_sets["one"].files[1].url in out


def test_command_fetch_and_verify(two_sets, server, places, capsys):
    assert command.main(["verify"]) == 1
    assert capsys.readouterr().out.endswith("0 right, 0 wrong, 3 missing\n")
    assert command.main(["fetch", "one"]) == 0
    assert f"one/a: {places[1] / 'one/a'}\n" in capsys.readouterr().out
    assert command.main(["verify", "one"]) == 0
    assert command.main(["verify"]) == 1
    (places[1] / "one/a").write_bytes(ALTERED)
    server.answers = [status(404)]
    server.requests = 0
    capsys.readouterr()
    assert command.main(["verify", "all"]) == 1
    out = capsys.readouterr().out
    assert "wrong    " in out
    assert f"right    {places[1] / 'one/b'}\nmissing  uci/c\n1 right, 1 wrong, 1 missing\n" in out
    assert command.main(["fetch", "all"]) == 1
    seen = capsys.readouterr()
    assert f"one/b: {places[1] / 'one/b'}" in seen.out, "a failure does not stop the rest"
    assert seen.err.endswith("2 files are missing\n")
    assert (places[1] / "one/a").read_bytes() == ALTERED


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "action"),
        (["fetch"], "say what to fetch: names, or all"),
        (["list", "three"], "there is no data set 'three'; there are: fashion-mnist, banking77, "),
    ],
)
def test_command_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_command_names():
    assert [entry.name for entry in command.choose(["wikitext2", "banking77", "banking77"])] == [
        "wikitext-2",
        "banking77",
    ]
    assert {entry.name for entry in command.choose(["uci"])} == {f"uci-{name}" for name in public.UCI}


def test_command_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lossbook.data", "list", "banking77"])
    with pytest.warns(RuntimeWarning, match="found in sys.modules"), pytest.raises(SystemExit) as stopped:
        runpy.run_module("lossbook.data.__main__", run_name="__main__")
    assert stopped.value.code == 0
    assert "lossbook.data.banking77()" in capsys.readouterr().out


def test_command_says_what_is_wrong_with_the_environment(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("LOSSBOOK_DATA", str(tmp_path / "none"))
    assert command.main(["list"]) == 1
    assert "there is no such folder" in capsys.readouterr().err
