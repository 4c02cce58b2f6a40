"""Digit canvases, the book's files and the records."""

import gzip
import io
import json
import math
import re
import sys
import types

import numpy as np
import pytest
import torch
from scipy.io import arff
from sklearn.datasets import load_digits

from lossbook import data
from lossbook.data import MalformedFileError, digit_canvases, python_text, read_arff


def crops(images, grid):
    """The cells of each canvas, by slices: (n, cells, 8, 8)."""
    rows, columns = grid
    return torch.stack(
        [images[:, 0, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] for r in range(rows) for c in range(columns)], dim=1
    )


def known_digits():
    """Each of scikit-learn's digits by its pixels: {bytes: (position, digit)}."""
    bundle = load_digits()
    pairs = enumerate(zip(bundle.images, bundle.target, strict=True))
    return {(image / 16).astype(np.float32).tobytes(): (i, int(digit)) for i, (image, digit) in pairs}


@pytest.mark.parametrize("split", ["train", "validation", "test"])
@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 4)])
def test_labels_name_the_digit_that_stands_in_the_cell(grid, split):
    known = known_digits()
    images, targets = digit_canvases(40, grid=grid, noise=0, seed=3, split=split)
    cells = grid[0] * grid[1]
    assert images.shape == (40, 1, 8 * grid[0], 8 * grid[1])
    assert images.dtype == torch.float32
    assert targets.shape == (40, cells * 10)
    assert targets.dtype == torch.bool
    for canvas, target in zip(crops(images, grid), targets, strict=True):
        expected = torch.zeros(cells * 10, dtype=torch.bool)
        for cell, pixels in enumerate(canvas):
            if pixels.any():
                expected[cell * 10 + known[pixels.numpy().tobytes()][1]] = True
        assert target.equal(expected)


def test_splits_share_no_digit():
    known = known_digits()
    used = {}
    for split in data.SPLITS:
        images, _ = digit_canvases(2000, grid=(4, 4), max_digits=16, noise=0, seed=0, split=split)
        pixels = crops(images, (4, 4)).flatten(0, 1)
        used[split] = {known[cell.numpy().tobytes()][0] for cell in pixels if cell.any()}
        block = data.SPLITS[split]
        assert used[split] == set(range(block.start, block.stop))  # and every digit of its own is used
    assert sum(map(len, used.values())) == len(set().union(*used.values())) == 1797


@pytest.mark.parametrize(("grid", "most", "expected"), [((3, 3), 3, 3), ((1, 2), 3, 2), ((2, 2), 0, 0)])
def test_every_number_of_digits_is_equally_likely(grid, most, expected):
    _, targets = digit_canvases(4000, grid=grid, max_digits=most, seed=1)
    shares = targets.sum(1).bincount() / 4000
    assert len(shares) == expected + 1
    assert torch.allclose(shares, torch.full_like(shares, 1 / (expected + 1)), atol=0.03)


def test_cells_are_equally_likely_and_never_used_twice():
    _, targets = digit_canvases(4000, grid=(2, 3), max_digits=6, seed=1)
    per_cell = targets.view(4000, 6, 10).sum(2)
    assert per_cell.max() == 1
    assert torch.allclose(per_cell.float().mean(0), torch.tensor(0.5), atol=0.03)


def test_noise_has_its_size_and_keeps_the_range():
    clean, targets = digit_canvases(300, noise=0, seed=5)
    noisy, same_targets = digit_canvases(300, noise=0.1, seed=5)
    assert same_targets.equal(targets)  # noise changes pixels only
    inside = (clean > 0.4) & (clean < 0.6)  # four standard deviations away from either end
    assert (noisy - clean)[inside].std().item() == pytest.approx(0.1, rel=0.1)
    assert noisy.min() == 0
    assert noisy.max() == 1


