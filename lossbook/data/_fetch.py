"""Public files: found in a folder, or downloaded into the cache; never handed out with wrong content. Private.

A file is looked for in two places:

1. the folder that ``LOSSBOOK_DATA`` names, where the user keeps copies. It is only read. A file there may be packed
   with gzip, under its name with ``.gz`` added; of two the one that is not packed is taken.
2. the cache: the folder that ``LOSSBOOK_CACHE`` names, or else the one that the platform has for caches. What it lacks
   is downloaded into it.

Every read compares the whole content with its SHA-256 in the registry.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import time
import zlib
from pathlib import Path
from typing import Any

from lossbook._extras import require
from lossbook.data._registry import PublicFile

ATTEMPTS = 3  # one download and two more where it may have been bad luck
TIMEOUT = 30.0  # seconds without a byte from the server after which an attempt ends
CHUNK = 1 << 16
ABANDONED = 24 * 3600  # seconds after which nobody can still be writing a temporary file


class WrongFileError(ValueError):
    """A file is not the one that the registry names: cut off, altered or another one."""


class MissingFileError(FileNotFoundError):
    """A file is not here and could not be downloaded."""


class _RefusedError(Exception):
    """The server's answer is final. Not an OSError: pooch would try again."""


def data_folder() -> Path | None:
    """The folder that ``LOSSBOOK_DATA`` names, or None where it names none.

    Raises:
        NotADirectoryError: There is no such folder.
    """
    named = os.environ.get("LOSSBOOK_DATA")
    if not named:
        return None
    folder = Path(named).expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"LOSSBOOK_DATA names {named}, and there is no such folder")
    return folder


def cache_folder() -> Path:
    """The folder of downloads, which may not exist yet."""
    named = os.environ.get("LOSSBOOK_CACHE")
    return Path(named).expanduser() if named else Path(require("pooch", "data").os_cache("lossbook"))


def find(file: PublicFile) -> tuple[Path, str] | None:
    """Where a file is, and in what: ``"LOSSBOOK_DATA"`` or ``"cache"``. Its content is not looked at."""
    if folder := data_folder():
        for path in (folder / file.name, folder / f"{file.name}.gz"):
            if path.is_file():
                return path, "LOSSBOOK_DATA"
    path = cache_folder() / file.name
    return (path, "cache") if path.is_file() else None


def read(file: PublicFile, path: Path) -> bytes:
    """The content of ``file`` from ``path``, unpacked if the path is that of a packed copy.

    Raises:
        WrongFileError: It is not the content that the registry names.
    """
    packed = path.name == f"{Path(file.name).name}.gz"
    try:
        if packed:
            with gzip.open(path) as stream:
                # One byte more than there should be shows a longer file, and makes gzip check its own checksum.
                content = stream.read(file.size + 1)
        else:
            content = path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise WrongFileError(f"{path} is not a whole gzip file ({error}); replace it or remove it") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != file.sha256:
        if len(content) == file.size:
            found = f"other content of the same size, SHA-256 {digest}"
        elif packed and len(content) > file.size:
            found = f"more than {file.size} bytes"
        else:
            found = f"{len(content)} bytes"
        raise WrongFileError(
            f"{path} is not {file.name}: expected {file.size} bytes with SHA-256 {file.sha256}, found {found}"
            f"{' after unpacking' if packed else ''}; replace it or remove it"
        )
    return content


def _sweep(folder: Path) -> None:
    """Remove what downloads left that were killed: pooch's temporary files, whose names begin with tmp."""
    for path in folder.glob("tmp*"):
        with contextlib.suppress(OSError):  # another process may have been quicker
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


def _transfer(url: str, output_file: str, pooch: Any) -> None:
    """Download once. pooch calls this, and calls it again after an error that may pass."""
    download = require("pooch", "data").HTTPDownloader(progressbar=True, chunk_size=CHUNK, timeout=TIMEOUT)
    try:
        download(url, output_file, pooch)
        Path(output_file).chmod(0o644)  # temporary files are their maker's alone, and a cache may be shared
    except OSError as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if 400 <= status < 500 and status not in (408, 429):  # the two that mean "later"
            raise _RefusedError(str(error)) from error
        raise


def fetch(file: PublicFile) -> Path:
    """The path of a file whose content is right, downloaded into the cache if it is nowhere.

    A wrong file in the cache is downloaded again and stays as it is until the new one has proved right. A wrong file in
    the folder of ``LOSSBOOK_DATA`` is an error, since that folder is the user's.

    Raises:
        WrongFileError: The file in the folder of ``LOSSBOOK_DATA`` is wrong.
        MissingFileError: It could not be downloaded; the message says what to download, from where, to where.
    """
    return _fetch(file)[0]


def content(file: PublicFile) -> bytes:
    """The content of a file, downloaded if it is nowhere. Raises what :func:`fetch` raises."""
    return _fetch(file)[1]


def _fetch(file: PublicFile) -> tuple[Path, bytes]:
    """Path and content: the bytes that were checked are the bytes that are used."""
    state = "is not here"
    if found := find(file):
        path, place = found
        try:
            return path, read(file, path)
        except WrongFileError as error:
            if place == "LOSSBOOK_DATA":
                raise
            state = f"is wrong in the cache ({error})"
    pooch = require("pooch", "data")
    require("tqdm", "data")  # pooch would miss it only after the connection is made
    path = cache_folder() / file.name
    store = pooch.Pooch(
        path=cache_folder(),
        base_url="",
        registry={file.name: file.sha256},
        urls={file.name: file.url},
        retry_if_failed=ATTEMPTS - 1,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # pooch's own way fails where two downloads begin at once
        _sweep(path.parent)
        # pooch writes to a temporary file beside the place, compares the hash and only then moves the file there.
        store.fetch(file.name, downloader=_transfer)
    except (_RefusedError, OSError, ValueError) as error:
        raise MissingFileError(
            f"{file.name} {state} and could not be downloaded: {error}\n"
            f"Download {file.url}\n"
            f"({file.size} bytes, SHA-256 {file.sha256})\n"
            f"and save it as {path}\n"
            f"or as {file.name} in a folder of yours that LOSSBOOK_DATA names."
        ) from error
    return path, read(file, path)
