"""Which public data sets there are, and where their files come from: ``data/public.json``, read and typed. Private."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache

from lossbook.data import book_file


@dataclass(frozen=True)
class PublicFile:
    """One file of a public data set.

    Attributes:
        name: Its path inside the cache and inside the folder that ``LOSSBOOK_DATA`` names, with forward slashes.
        url: Where it is downloaded from.
        sha256: SHA-256 of the bytes that the URL serves, in hex digits.
        size: How many bytes these are.
    """

    name: str
    url: str
    sha256: str
    size: int


@dataclass(frozen=True)
class PublicSet:
    """One public data set.

    Attributes:
        name: Its name for ``python -m lossbook.data``.
        loader: The call that loads it.
        title: What it is, in one line.
        licence: An SPDX name, or ``"not stated"``.
        licence_source: Who says so.
        citation: What to cite.
        source: The home of its files.
        files: Its files, licence texts included.
    """

    name: str
    loader: str
    title: str
    licence: str
    licence_source: str
    citation: str
    source: str
    files: tuple[PublicFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def sha256(self) -> str:
        """One digest for the whole set: of its files' digests and names, in the form that ``sha256sum`` prints."""
        lines = sorted(f"{file.sha256}  {file.name}\n" for file in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


@cache
def public_sets() -> dict[str, PublicSet]:
    """All public data sets by name, in the order of the registry."""
    document = json.loads(book_file("public.json").read_text(encoding="utf-8"))
    sets = {}
    for name, fields in document["sets"].items():
        files = tuple(PublicFile(**file) for file in fields.pop("files"))
        sets[name] = PublicSet(name=name, files=files, **fields)
    return sets


def public_file(name: str) -> PublicFile:
    """A file of the registry by its name."""
    return {file.name: file for entry in public_sets().values() for file in entry.files}[name]
