"""The picture of ``README.md``: the built front page in a browser, ``python -m tools.picture``. Needs Chromium.

The file holds the texts that it shows and digests of the pictures in it, so that a test can tell whether the front page
still shows them.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import sys
from pathlib import Path

from tools.chapters import ROOT, read
from tools.pdf import FLAGS, chromium

PICTURE = Path("docs/page.png")
WIDTH, COLOURS = 960, 256
SHOWN = """() => {
  const inside = part => {
    const box = part.getBoundingClientRect();
    return box.height && box.top >= 0 && box.bottom <= innerHeight;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), texts = new Set();
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const range = document.createRange(), text = node.textContent.trim().replace(/\\s+/g, ' ');
    range.selectNode(node);
    const shown = node.parentElement.checkVisibility({checkOpacity: true, checkVisibilityCSS: true});
    if (text && shown && !node.parentElement.closest('button') && inside(range)) texts.add(text);
  }
  return [[...texts], [...document.images].filter(inside).map(image => image.getAttribute('src'))];
}"""


def digest(path: Path) -> str:
    """16 digits that stand for a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.exists() else ""


def draw(site: Path, target: Path) -> None:
    """Draw the front page of a built book."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium(), args=FLAGS)
        tab = browser.new_page(viewport={"width": 1200, "height": 1300})
        tab.goto((site / "index.html").as_uri(), wait_until="load")
        texts, images = tab.evaluate(SHOWN)
        shot = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
        browser.close()
    small = shot.resize((WIDTH, WIDTH * shot.height // shot.width), Image.Resampling.LANCZOS)
    shown = PngInfo()
    shown.add_text("shown", json.dumps({"texts": texts, "images": {name: digest(site / name) for name in images}}))
    palette = small.quantize(COLOURS, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    palette.save(target, optimize=True, pnginfo=shown)


def stale(site: Path, picture: Path) -> list[str]:
    """What the picture shows and the front page of a built book does not."""
    from PIL import Image

    with Image.open(picture) as opened:
        shown = json.loads(opened.info["shown"])
    page = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", read(site / "index.html"))))
    texts = [text for text in shown["texts"] if text not in page]
    return texts + [name for name, then in shown["images"].items() if digest(site / name) != then]


def main(root: Path = ROOT) -> int:
    """Entry point."""
    site = root / "_build" / "html"
    if not (site / "index.html").exists():
        print("The book is not built: make book", file=sys.stderr)
        return 1
    try:
        draw(site, root / PICTURE)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"The front page is drawn: {root / PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
