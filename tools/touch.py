"""Figures to touch: their scripts on the pages that show one, and their pictures.

As a Sphinx extension it copies ``lossbook/_touch`` into the pages' ``_static/touch`` and loads it where a figure is.
``python -m tools.touch`` draws the pictures of the figures' first settings with Chromium and puts them into the stored
notebooks; run it when a figure changed. ``--check`` only tells which stored notebooks show an old picture.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat

from lossbook import touch
from tools.chapters import ROOT, all_notebooks

FOLDER = ROOT / "lossbook" / "_touch"
FIGURE = re.compile(r'class="touch" data-figure="(\w+)"')


def copy_scripts(app: Any) -> None:
    """Put scripts and styles where the pages find them."""
    target = Path(app.outdir) / "_static" / "touch"
    target.mkdir(parents=True, exist_ok=True)
    for file in [*FOLDER.glob("*.js"), *FOLDER.glob("*.css"), *FOLDER.glob("*LICENSE*")]:
        shutil.copyfile(file, target / file.name)


def load_scripts(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Load them on a page with a figure, and on no other."""
    names = sorted(set(FIGURE.findall(context.get("body", ""))))
    if names:
        app.add_css_file("touch/touch.css")
        for file in ("jsxgraphcore", "common", *names):
            app.add_js_file(f"touch/{file}.js", loading_method="defer")


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", copy_scripts)
    app.connect("html-page-context", load_scripts)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def draw(names: list[str]) -> None:
    """Draw the figures' pictures: 460 pixels wide, on a clear ground, in colours that show on light and dark pages."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    program = os.environ.get("LOSSBOOK_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    options: Any = {"viewport": {"width": 600, "height": 900}, "device_scale_factor": 1.5}
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        for name in names:
            text = touch.page(name).replace('class="touch"', 'class="touch" data-scheme="picture" style="width: 460px"')
            file = Path(folder) / f"{name}.html"
            file.write_text(f"<!doctype html><meta charset=utf-8>{text}", encoding="utf-8")
            tab = browser.new_context(offline=True, **options).new_page()
            tab.goto(file.as_uri())
            tab.wait_for_selector(".touch[data-live]")
            tab.wait_for_timeout(200)
            data = tab.locator(".touch").screenshot(omit_background=True)
            few = Image.open(io.BytesIO(data)).convert("RGBA").quantize(32, method=Image.Quantize.FASTOCTREE)
            few.save(FOLDER / f"{name}.png", optimize=True)
            print(f"{name}: {(FOLDER / f'{name}.png').stat().st_size / 1000:.0f} kB")
        browser.close()


def renew(*, check: bool = False) -> list[str]:
    """Put the figures as they are into the stored notebooks; return the slugs of those that showed another one."""
    changed = []
    for chapter in all_notebooks():
        notebook, old = chapter.notebook, False
        for cell in notebook.cells if notebook else []:
            for output in cell.get("outputs", []):
                found = FIGURE.search("".join(output.get("data", {}).get("text/html", "")))
                if not found:
                    continue
                new = touch.bundle(found[1])
                new["text/html"] = touch.stored(new["text/html"])
                if dict(output["data"]) != new:
                    output["data"], old = nbformat.from_dict(new), True
        if old:
            changed.append(chapter.slug)
            if not check:
                chapter.notebook_path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return changed


def main(arguments: list[str] | None = None) -> int:
    """Entry point; with ``--check`` the exit status is 1 if a stored notebook shows an old figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="figures to draw (default: all)")
    parser.add_argument("--check", action="store_true", help="draw nothing; tell what is old")
    options = parser.parse_args(arguments)
    if not options.check:
        draw(options.names or sorted(touch.figures()))
    changed = renew(check=options.check)
    for slug in changed:
        print(f"{slug}: {'shows an old figure' if options.check else 'shows the new figure'}", file=sys.stderr)
    return int(bool(changed) and options.check)


if __name__ == "__main__":
    raise SystemExit(main())