def test_the_seed_decides_and_nothing_else():
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what must not matter
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    images, targets = digit_canvases(20, seed=7)
    assert torch.get_rng_state().equal(state[0])
    assert (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    torch.rand(5)
    again = digit_canvases(20, seed=7)
    assert again[0].equal(images)
    assert again[1].equal(targets)
    other = digit_canvases(20, seed=8)
    assert not other[0].equal(images)
    assert not other[1].equal(targets)


def test_canvases_do_not_share_memory_with_the_source():
    digit_canvases(5, grid=(1, 1), max_digits=1, noise=0, seed=0)[0].fill_(9)
    assert digit_canvases(50, grid=(1, 1), max_digits=1, noise=0, seed=0)[0].max() <= 1


def test_no_canvases():
    images, targets = digit_canvases(0, grid=(1, 2), seed=0)
    assert images.shape == (0, 1, 8, 16)
    assert targets.shape == (0, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": -1}, "n=-1"),
        ({"grid": (0, 3)}, r"grid=\(0, 3\)"),
        ({"grid": (3, 0)}, r"grid=\(3, 0\)"),
        ({"max_digits": -1}, "max_digits=-1"),
        ({"noise": -0.1}, "noise=-0.1"),
        ({"split": "dev"}, "split must be one of 'train', 'validation', 'test', got 'dev'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        digit_canvases(**{"n": 2, "seed": 0, **options})


def test_missing_scikit_learn_names_the_extra(monkeypatch):
    data._source_digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'scikit-learn; install it with: pip install "lossbook\[data\]"'):
        digit_canvases(1, seed=0)


def test_questions_are_what_the_readme_of_the_data_says():
    q = data.questions()
    per_group = q.group.bincount()
    said = (data.book_file("questions.csv").parent / "README.md").read_text(encoding="utf-8")
    facts = f"{len(q.text)} questions in {len(q.names)} groups, spread over {len(set(q.topics))} topics"
    assert facts in said
    assert f"in {per_group.min()} to {per_group.max()} wordings" in said
    assert len(q.topics) == len(q.names) == len(set(q.names)) == len(per_group) >= 120
    assert per_group.min() >= 10
    assert len(set(q.topics)) >= 15


def test_questions_are_clean():
    q = data.questions()
    bare = ["".join(c for c in text.lower() if c.isalnum()) for text in q.text]
    assert len(set(bare)) == len(bare)  # no question twice, in no spelling
    assert all(text.isascii() and text.strip() == text and bare for text, bare in zip(q.text, bare, strict=True))
    assert q.group.dtype == torch.int64
    assert q.group.tolist() == sorted(q.group.tolist())  # in the order of the file, group by group


def test_questions_come_from_the_file(folder):
    rows = 'group,topic,question\nb,t,"one, two"\na,u,three\nb,t,"say ""four"""\n'
    (folder / "questions.csv").write_text(rows, encoding="utf-8")
    q = data.questions()
    assert q.text == ["one, two", "three", 'say "four"']
    assert q.group.tolist() == [0, 1, 0]
    assert q.names == ["b", "a"]
    assert q.topics == ["t", "u"]


@pytest.fixture(params=["checkout", "installed"])
def folder(request, tmp_path, monkeypatch):
    """The data folder of a pretended checkout or installed package."""
    package = tmp_path / "lossbook"
    package.mkdir()
    monkeypatch.setattr(data, "__file__", str(package / "data" / "__init__.py"))
    (tmp_path / "data" / "results").mkdir(parents=True)  # a stranger's folder where nothing else shows a checkout
    if request.param == "checkout":
        (tmp_path / "pyproject.toml").touch()
        return tmp_path / "data"
    (package / "_data" / "results").mkdir(parents=True)
    return package / "_data"


def test_book_file(folder):
    (folder / "some.csv").write_text("a,b\n")
    assert data.book_file("some.csv") == folder / "some.csv"
    with pytest.raises(FileNotFoundError, match=r"the book has no data file 'other.csv'"):
        data.book_file("other.csv")


def test_published(folder):
    (folder / "published").mkdir()
    (folder / "published" / "emo.json").write_text('{"what": "é"}', encoding="utf-8")
    assert data.load_published("emo") == {"what": "é"}
    with pytest.raises(FileNotFoundError, match=r"published/none\.json"):
        data.load_published("none")


def test_record(folder):
    (folder / "results" / "focal.json").write_text(json.dumps({"name": "é", "runs": [1, 2]}), encoding="utf-8")
    assert data.load_record("focal") == {"name": "é", "runs": [1, 2]}
    assert data.load_record("none_yet") is None


def test_records_are_seen_by_who_watches_opened_files(folder):
    opened = []
    watching = True
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watching and event == "open" else None)
    data.load_record("missing")
    watching = False
    assert str(folder / "results" / "missing.json") in opened


# ---------------------------------------------------------------- the text inside CPython


@pytest.fixture
def topics(monkeypatch):
    """Topics of the interpreter that a test may fill."""
    texts = {}
    module = types.ModuleType("pydoc_data.topics")
    module.topics = texts
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", module)
    python_text.cache_clear()
    yield texts
    python_text.cache_clear()


def test_the_text_is_prose_in_words():
    paragraphs = python_text()
    assert len(paragraphs) > 500
    assert sum(map(len, paragraphs)) > 20_000
    assert len(set(paragraphs)) == len(paragraphs)
    for paragraph in paragraphs:
        assert paragraph[-1] in ".:!?)"
        assert len(paragraph) >= 6
        for word in paragraph:
            assert word == word.lower()
            assert re.fullmatch(r"\w+(?:['’]\w+)*|[^\w\s\"*]", word)
    counts = {word: sum(p.count(word) for p in paragraphs) for word in ("the", "python", "object")}
    assert counts["the"] > counts["object"] > counts["python"] > 0


def test_words_are_cut_as_said(topics):
    topics["a"] = 'Call *it* "f(x)"; it isn\'t\n   hard, and\n   Python\'s "__doc__" tells more.'
    assert [" ".join(p) for p in python_text()] == [
        "call it f ( x ) ; it isn't hard , and python's __doc__ tells more ."
    ]


@pytest.mark.parametrize(
    "paragraph",
    [
        "Five words are too few.",
        "this paragraph ends without any mark",
        "x = [y for y in range(10) if y % 2 == 0 and y > 3].",
        "* * * * * * * * * * * *",
        '"',
        "",
    ],
)
def test_what_is_no_prose_is_left_out(topics, paragraph):
    topics["a"] = f"Here are six or more words.\n\n{paragraph}\n\nAnd here are six or more words."
    assert [p[0] for p in python_text()] == ["here", "and"]


def test_a_paragraph_comes_once_and_in_the_order_of_the_names(topics):
    topics["b"] = "This is the second of three paragraphs.\n \n  This is a\n  paragraph that is shared."
    topics["a"] = "This is a paragraph that is shared.\n\n\nThis is the first of three paragraphs."
    assert [" ".join(p) for p in python_text()] == [
        "this is a paragraph that is shared .",
        "this is the first of three paragraphs .",
        "this is the second of three paragraphs .",
    ]


def test_a_python_without_the_topics_says_so(monkeypatch):
    python_text.cache_clear()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ModuleNotFoundError, match="pydoc_data"):
        python_text()


