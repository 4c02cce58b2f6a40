"""The whole book as one PDF: ``python -m tools.pdf``, which is ``make pdf``. Needs Chromium.

Sphinx writes all pages as one, Chromium prints it: formulas and figures whole, a contents page, an outline, page
numbers, and what links lead out of the book as notes at the end of each chapter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tools.build import JUPYTER_BOOK
from tools.chapters import ROOT

TARGET = Path("_build/lossbook.pdf")
FLAGS = ["--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
SECONDS = 600

# Opens what is folded, drops what only a screen needs, and moves each outside link into a numbered list of its chapter.
PREPARE = """() => {
  document.documentElement.dataset.theme = 'light';
  document.querySelectorAll('details').forEach(d => { d.open = true; });
  const aside = 'button, .headerlink, .copybtn, .tocbutton, #jb-print-toc, .bd-sidebar-primary, .bd-sidebar-secondary';
  document.querySelectorAll(aside).forEach(e => e.remove());
  document.querySelectorAll('.toggle-hidden').forEach(e => e.classList.remove('toggle-hidden'));
  const main = document.querySelector('main') || document.body;
  // Sphinx marks where each page begins; evidence and exercises lie inside of their chapter.
  const marks = [...main.querySelectorAll('span[id^="document-"]')];
  const chapters = marks.map(mark => mark.nextElementSibling).filter(next => next?.tagName === 'SECTION');
  chapters.forEach(chapter => chapter.classList.add('document'));
  for (const chapter of chapters) {
    const notes = new Map();
    for (const link of chapter.querySelectorAll('a[href^="http"]')) {
      if (link.closest('.document') !== chapter) continue;
      if (!notes.has(link.href)) notes.set(link.href, notes.size + 1);
      const mark = document.createElement('sup');
      mark.textContent = notes.get(link.href);
      link.after(mark);
    }
    if (!notes.size) continue;
    const list = document.createElement('ol');
    list.className = 'link-notes';
    for (const href of notes.keys()) {
      const item = document.createElement('li');
      item.textContent = href;
      list.append(item);
    }
    const inner = [...chapter.querySelectorAll('.toctree-wrapper')].find(e => e.closest('.document') === chapter);
    inner ? inner.before(list) : chapter.append(list);
  }
  main.querySelectorAll('.toctree-wrapper:not(:has(section))').forEach(e => e.remove());
  const contents = document.createElement('nav');
  contents.className = 'print-contents';
  contents.innerHTML = '<p class="print-title">Contents</p>';
  for (const chapter of chapters) {
    const item = document.createElement('p'), link = document.createElement('a');
    link.href = '#' + chapter.id;
    const heading = chapter.querySelector(':scope > :is(h1, h2, h3, h4)');
    link.textContent = heading ? heading.innerText.trim() : chapter.id;
    const page = document.createElement('span');
    page.className = 'print-page';
    item.className = chapter.parentElement.closest('.document') ? 'inner' : 'outer';
    item.append(link, page);
    contents.append(item);
  }
  (main.querySelector('h1') || main).after(contents);
  return chapters.length;
}"""
# Writes the numbers of their pages beside the titles of the contents.
NUMBER = """numbers => document.querySelectorAll('.print-contents p').forEach(item => {
  const page = item.querySelector('.print-page'), link = item.querySelector('a');
  if (page) page.textContent = numbers[decodeURIComponent(link.hash.slice(1))] ?? '';
})"""
STYLE = """
.bd-header, .bd-sidebar-primary, .bd-sidebar-secondary, .header-article, footer, .prev-next-area, .toggle-button,
.sbt-scroll-pixel-helper,
.above-input, .tag_hide-input > .cell_input, .tag_hide-cell > .cell_input { display: none !important; }
.bd-main .bd-content .bd-article-container { max-width: none !important; }
.document { break-before: page; }
.print-contents { break-after: page; }
.print-contents p { margin: 0.2em 0; display: flex; }
.print-page { flex: 1; display: flex; }
.print-page::before { content: ""; flex: 1; border-bottom: 1px dotted #888; margin: 0 0.4em 0.3em; min-width: 1em; }
.print-contents .inner { margin-left: 2em; font-size: 90%; }
.print-title { font-size: 140%; }
figure, img, svg, table, pre, .math, .admonition, .cell_output { break-inside: avoid; }
h1, h2, h3, h4 { break-after: avoid; }
pre { white-space: pre-wrap; font-size: 8.5pt; }
body { font-size: 10.5pt; }
.link-notes { font-size: 8pt; border-top: 1px solid; margin-top: 2em; padding-top: .5em; overflow-wrap: anywhere; }
"""
FOOT = """<div style="font-size: 8px; width: 100%; text-align: center; color: #555;">
<span class="pageNumber"></span></div>"""


def chromium() -> str:
    """The program that prints.

    Raises:
        FileNotFoundError: There is none.
    """
    found = os.environ.get("LOSSBOOK_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not found:
        raise FileNotFoundError("Chromium is missing: apt-get install chromium, or name it in LOSSBOOK_CHROMIUM")
    return found


def one_page(root: Path, output: Path) -> Path:
    """All pages of the book as one file.

    Raises:
        RuntimeError: Sphinx stopped; the text is its output.
    """
    command = [*JUPYTER_BOOK, "build", str(root), "--path-output", str(output), "--builder", "singlehtml", "-q"]
    done = subprocess.run(command, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    page = output / "_build" / "singlehtml" / "index.html"
    if done.returncode or not page.exists():
        raise RuntimeError(done.stdout[-3000:])
    return page


def print_tab(browser: Any, page: Path, target: Path) -> int:
    """Print a page of the book in a browser that runs; the number of its chapters."""
    tab = browser.new_page()
    tab.set_default_timeout(SECONDS * 1000)
    tab.goto(page.as_uri(), wait_until="load")
    tab.wait_for_function("window.MathJax?.startup?.promise !== undefined")
    tab.evaluate("window.MathJax.startup.promise")
    tab.add_style_tag(content=STYLE)
    chapters: int = tab.evaluate(PREPARE)
    target.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "path": str(target),
        "format": "A4",
        "margin": {"top": "18mm", "bottom": "18mm", "left": "20mm", "right": "20mm"},
        "display_header_footer": True,
        "header_template": "<span></span>",
        "footer_template": FOOT,
        "print_background": True,
    }
    tab.pdf(**options)  # twice: where a chapter begins is known once it has been printed
    tab.evaluate(NUMBER, pages_of(target))
    tab.pdf(**options, outline=True, tagged=True)
    tab.close()
    return chapters


def pages_of(target: Path) -> dict[str, int]:
    """The number of the page that each link inside of a PDF leads to."""
    from pypdf import PdfReader

    reader = PdfReader(target)
    found = {name: reader.get_destination_page_number(place) for name, place in reader.named_destinations.items()}
    return {name.removeprefix("/"): number + 1 for name, number in found.items() if number is not None}


def print_page(page: Path, target: Path) -> int:
    """Print a page of the book; the number of its chapters."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=FLAGS)
        chapters = print_tab(browser, page, target)
        browser.close()
    return chapters


def main(root: Path = ROOT) -> int:
    """Entry point."""
    try:
        chromium()  # before the long part
        with tempfile.TemporaryDirectory() as output:
            print_page(one_page(root, Path(output)), root / TARGET)
    except (FileNotFoundError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The book is printed: {root / TARGET}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
