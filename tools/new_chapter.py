"""Skeletons of a new chapter: ``python -m tools.new_chapter SLUG``.

They hold cross-entropy, from which every chapter starts, in the place of its loss; they pass lint and tests, and run as
soon as ``_toc.yml`` has the pages. A file that is there already is left alone. What must be edited by hand is printed.
"""

from __future__ import annotations

import argparse
import base64
import json
import keyword
import re
from pathlib import Path

from tools.chapters import EVIDENCE, EXERCISES, ROOT, all_chapters, read

TEMPLATES = Path(__file__).with_name("template")
FILES = {
    "module.py": "lossbook/{slug}.py",
    "test.py": "tests/test_{slug}.py",
    "chapter.md": "chapters/{slug}.md",
    "evidence.md": "chapters/{slug}" + EVIDENCE + ".md",
    "exercises.md": "chapters/{slug}" + EXERCISES + ".md",
    "figure.js": "lossbook/_touch/{slug}.js",
    "experiment.py": "experiments/{slug}.py",
}
# One clear pixel stands for the figure until `python -m tools.touch` has drawn it.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
IMPORTS = re.compile(r"(?:^from lossbook\S* import .*\n){2,}", re.MULTILINE)  # their order depends on the slug
LEFT = """
Left to do by hand:
  _toc.yml                 put the pages behind the last chapter:
      - file: chapters/{slug}
        sections:
          - file: chapters/{slug}_evidence
            title: Evidence
          - file: chapters/{slug}_exercises
            title: Exercises
  lossbook/__init__.py     the public names, there and in __init__.pyi; lossbook/plotting.py: the look of the loss
  lossbook/_touch          figures.json: the figure in words; the docstring of lossbook/touch.py lists the figures
  tests                    FLIPS and VERDICTS in test_chapters.py, the figure in test_touch.py, the signatures in
                           test_interface.py, a call in losses.py
  index.md                 the map; chapters/choosing.md: the way to the loss; chapters/reference.md: the module
  references.bib           the sources; chapters/notation.md: new words
  benchmarks/{slug}.py     time and memory, as benchmarks/harness.py says

Then: python -m tools.touch {slug}                       draws the figure (needs Chromium)
      python -m experiments.{slug} --scale smoke         does it work? Then without --scale, for the record
      make book"""


def title_of(slug: str) -> str:
    """The heading of the chapter, to begin with.

    Example:
        >>> title_of("am_softmax")
        'Am softmax'
    """
    return slug.replace("_", " ").capitalize()


def write(slug: str, root: Path = ROOT) -> tuple[list[str], list[str]]:
    """Write what is missing; the files that were written and those that were there."""
    words = {
        "slug": slug,
        "Title": title_of(slug),
        "title": title_of(slug).lower(),
        "Class": "".join(part.capitalize() for part in slug.split("_")),
        "number": str(len([c for c in all_chapters(root) if c.slug != slug]) + 1),
    }
    texts = {}
    for name, target in FILES.items():
        text = re.sub("«(\\w+)»", lambda m: words[m[1]], read(TEMPLATES / f"{name}.txt"))
        texts[target.format(slug=slug)] = IMPORTS.sub(lambda m: "".join(sorted(m[0].splitlines(True))), text).encode()
    texts[f"lossbook/_touch/{slug}.png"] = base64.b64decode(PIXEL)
    written = [name for name in texts if not (root / name).exists()]
    for name in written:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(texts[name])
    table = root / "lossbook/_touch/figures.json"
    figures = json.loads(read(table))
    if slug not in figures:
        figures[slug] = "A curve of the loss over the lead of the true class; say in two sentences what is to be seen."
        table.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return written, [name for name in texts if name not in written]


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m tools.new_chapter", description=__doc__.split("\n\n")[0])
    parser.add_argument("slug", help="its name in files and in Python: small letters, digits, underscores")
    slug = parser.parse_args(arguments).slug
    if not re.fullmatch(r"[a-z][a-z0-9_]*", slug) or keyword.iskeyword(slug):
        parser.error(f"a slug is small letters, digits and underscores, such as hinge or top_k; got {slug!r}")
    written, there = write(slug)
    for word, names in {"wrote": written, "left alone": there}.items():
        print("".join(f"{word:10}  {name}\n" for name in names), end="")
    print(LEFT.format(slug=slug))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