# ---------------------------------------------------------------- ARFF files


@pytest.fixture
def read(tmp_path):
    """Reads a text or bytes as an ARFF file."""

    def read_text(content):
        path = tmp_path / "some.arff"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_arff(path)

    return read_text


WEATHER = """% two comments
% before the header

@RELATION 'the weather, in short'
@attribute heat numeric
@Attribute\tmist   REAL
@attribute days Integer
@attribute sky {clear, 'light rain', "snow, ice"}
@attribute 'it\\'s fun' { no ,yes}

@DATA
21.5,-.25,3,clear,yes
% a comment between rows
 1e1 , +2. , 0 , 'light rain' , 'no'

?,?,-1,"snow, ice",?
{0 1.5, 3 "light rain",4 yes}
{2 7,3 ?}
{}
{ }
"""


def test_arff(read):
    it = read(WEATHER)
    assert it.names == ("heat", "mist", "days", "sky", "it's fun")
    assert it.nominal == {"sky": ("clear", "light rain", "snow, ice"), "it's fun": ("no", "yes")}
    nan = math.nan
    expected = [
        [21.5, -0.25, 3, 0, 1],
        [10, 2, 0, 1, 0],
        [nan, nan, -1, 2, nan],
        [1.5, 0, 0, 1, 1],
        [0, 0, 7, nan, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert it.values.dtype == torch.float64
    torch.testing.assert_close(it.values, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=0, equal_nan=True)
    assert repr(it) == "ArffTable(values=<float64 (7, 5)>, names=<5>, nominal=<2>)"


def test_arff_packed_or_with_other_line_ends(read):
    expected = read(WEATHER)
    for content in (gzip.compress(WEATHER.encode()), WEATHER.replace("\n", "\r\n"), WEATHER.rstrip("\n")):
        it = read(content)
        assert it.names == expected.names
        assert it.nominal == expected.nominal
        assert it.values.numpy().tobytes() == expected.values.numpy().tobytes()


def test_arff_escapes_and_names(read):
    it = read(
        r"""@attribute TAG_m\'usica {0,1}
@attribute "a \"b\" \\ 'c'" {'',"\t\n\r",\n, 5%}
@attribute é#;=1 {?,"x?"}
@data
1,"\t\n\r",x?
0,'','x\?'
0, \n ,'?'
"""
    )
    assert it.names == (r"TAG_m\'usica", "a \"b\" \\ 'c'", "é#;=1")
    assert it.nominal[it.names[1]] == ("", "\t\n\r", r"\n", "5%")
    assert it.values.tolist() == [[1, 1, 1], [0, 0, 1], [0, 2, 0]]


def test_arff_without_rows(read):
    it = read("@attribute a real\n@attribute b {x}\n@data\n")
    assert it.values.shape == (0, 2)
    assert it.values.dtype == torch.float64


def test_arff_keeps_every_bit_of_a_number(read):
    numbers = np.random.default_rng(0).standard_normal(1000) * 10.0 ** np.arange(-300, 300, 0.6)
    dense = "".join(f"{number!r}\n" for number in numbers.tolist())
    sparse = "".join(f"{{0 {number!r}}}\n" for number in numbers.tolist())
    it = read(f"@attribute a real\n@data\n{dense}{sparse}")
    assert it.values.flatten().tolist() == [*numbers, *numbers]


def test_arff_as_scipy_reads_it(read):
    rng = np.random.default_rng(1)
    skies = ("clear", "rain", "snow")
    rows = zip(rng.random(50).tolist(), rng.choice(skies, 50), range(50), strict=True)
    text = "@relation x\n@attribute a real\n@attribute sky {clear,rain,snow}\n@attribute c integer\n@data\n"
    text += "".join(f"{a!r},{sky},{c}\n" for a, sky, c in rows) + "?,?,?\n"
    theirs, meta = arff.loadarff(io.StringIO(text))
    it = read(text)
    assert it.names == tuple(meta.names())
    assert it.nominal == {"sky": tuple(meta["sky"][1])}
    places = [math.nan if sky == b"?" else skies.index(sky.decode()) for sky in theirs["sky"]]
    expected = torch.from_numpy(np.stack([theirs["a"], places, theirs["c"]], axis=1))
    assert torch.equal(it.values[:-1], expected[:-1])
    assert it.values[-1].isnan().all()
    assert expected[-1].isnan().all()


HEAD = "@attribute a real\n@attribute b {x,'y z'}\n@data\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", ": no @data"),
        ("@attribute a real\n", ": no @data"),
        ("@relation x\n@data\n1\n", ", line 2: no @attribute before @data"),
        ("@relation x\n\nhello\n", ", line 3: expected @relation, @attribute or @data, got 'hello'"),
        ("@attributes a real\n", ", line 1: expected @relation, @attribute or @data, got '@attributes a real'"),
        ("@attribute a\n", ", line 1: expected @attribute, a name and a type, got '@attribute a'"),
        ("@attribute 'a real\n", ", line 1: expected @attribute, a name and a type"),
        ("@attribute 'a'b real\n", ", line 1: expected @attribute, a name and a type"),
        ("@attribute a real\n@attribute 'a' real\n", ", line 2: a second attribute 'a'"),
        ("@attribute a string\n", ", line 1: expected the type numeric, real, integer or {value,...}, got 'string'"),
        (
            "@attribute a date yyyy\n",
            ", line 1: expected the type numeric, real, integer or {value,...}, got 'date yyyy'",
        ),
        ("@attribute a {x,y\n", ", line 1: expected the type numeric, real, integer or {value,...}, got '{x,y'"),
        ("@attribute a {}\n", ", line 1: expected a new value of 'a', got ''"),
        ("@attribute a {x,}\n", ", line 1: expected a new value of 'a', got ''"),
        ("@attribute a {x,'x'}\n", """, line 1: expected a new value of 'a', got "'x'\""""),
        ("@attribute a {x,'y}\n", """, line 1: quotes do not match in "x,'y\""""),
        ("@attribute a {x,'y' z}\n", """, line 1: quotes do not match in "'y' z\""""),
        (HEAD + "1\n", ", line 4: expected 2 values, got 1"),
        (HEAD + "1,x,{5}\n", ", line 4: expected 2 values, got 3"),
        (HEAD + "1,x\n,x\n", ", line 5: expected a number, got ''"),
        (HEAD + "1_0,x\n", ", line 4: expected a number, got '1_0'"),
        (HEAD + "inf,x\n", ", line 4: expected a number, got 'inf'"),
        (HEAD + "1e999,x\n", ", line 4: expected a finite number, got '1e999'"),
        (HEAD + "'1',x\n", """, line 4: expected a number, got "'1'\""""),
        (HEAD + "1,X\n", ", line 4: 'X' is not a known value of 'b'"),
        (HEAD + "1,\n", ", line 4: '' is not a known value of 'b'"),
        (HEAD + "1,y z\n% no\n1,'y  z'\n", ", line 6: 'y  z' is not a known value of 'b'"),
        (HEAD + "1,'y z\n", """, line 4: quotes do not match in "1,'y z\""""),
        (HEAD + "1,x'\n", """, line 4: quotes do not match in "1,x'\""""),
        (HEAD + "{0 1\n", ", line 4: no closing brace"),
        (HEAD + "{0 1,}\n", ", line 4: expected a place after 0 and before 2, got ''"),
        (HEAD + "{1 x,0 1}\n", ", line 4: expected a place after 1 and before 2, got '0'"),
        (HEAD + "{0 1,0 1}\n", ", line 4: expected a place after 0 and before 2, got '0'"),
        (HEAD + "{2 1}\n", ", line 4: expected a place after -1 and before 2, got '2'"),
        (HEAD + "{²  1}\n", ", line 4: expected a place after -1 and before 2, got '²'"),
        (HEAD + "{a 1}\n", ", line 4: expected a place after -1 and before 2, got 'a'"),
        (HEAD + "{0}\n", ", line 4: expected a number, got ''"),
        (HEAD + "{1 w}\n", ", line 4: 'w' is not a known value of 'b'"),
        (HEAD.encode() + b"1,x\n1,\xff\n", ", line 5: not UTF-8 (invalid start byte)"),
        (gzip.compress(HEAD.encode())[:-1], ": not a whole gzip file"),
    ],
)
def test_malformed_arff(read, tmp_path, content, message):
    with pytest.raises(MalformedFileError) as caught:
        read(content)
    assert str(caught.value).startswith(f"{tmp_path / 'some.arff'}{message}")


@pytest.mark.parametrize(
    "line", ["@attribute " + "a" * 10**6, "{" + "9" * 10**6 + " 1}", "1," + "x" * 10**6, "1," + "x" * 10**5 + "'"]
)
def test_errors_in_long_lines_are_short(read, tmp_path, line):
    with pytest.raises(MalformedFileError) as caught:
        read(line if line[0] == "@" else HEAD + line)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_no_arff_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.arff"):
        read_arff(tmp_path / "none.arff")
    with pytest.raises(TypeError, match="PathLike object, not int"):
        read_arff(3)
