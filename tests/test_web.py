"""What the world sees of the pages, and their translations: what can be told without building them."""

import os
import re
import shutil
import subprocess

import nbformat
import pytest
from babel.messages.catalog import Catalog
from babel.messages.pofile import write_po
from PIL import Image
from pybtex.database import parse_string

from lossbook.advice import predictions
from tools import catalogues, generated, languages, project, site
from tools.chapters import ROOT, all_chapters, read
from tools.limits import CODE_SPAN, ROLE
from tools.provenance import record_sentence

CATALOGUES = [(language, page) for language, pages in catalogues.languages().items() for page in pages]

SOURCE = """---
myst:
  html_meta:
    description: A book.
---
(label)=
# A book

First line
of a paragraph with {glue:text}`number`.

- one
- [two](two.md)

  two more

| head | other |
|---|---|
| one | `one` |

```python
# A book
one
```

:::{admonition} Question 1: one?
:class: dropdown question
An answer.
:::
"""


# ---------------------------------------------------------------- putting translations into a page


def test_blocks_are_replaced_and_nothing_else():
    table = {
        "A book": "甲",
        "A book.": "乙",
        "First line of a paragraph with {glue:text}`number`.": "丙 {glue:text}`number`。",
        "one": "丁",
        "[two](two.md)": "[戊](two.md)",
        "Question 1: one?": "问题 1：己？",
    }
    done = catalogues.replace(SOURCE, table)
    wanted = SOURCE.replace("description: A book.", "description: 乙").replace("# A book\n\n", "# 甲\n\n")
    wanted = wanted.replace("First line\nof a paragraph with {glue:text}`number`.", "丙 {glue:text}`number`。")
    wanted = wanted.replace("- one", "- 丁").replace("[two](", "[戊](").replace("| one |", "| 丁 |")
    assert done == wanted.replace("Question 1: one?", "问题 1：己？")


def test_the_longest_text_wins_and_a_translation_is_not_translated_again():
    assert catalogues.replace("one two\n\none\n", {"one": "two", "one two": "one"}) == "one\n\ntwo\n"


def test_a_part_of_a_block_is_no_block():
    for text in ("one\ntwo\n", "two\none\n", "one\n`two` and\n", "*two* and\none\n"):
        assert catalogues.replace(text, {"one": "字"}) == text


def test_values_of_cells_are_said_phrase_by_phrase():
    phrases = catalogues.translations("zh_CN", catalogues.PHRASES)
    brief = "3 hold, 0 open, 1 fail; +1.2 (-3.6 to +2.8) points; on bibtex and medical only"
    said = catalogues.say(brief, phrases)
    assert re.findall(r"[-+]?\d[\d.]*", said) == re.findall(r"[-+]?\d[\d.]*", brief)
    assert not re.search(r"hold|open|fail|points|only| to ", said)
    assert catalogues.say("0.66", phrases) == "0.66"


def latin(text):
    """The English words of a text, without code and names."""
    names = r"EXACT|BCE|EMO|softmax|micro|mixup|alpha|AMD EPYC|cpu|torch|[a-z0-9_./*-]+\.(?:py|json)"
    return re.findall(r"[A-Za-z]{3,}", re.sub(rf"`[^`]*`|\b(?:{names})\b", "", text))


