"""``python -m lossbook.data``: which public data sets there are, get them, check them."""

from __future__ import annotations

import argparse
import sys

from lossbook.data._fetch import MissingFileError, WrongFileError, cache_folder, data_folder, fetch, find, read
from lossbook.data._registry import PublicSet, public_sets

ABOUT = """\
Public data sets of the book.

list      what there is, how large it is, its licence, and where it is; with names: citation and files, too
fetch     download what is not here; one that is here is checked
verify    compare the files that are here with their SHA-256; exit status 1 if one is wrong or missing

A name is one of those that list prints, or that of a loader (uci: all its tables), or all.

LOSSBOOK_DATA   a folder with copies of the files, used first, never written to
LOSSBOOK_CACHE  the folder for downloads, instead of the platform's folder for caches
"""


def choose(names: list[str]) -> list[PublicSet]:
    """The sets of these names.

    Raises:
        ValueError: There is no such set.
    """
    sets = public_sets()
    chosen: dict[str, PublicSet] = {}
    for name in names:
        found = {key: entry for key, entry in sets.items() if name in ("all", key, entry.loader.partition("(")[0])}
        if not found:
            raise ValueError(f"there is no data set {name!r}; there are: {', '.join(sets)}")
        chosen |= found
    return list(chosen.values())


def show_list(sets: list[PublicSet], *, details: bool) -> int:
    """Print the sets."""
    for entry in sets:
        places = {found[1] if (found := find(file)) else "not here" for file in entry.files}
        place = "partly here" if len(places) > 1 else places.pop()
        print(f"{entry.name:18} {entry.size / 1e6:6.1f} MB  {entry.licence:11} {place:14} {entry.title}")
        if details:
            print(f"  load with   lossbook.data.{entry.loader}")
            print(f"  licence     {entry.licence} ({entry.licence_source})")
            print(f"  cite        {entry.citation}")
            print(f"  SHA-256     {entry.sha256} (of the list of the files' digests)")
            for file in entry.files:
                print(f"  {file.name}  {file.size} bytes\n    SHA-256 {file.sha256}\n    {file.url}")
    print(f"\nLOSSBOOK_DATA: {data_folder() or 'not set'}\ncache: {cache_folder()}")
    return 0


def fetch_all(sets: list[PublicSet]) -> int:
    """Get every file of the sets; go on after a failure."""
    failed = 0
    for file in (file for entry in sets for file in entry.files):
        try:
            print(f"{file.name}: {fetch(file)}")
        except (MissingFileError, WrongFileError) as error:
            failed += 1
            print(error, file=sys.stderr)
    if failed:
        print(f"{failed} files are missing", file=sys.stderr)
    return int(failed > 0)


def verify_all(sets: list[PublicSet]) -> int:
    """Read every file of the sets that is here and compare."""
    counts = {"right": 0, "wrong": 0, "missing": 0}
    for file in (file for entry in sets for file in entry.files):
        if found := find(file):
            path, _ = found
            try:
                read(file, path)
                state, where = "right", str(path)
            except WrongFileError as error:
                state, where = "wrong", str(error)
        else:
            state, where = "missing", file.name
        counts[state] += 1
        print(f"{state:8} {where}")
    print(", ".join(f"{count} {state}" for state, count in counts.items()))
    return int(counts["wrong"] + counts["missing"] > 0)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lossbook.data", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("list", "fetch", "verify"))
    parser.add_argument("names", nargs="*", metavar="name", help="data sets; for list and verify all if none is given")
    options = parser.parse_args(arguments)
    if options.action == "fetch" and not options.names:
        parser.error("say what to fetch: names, or all")
    try:
        sets = choose(options.names or ["all"])
    except ValueError as error:
        parser.error(str(error))
    try:
        if options.action == "list":
            return show_list(sets, details=bool(options.names))
        return fetch_all(sets) if options.action == "fetch" else verify_all(sets)
    except (NotADirectoryError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
