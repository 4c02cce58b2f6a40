"""Translations: the gettext catalogues below ``locale``, and what they lack.

``locale/<language>/LC_MESSAGES/<page>.po`` holds the texts of a page with their translations; a page that has one is
built in that language. ``phrases.po`` beside them translates what cells put into pages, with ``{}`` for each number.

``python -m tools.catalogues``, which is ``make gettext``, has Sphinx collect the texts of all pages in
``_build/gettext`` and renews the catalogues: a text that changed is marked fuzzy and stays English on the page until
somebody has seen to it. ``--add zh_CN chapters/focal`` begins a page. ``--check`` collects nothing, and fails where a
text is untranslated or outdated.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babel.messages.pofile import read_po, write_po

from tools.build import JUPYTER_BOOK
from tools.chapters import CATALOGUES, PREVIEW, ROOT, read
from tools.limits import plain

LOCALE = Path("locale")
TEMPLATES = Path("_build/gettext")
PHRASES = "phrases"

VERBATIM = r"^ *(?P<fence>`{3,}|~{3,})[^\n]*\n[\s\S]*?^ *(?P=fence) *$"
# What stands on a line before a text: bullets, marks of headings and quotes, a directive, a key, the cells before it.
LEAD = r"^[ >]*(?:[-*+] |\d+\. |#+ |:{3,}\{\w+\} |:?[\w-]+: )*(?:\| )?|(?<=\| )"
# A line that does not go on with the text of the line before.
FRESH = r"[ >]*(?:$|[-*+] |\d+\. |#+ |\||:{3,}|:?[\w\"=:-]+:(?: |$)|`{3,}|~{3,}|---|\([\w.:-]+\)=)"
BREAK = r"(?:[ \t]+|[ \t]*\n[ \t>]*)"
HEADER = re.compile(r"\A---\n[\s\S]*?\n---\n")


def normal(text: str) -> str:
    """A text on one line, as catalogues hold it."""
    return " ".join(re.sub(r"\n[ \t>]*", " ", text).split())


def replace(text: str, table: dict[str, str]) -> str:
    """The source of a page with those blocks of text replaced that the table names.

    Example:
        >>> replace("# Hello\\n\\n| one | two |", {"Hello": "你好", "two": "二"})
        '# 你好\\n\\n| one | 二 |'
    """
    if not table:
        return text
    known = "|".join(BREAK.join(map(re.escape, key.split())) for key in sorted(table, key=len, reverse=True))
    blocks = re.compile(rf"(?P<closed>{VERBATIM})|(?P<lead>{LEAD})(?P<text>{known})(?=[ \t]*(?:\||\Z|\n{FRESH}))", re.M)

    def put(match: re.Match[str]) -> str:
        before = text[: match.start()].split("\n")
        inside = len(before) > 1 and not before[-1] and not (match["lead"] or re.match(FRESH, before[-2]))
        return match[0] if match["closed"] or inside else match["lead"] + table[normal(match["text"])]

    return blocks.sub(put, text)


def wordy(text: str) -> bool:
    """Whether there is anything to translate: no words are left once code, roles and formulas are gone."""
    return bool(re.search(r"[^\W\d_]{2}", re.sub(r"\b(?:code|role|formula)\b", "", plain(text))))


# ---------------------------------------------------------------- the catalogues


def languages(root: Path = ROOT) -> dict[str, list[str]]:
    """The languages, each with the pages that have a catalogue in it."""
    folders = {path.name: path / "LC_MESSAGES" for path in sorted((root / LOCALE).glob("*"))}
    found = {
        language: sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.po"))
        for language, folder in folders.items()
    }
    return {language: [name for name in names if name != PHRASES] for language, names in found.items()}


def path_of(language: str, page: str, root: Path = ROOT) -> Path:
    """The catalogue of a page."""
    return root / LOCALE / language / "LC_MESSAGES" / f"{page}.po"


def load(path: Path, language: str | None = None) -> Any:
    """A catalogue or template."""
    with path.open("rb") as file:
        return read_po(file, locale=language)


def translations(language: str, page: str, root: Path = ROOT) -> dict[str, str]:
    """What a catalogue translates, without the entries that are marked fuzzy."""
    path = path_of(language, page, root)
    entries = load(path, language) if path.exists() else ()
    return {normal(entry.id): entry.string for entry in entries if entry.id and entry.string and not entry.fuzzy}


def say(text: str, phrases: dict[str, str]) -> str:
    """A value of a cell in another language; each ``{}`` of a phrase stands for what it finds there.

    Example:
        >>> say("4 hold, 1 open", {"{} hold, {} open": "成立 {} 项，未定 {} 项"})
        '成立 4 项，未定 1 项'
    """
    for phrase, translation in phrases.items():
        if found := re.fullmatch("(.+?)".join(map(re.escape, phrase.split("{}"))), text):
            return translation.format(*(say(part, phrases) for part in found.groups()))
    return text


# ---------------------------------------------------------------- what they lack


@dataclass(frozen=True)
class State:
    """What a catalogue lacks.

    Attributes:
        texts: How many texts it translates.
        untranslated: The texts of the page without a translation, those that the catalogue does not know among them.
        outdated: Its entries whose text has changed or is gone.
    """

    texts: int
    untranslated: list[str]
    outdated: list[str]


def state(language: str, page: str, root: Path = ROOT) -> State:
    """What the catalogue of a page lacks."""
    entries = {normal(entry.id): entry for entry in load(path_of(language, page, root), language) if entry.id}
    done = translations(language, page, root)
    source = HEADER.sub("", text := read(root / f"{page}.md"))
    # The names of parts and sections belong to the front page.
    contents = read(root / "_toc.yml") if page == "index" else ""
    text += contents
    gone = [key for key in entries if replace(text, {key: "\0"}) == text]
    rest = re.sub(rf"{VERBATIM}|^:{{3,}}\{{div\}}.*$", "", replace(source, dict.fromkeys(entries, "")), flags=re.M)
    unknown = [line.strip() for line in rest.split("\n") if wordy(line)]
    unknown += [part for part in re.findall(r"- caption: (.+)", contents) if part not in entries]
    fuzzy = [key for key, entry in entries.items() if entry.fuzzy and key not in gone]
    empty = [key for key in entries if key not in (*done, *gone, *fuzzy) and wordy(key)]
    return State(len(done), empty + unknown, fuzzy + gone)


def check(root: Path = ROOT) -> int:
    """Print what all catalogues lack; the exit status."""
    lacking = False
    for language, pages in languages(root).items():
        for page in pages:
            found = state(language, page, root)
            lacking |= bool(found.untranslated or found.outdated)
            counts = f"{found.texts} translated, {len(found.untranslated)} not, {len(found.outdated)} outdated"
            print(f"{language} {page}: {counts}")
            for word, texts in (("untranslated", found.untranslated), ("outdated", found.outdated)):
                for text in texts:
                    print(f"    {word}: {text[:90]}")
    return int(lacking)


# ---------------------------------------------------------------- renewing them


def collect(root: Path = ROOT) -> Path:
    """Have Sphinx write the templates of all pages; their folder.

    Raises:
        RuntimeError: Sphinx stopped; the text is its output.
    """
    output = root / TEMPLATES
    shutil.rmtree(output, ignore_errors=True)
    command = [*JUPYTER_BOOK, "build", str(root), "--path-output", str(output), "-q"]
    done = subprocess.run(
        [*command, "--builder", "custom", "--custom-builder", "gettext"],
        cwd=root,
        env={**os.environ, CATALOGUES: "1", PREVIEW: "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    found = output / "_build" / "gettext"
    if done.returncode or not found.exists():
        raise RuntimeError(done.stdout[-3000:])
    for file in found.rglob("*.pot"):
        target = output / file.relative_to(found)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    shutil.rmtree(output / "_build")
    return output


def renew(path: Path, template: Path, language: str) -> None:
    """Bring a catalogue up to date, or begin it."""
    new = load(template)
    texts = [entry.id for entry in new if entry.id]
    for text in texts:  # the text of a picture is a part of that around it
        if not (wordy(text) or "](" in text) or any(f"![{text}](" in other for other in texts):
            new.delete(text)
    if path.exists():
        catalogue = load(path, language)
        created = catalogue.creation_date
        catalogue.update(new)
        catalogue.creation_date = created  # a catalogue in which nothing else changed stays as it is
    else:
        from babel.messages.catalog import Catalog

        path.parent.mkdir(parents=True, exist_ok=True)
        catalogue = Catalog(language, project="lossbook")
        catalogue.update(new)
    with path.open("wb") as file:
        write_po(file, catalogue, width=100, ignore_obsolete=True, include_previous=True)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="collect nothing; fail where something is lacking")
    parser.add_argument("--add", nargs=2, metavar=("LANGUAGE", "PAGE"), help="begin the catalogue of a page")
    options = parser.parse_args(arguments)
    if options.check:
        return check(root)
    templates = collect(root)
    known = [(language, page) for language, pages in languages(root).items() for page in pages]
    for language, page in [*known, *([options.add] if options.add else [])]:
        renew(path_of(language, page, root), templates / f"{page}.pot", language)
    check(root)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