def test_what_cells_print_and_records_say_is_translated():
    """The table of all verdicts and the claims of the page that has a catalogue; record sentences of every kind."""
    phrases = catalogues.translations("zh_CN", catalogues.PHRASES)
    notebook = nbformat.reads(read(ROOT / "chapters/choosing.ipynb"), as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    (table,) = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    names = {name for each in predictions() for task in each.verdicts() for name in re.split("[, ]", task.task)[:1]}
    said = [text for text in re.findall(r"(?<=>)[^<>]+(?=<)", languages.say_table(table, phrases)) if text.strip()]
    assert len(said) > 400
    own = {word for name in names for word in re.findall(r"[A-Za-z]{3,}", name)} - {"rate"}
    assert {text for text in said if set(latin(text)) - own} == set()
    printed = [line for output in outputs if output.output_type == "stream" for line in output.text.splitlines()]
    claims = [line for line in printed if line.startswith("✓")]
    assert len(claims) > 3
    assert [line for line in claims if latin(catalogues.say(line, phrases))] == []
    sentence = (
        "Record `a.json`: 3 runs at scale cpu, 1 minutes of computing on AMD EPYC, 2 threads a run, torch 2.13.0, 1"
    )
    for end in (", commit `1`.", ", commit `1` with changes that were not committed."):
        for more in ("", " **Outdated: `a.py` changed after these runs. The figures are those of the old code.**"):
            assert latin(catalogues.say(sentence + end + more, phrases)) == []
    for slug in ("breadth", "accuracy"):
        assert latin(catalogues.say(record_sentence(slug), phrases)) == []


# ---------------------------------------------------------------- the catalogues


def entries(language, page):
    return catalogues.translations(language, page).items()


@pytest.mark.parametrize(("language", "page"), CATALOGUES)
def test_numbers_stay_bound_in_a_translation(language, page):
    """Roles, code and addresses are those of the English text, and no digit is added."""
    assert len(entries(language, page)) > 20
    for text, translation in entries(language, page):
        kept = [[], []]
        bare = [text, translation]
        for pattern in (ROLE, CODE_SPAN, re.compile(r"\$[^$]+\$"), re.compile(r"(?<=\])\([^)]+\)")):
            for i in (0, 1):
                kept[i] += sorted(found[0] for found in pattern.finditer(bare[i]))
                bare[i] = pattern.sub("", bare[i])
        assert kept[1] == kept[0], text
        assert {*re.findall(r"\d+", bare[1])} <= {*re.findall(r"\d+", bare[0])}, text


@pytest.mark.parametrize(("language", "page"), CATALOGUES)
def test_each_translation_stands_on_its_page_or_is_told_to_be_outdated(language, page):
    source = read(ROOT / f"{page}.md") + (read(ROOT / "_toc.yml") if page == "index" else "")
    outdated = catalogues.state(language, page).outdated
    for text, translation in entries(language, page):
        shown = translation in catalogues.replace(source, {text: translation})
        assert shown == (text not in outdated)


@pytest.fixture
def book(tmp_path):
    """A book of one page with a catalogue."""
    (tmp_path / "_toc.yml").write_text("root: index\n")
    (tmp_path / "index.md").write_text(SOURCE)

    def told(**table):
        catalogue = Catalog("zh_CN")
        for text, translation in table.items():
            catalogue.add(text, translation, flags=["fuzzy"] if translation.startswith("?") else [])
        path = catalogues.path_of("zh_CN", "index", tmp_path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            write_po(file, catalogue)
        return catalogues.state("zh_CN", "index", tmp_path)

    return told


ALL = ["A book", "A book.", "First line of a paragraph with {glue:text}`number`.", "one", "[two](two.md)", "two more"]
ALL += ["head", "other", "`one`", "Question 1: one?", "An answer."]


def test_a_complete_catalogue_lacks_nothing(book, tmp_path, capsys):
    found = book(**dict.fromkeys(ALL, "字"))
    assert (found.texts, found.untranslated, found.outdated) == (len(ALL), [], [])
    assert catalogues.check(tmp_path) == 0
    assert "11 translated, 0 not, 0 outdated" in capsys.readouterr().out


def test_what_a_catalogue_lacks_is_told(book, tmp_path, capsys):
    table = dict.fromkeys(ALL, "字")
    found = book(**table | {"one": "", "`one`": "", "head": "?字", "gone": "字"})
    assert found.untranslated == ["one"]  # code needs no translation
    assert found.outdated == ["head", "gone"]
    del table["An answer."]  # a text that the catalogue has never seen
    (tmp_path / "_toc.yml").write_text("root: index\nparts:\n  - caption: A part\n")
    assert book(**table).untranslated == ["An answer.", "A part"]
    assert catalogues.check(tmp_path) == 1
    assert "untranslated: An answer." in capsys.readouterr().out


def test_a_changed_text_is_marked_and_keeps_its_old_translation(tmp_path):
    template, path = tmp_path / "index.pot", tmp_path / "index.po"

    def collected(*texts):
        catalogue = Catalog()
        for text in texts:
            catalogue.add(text)
        with template.open("wb") as file:
            write_po(file, catalogue)
        catalogues.renew(path, template, "zh_CN")
        return catalogues.load(path, "zh_CN")

    first = collected("Six chapters on losses.", "A book")
    first["Six chapters on losses."].string = "六章。"
    with path.open("wb") as file:
        write_po(file, first)
    before = path.read_bytes()
    collected("Six chapters on losses.", "A book")
    assert read_strings(path) == {"Six chapters on losses.": "六章。", "A book": ""}
    second = collected("Seven chapters on losses.", "A book")
    assert second["Seven chapters on losses."].fuzzy
    assert second["Seven chapters on losses."].string == "六章。"
    assert path.read_bytes() != before


def read_strings(path):
    return {entry.id: entry.string for entry in catalogues.load(path, "zh_CN") if entry.id}


# ---------------------------------------------------------------- dates, cards, citations


def git(folder, *words):
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)


@pytest.fixture
def history(tmp_path):
    """A repository whose page a changed after page b."""
    folder = tmp_path / "all of it"
    (folder / "chapters").mkdir(parents=True)
    git(folder, "init", "-q")
    for day, name in (("2024-01-01", "a"), ("2024-02-02", "b"), ("2024-03-03", "a")):
        (folder / "chapters" / f"{name}.md").write_text(day)
        git(folder, "add", "-A")
        who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(
            ["git", "-C", str(folder), *who, "commit", "-qm", day],
            check=True,
            env={
                "PATH": os.environ["PATH"],
                "GIT_AUTHOR_DATE": f"{day}T12:00:00Z",
                "GIT_COMMITTER_DATE": f"{day}T12:00:00Z",
            },
        )
    return folder


def test_a_page_has_the_date_of_its_last_commit(history):
    assert site.changed(history) == {"chapters/a": "2024-03-03", "chapters/b": "2024-02-02"}


def test_a_shallow_clone_tells_the_dates_that_it_knows(history, tmp_path):
    git(tmp_path, "clone", "-q", "--depth", "2", history.as_uri(), "shallow")
    assert site.changed(tmp_path / "shallow") == {"chapters/a": "2024-03-03"}


def test_without_git_pages_have_no_date(history, tmp_path, monkeypatch):
    shutil.rmtree(history / ".git")
    assert site.changed(history) == {}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert site.changed(history) == {}


def test_a_card_shows_title_and_cover(tmp_path):
    cover = ROOT / "lossbook" / "_touch" / "focal.png"
    for name, title, picture in (("a", "Focal loss", None), ("b", "Soft labels", None), ("c", "Focal loss", cover)):
        site.card(title, picture and picture.read_bytes(), tmp_path / f"{name}.png")
    cards = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
    assert len(set(cards)) == 3
    assert max(map(len, cards)) < 150_000
    assert Image.open(tmp_path / "a.png").size == (1200, 630)


@pytest.mark.parametrize("chapter", all_chapters(), ids=lambda c: c.slug)
def test_the_citation_of_a_chapter_is_bibtex(chapter):
    box = generated.citation(chapter)
    (entry,) = parse_string(re.search(r"```bibtex\n([\s\S]+?)```", box)[1], "bibtex").entries.values()
    assert entry.fields["title"].strip("{}") == generated.title(chapter)
    assert entry.fields["url"].startswith(project.urls()["Documentation"])
    assert project.version() in entry.fields["note"]
    assert [str(person) for person in entry.persons["author"]] == ["{The lossbook authors}"]
