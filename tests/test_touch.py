"""The figures to touch, in a browser: their numbers beside lossbook's, keys, fingers, light and dark.

Needs Chromium, as tests/test_book.py does, and is skipped without it under the same rules.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lossbook import touch
from lossbook.accuracy import exact_loss, expected_accuracy
from lossbook.am_softmax import (
    additive_angular_margin,
    additive_cosine_margin,
    margin_softmax_loss,
    multiplied_angle,
)
from lossbook.emo import emo_ce_loss, emo_loss
from lossbook.focal import hard_truncated_bce, sigmoid_focal_loss, soft_truncated_bce
from lossbook.multilabel_softmax import multilabel_softmax_loss
from lossbook.plotting import COLORS, LOSS
from lossbook.spans import span_loss, span_mask, spans_to_index
from tools import touch as tool

NAMES = sorted(touch.figures())
FIGURES = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def show(browser, tmp_path):
    """Open a figure as a notebook shows it; whatever it asks of the network or complains of fails the test."""
    contexts, problems = [], []

    def opener(name, *, ground="", width=1000, scripts=True, **options):
        file = tmp_path / f"{name}.html"
        head = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>x</title><body style="margin:20px;{ground}">'
        )
        file.write_text(head + touch.page(name), encoding="utf-8")
        context = browser.new_context(
            viewport={"width": width, "height": 900}, offline=True, java_script_enabled=scripts, **options
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
        tab.on("pageerror", lambda e: problems.append(str(e)))
        tab.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else problems.append(r.url))
        tab.goto(file.as_uri())
        if scripts:
            tab.wait_for_selector(".touch[data-live] .touch-says:not(:empty)")
        return tab

    yield opener
    for context in contexts:
        context.close()
    assert problems == []


# ---------------------------------------------------------------- numbers


def numbers(tab, code: str, *arguments) -> Tensor:
    """What a function of the figures' scripts gives for each row of the arguments."""
    rows = [list(row) for row in zip(*arguments, strict=True)]
    found = tab.evaluate(f"rows => {{ const L = lossbookTouch; return rows.map(({code})); }}", rows)
    return torch.tensor(found, dtype=torch.float64)


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted.detach().double(), rtol=1e-9, atol=1e-300)


def value_and_slope(loss, *scores: Tensor) -> tuple[Tensor, ...]:
    scores = tuple(s.clone().requires_grad_() for s in scores)
    value = loss(*scores)
    return value, *torch.autograd.grad(value.sum(), scores)


def doubles(values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", ["BCE", "hard truncation", "soft truncation", "focal loss"])
def test_focal(show, name):
    tab = show("focal")
    z = torch.linspace(-30, 30, 241, dtype=torch.float64)
    zeros = torch.zeros_like(z)
    key, options, loss = {
        "BCE": ("gamma", [0.0], lambda s, _, **o: -F.logsigmoid(-s)),
        "hard truncation": ("m", [0.05, 0.5, 0.7, 0.95], lambda s, m, **o: hard_truncated_bce(s, zeros, margin=m, **o)),
        "soft truncation": (
            "K",
            [0.5, 1.0, 4.0, 12.0],
            lambda s, k, **o: soft_truncated_bce(s, zeros, sharpness=k, **o),
        ),
        "focal loss": ("gamma", [0.0, 0.1, 2.0, 5.0], lambda s, g, **o: sigmoid_focal_loss(s, zeros, gamma=g, **o)),
    }[name]
    for option in options:
        value, slope = value_and_slope(lambda s, o=option: loss(s, o, reduction="none"), z)
        given = [{"gamma": 2, "K": 4, "m": 0.5, key: option}] * len(z)
        names = [name] * len(z)
        same(numbers(tab, "([n, z, o]) => L.focal.loss(n, z, o)", names, z.tolist(), given), value)
        same(numbers(tab, "([n, z, o]) => L.focal.push(n, z, o)", names, z.tolist(), given), slope)


def test_focal_share(show):
    """With equal pushes the easy have 1,000 of 1,003 parts; alpha counts in focal loss alone."""
    tab = show("focal")
    options = {"gamma": 0, "K": 4, "m": 0.5, "easy": 30, "hard": 30, "alpha": 0.25}
    shares = numbers(tab, "([n, o]) => L.focal.share(n, o)", ["BCE", "focal loss"], [options] * 2)
    same(shares, doubles([1000 / 1003, 750 / (0.75 + 750)]))


def test_multilabel_softmax(show):
    tab = show("multilabel_softmax")
    generator = torch.Generator().manual_seed(1)
    for positives, negatives in [(2, 3), (1, 0), (0, 1), (2, 103), (3, 1003)]:
        s = 4 * torch.randn(20, positives + negatives, dtype=torch.float64, generator=generator)
        t = (torch.arange(positives + negatives) < positives).long().expand_as(s)
        pos, neg = s[:, :positives].tolist(), s[:, positives:].tolist()
        for path, loss in {
            "": lambda s, t=t: multilabel_softmax_loss(s, t, reduction="none"),
            "bce.": lambda s, t=t: F.binary_cross_entropy_with_logits(s, t.double(), reduction="none").sum(-1),
        }.items():
            value, slope = value_and_slope(loss, s)
            same(numbers(tab, f"([n, p]) => L.multilabel_softmax.{path}loss(n, p)", neg, pos), value)
            got = numbers(
                tab, f"([n, p]) => {{ const r = L.multilabel_softmax.{path}push(n, p); return [...r.pos, ...r.neg]; }}",
                neg, pos,
            )  # fmt: skip
            same(got, slope.abs())


def test_soft_labels(show):
    tab = show("soft_labels")
    axis = [-4.0, -1.3, 0.0, 0.7, 4.0]
    s = doubles(list(itertools.product(axis, axis, [0.02, 0.5, 0.9], [0.3, 0.98])))
    s, t = s[:, :2], s[:, 2:]
    rows = s.tolist(), t.tolist()
    value, slope = value_and_slope(lambda s: multilabel_softmax_loss(s, t, reduction="none"), s)
    same(numbers(tab, "([s, t]) => L.soft_labels.loss(s, t)", *rows), value)
    found = numbers(tab, "([s, t]) => L.soft_labels.slope(s, t)", *rows)
    torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-15)  # at the lowest point the two terms cancel
    value, slope = value_and_slope(lambda s: F.binary_cross_entropy_with_logits(s, t, reduction="none").sum(-1), s)
    same(numbers(tab, "([s, t]) => L.soft_labels.bce.loss(s, t)", *rows), value)
    found = numbers(tab, "([s, t]) => L.soft_labels.bce.slope(s, t)", *rows)
    torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-15)
    same(numbers(tab, "([s, t]) => L.soft_labels.lowest(t).map((v) => L.sigmoid(2 * v))", *rows), t)
    same(numbers(tab, "([s, t]) => L.soft_labels.bce.lowest(t).map(L.sigmoid)", *rows), t)


@pytest.mark.parametrize("kind", ["normalised softmax", "AM-softmax", "ArcFace", "short form"])
def test_am_softmax(show, kind):
    tab = show("am_softmax")
    margins = {"normalised softmax": [0.0], "short form": [2, 3, 4]}.get(kind, [0.0, 0.35, 1.0])
    psi = {
        "normalised softmax": additive_cosine_margin, "AM-softmax": additive_cosine_margin,
        "ArcFace": additive_angular_margin, "short form": multiplied_angle,
    }[kind]  # fmt: skip
    angles = torch.linspace(0.5, 179.5, 60, dtype=torch.float64).deg2rad()
    grid = torch.cartesian_prod(angles.cos(), angles[::10].cos())
    own, other = grid.T
    for m, scale in itertools.product(margins, [1.0, 10.0, 40.0]):

        def loss(own, other, m=m, scale=scale):
            cosine = torch.stack((own, other), -1)
            target = torch.zeros(len(own), dtype=torch.long)
            return margin_softmax_loss(cosine, target, psi=psi(m), scale=scale, reduction="none")

        value, slope, _ = value_and_slope(loss, own, other)
        given = [kind] * len(own), own.tolist(), other.tolist(), [m] * len(own), [scale] * len(own)
        same(numbers(tab, "([k, c, m]) => L.am_softmax.psi(k, c, m)", given[0], given[1], given[3]), psi(m)(own))
        same(numbers(tab, "(row) => L.am_softmax.loss(...row)", *given), value)
        found = numbers(tab, "(row) => L.am_softmax.push(...row)", *given)
        torch.testing.assert_close(found, -slope, rtol=1e-9, atol=1e-15)


def test_accuracy(show):
    tab = show("accuracy")
    x, y = doubles([-0.25, 0.0, 0.25]), torch.tensor([0, 0, 1])
    grid = [(b, sigma) for sigma in (0.1, 0.3, 1.0) for b in torch.linspace(-1.2, 1.4, 27).tolist()]

    def scores(b):
        f = x - b.unsqueeze(-1)
        return torch.stack((torch.zeros_like(f), f), -1)

    for b, sigma in grid:
        value, slope = value_and_slope(
            lambda b, sigma=sigma: exact_loss(scores(b), y.expand(len(b), 3), sigma=sigma, nodes=128), doubles([b])
        )
        same(numbers(tab, "([b, s]) => L.accuracy.loss(b, s)", [b], [sigma]), value.reshape(1))
        found = numbers(tab, "([b, s]) => L.accuracy.slope(b, s)", [b], [sigma])
        torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-12)
        right = expected_accuracy(scores(doubles([b])), y.expand(1, 3), sigma=sigma, nodes=128)[0]
        found = numbers(
            tab, "([x, y, b, s]) => L.accuracy.right(x, y, b, s)", x.tolist(), [-1, -1, 1], [b] * 3, [sigma] * 3
        )
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-15)
    z = torch.linspace(-12, 12, 481, dtype=torch.float64)
    same(numbers(tab, "([z]) => L.accuracy.normal(z)", z.tolist()), torch.special.erfc(-z / math.sqrt(2)) / 2)


def test_emo(show):
    tab = show("emo")
    generator = torch.Generator().manual_seed(2)
    for t in range(5):
        s = 3 * torch.randn(20, 5, dtype=torch.float64, generator=generator)
        angles = 180 * torch.rand(5, dtype=torch.float64, generator=generator)
        e = torch.stack((angles.deg2rad().cos(), angles.deg2rad().sin()), -1)
        target = torch.full((len(s),), t)
        rows = s.tolist(), [angles.tolist()] * len(s), [t] * len(s)
        for kind, loss in {
            "CE": lambda s, target=target: F.cross_entropy(s, target, reduction="none"),
            "EMO": lambda s, target=target, e=e: emo_loss(s, target, e, reduction="none"),
            "both": lambda s, target=target, e=e: emo_ce_loss(s, target, e, reduction="none"),
        }.items():
            value, slope = value_and_slope(loss, s)
            call = {"CE": "ce(s, t)", "EMO": "emo(s, a, t)", "both": "ce(s, t)"}[kind]
            same(numbers(tab, f"([s, a, t]) => L.emo.{call}", *rows), value)
            found = numbers(tab, f"([s, a, t]) => L.emo.slopes['{kind}'](s, a, t)", *rows)
            torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-15)


def test_spans(show):
    tab = show("spans")
    generator = torch.Generator().manual_seed(3)
    for length, words, spans in [(9, 7, [(4, 6)]), (9, 9, []), (4, 2, [(0, 1), (1, 1)]), (5, 5, [(0, 4), (2, 2)])]:
        s = 4 * torch.randn(6, 1, length, length, dtype=torch.float64, generator=generator)
        mask = span_mask(torch.tensor([words]), length=length)
        index = spans_to_index([[(0, *span) for span in spans]], length, 1, lengths=[words]).expand(6, -1, -1)
        t = torch.zeros(length, length, dtype=torch.float64)
        for span in spans:
            t[span] = 1
        rows = s.squeeze(1).tolist(), [[i * length + j for i, j in spans]] * 6, [words] * 6
        for path, loss in {
            "": lambda s, index=index, mask=mask: span_loss(s, index, mask=mask, reduction="none").squeeze(-1),
            "bce.": lambda s, t=t, mask=mask: (
                F.binary_cross_entropy_with_logits(s, t.expand_as(s), reduction="none") * mask
            ).sum((1, 2, 3)),
        }.items():
            value, slope = value_and_slope(loss, s)
            same(numbers(tab, f"([s, p, n]) => L.spans.{path}loss(s, p, n)", *rows), value)
            same(numbers(tab, f"([s, p, n]) => L.spans.{path}push(s, p, n)", *rows), slope.squeeze(1).abs())
        flat = numbers(tab, "([i, j, n]) => L.spans.place(i, j, n)", *zip(*[(*p, length) for p in spans], strict=True))
        assert flat.tolist() == rows[1][0]


# ---------------------------------------------------------------- hands and eyes


def test_losses_have_the_colours_and_lines_of_the_book(show):
    """Also the picture's colours are those of the book's pictures."""
    tab = show("focal")
    looks = tab.evaluate("lossbookTouch.looks")
    assert {name: {"color": COLORS[color], "linestyle": line} for name, (color, line) in looks.items()} == {
        name: LOSS[name] for name in looks
    }
    style = (tool.FOLDER / "touch.css").read_text(encoding="utf-8")
    picture = style[style.index('[data-scheme="picture"]') :]
    assert {name: re.search(rf"--touch-{name}: (#\w+)", picture)[1] for name in COLORS} == {
        name: color.lower() for name, color in COLORS.items()
    }


@FIGURES
@pytest.mark.parametrize("width", [1000, 390])
@pytest.mark.parametrize("ground", ["background:#ffffff", "background:#121212"], ids=["light", "dark"])
def test_a_figure_is_legible_and_whole(show, name, width, ground):
    tab = show(name, width=width, ground=ground)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), "wider than the page"
    assert tab.evaluate("document.querySelector('.touch').dataset.scheme") == (
        "dark" if "121212" in ground else "light"
    )
    assert tab.evaluate(SMALL_TEXT) == []
    assert tab.evaluate(FAINT) == []
    assert tab.evaluate(CUT_OFF) == []
    sliders = tab.locator("input[type=range]")
    for i in range(sliders.count()):  # with each slider at either end
        for key in ("End", "Home"):
            sliders.nth(i).press(key)
            assert tab.evaluate(CUT_OFF) == []
    assert not tab.locator(".touch-picture").is_visible()


SMALL_TEXT = """() => [...document.querySelectorAll('.touch-live *')]
  .filter(e => e.childNodes.length && [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()))
  .filter(e => parseFloat(getComputedStyle(e).fontSize) < 12).map(e => e.textContent)"""
CUT_OFF = """() => [...document.querySelectorAll('.touch-board')].flatMap(board => {
  const box = board.getBoundingClientRect();
  return [...board.querySelectorAll('text')].filter(e => e.textContent.trim()).filter(e => {
    const r = e.getBoundingClientRect();
    const inside = r.left > box.left - 1 && r.right < box.right + 1 && r.top > box.top - 1 && r.bottom < box.bottom + 1;
    return r.width && !inside;
  }).map(e => e.textContent);
})"""
FAINT = """() => {
  const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = light(getComputedStyle(document.body).backgroundColor);
  const found = new Set();
  for (const e of document.querySelectorAll('.touch-live text, .touch-live span, .touch-live b, .touch-live p')) {
    if (!e.textContent.trim()) continue;
    const style = getComputedStyle(e), color = light(e.tagName === 'text' ? style.fill : style.color);
    const ratio = (Math.max(color, ground) + 0.05) / (Math.min(color, ground) + 0.05);
    if (ratio < 4.5) found.add(`${ratio.toFixed(2)} ${e.textContent}`);
  }
  return [...found];
}"""


@FIGURES
def test_every_control_moves_with_the_keys(show, name):
    """Tab reaches it, an arrow moves it, the words follow, and Reset brings the first setting back."""
    tab = show(name)
    says = tab.locator(".touch-says")
    first = says.inner_text()
    controls = tab.locator(".touch-live input[type=range], .touch-live input:checked, .touch-live [role=slider]")
    assert controls.count() >= 2
    reached = set()
    for _ in range(controls.count() + 1):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate(FOCUSED))
    assert len(reached) == controls.count() + 1
    for i in range(controls.count()):
        control = controls.nth(i)
        control.focus()
        assert control.evaluate("e => e === document.activeElement")
        seen = "e => e.checked === undefined || e.type === 'range' ? e.getAttribute('aria-valuetext') : e.checked"
        before = control.evaluate(seen)
        state = tab.evaluate(STATE)
        tab.keyboard.press("ArrowRight")
        if tab.evaluate(STATE) == state:
            tab.keyboard.press("ArrowLeft")
        assert tab.evaluate(STATE) != state, f"control {i} does not move"
        assert before is not None
    tab.locator(".touch-reset").click()
    assert says.inner_text() == first


FOCUSED = "document.activeElement.touchId ??= Math.random()"
STATE = "() => { const { now, key, lines, ...s } = document.querySelector('.touch').touchStage.state; return s; }"


def test_a_notebook_puts_the_output_into_the_page_and_runs_the_scripts_then(show):
    """As JupyterLab does; a loader of modules that waits for scripts (RequireJS) does not catch them."""
    tab = show("focal")
    tab.evaluate(
        """page => {
          delete window.JXG;
          window.define = Object.assign(() => { throw new Error('taken for a module'); }, { amd: {} });
          const host = document.createElement('div');
          host.innerHTML = page;
          for (const old of host.querySelectorAll('script')) {
            const script = document.createElement('script');
            script.textContent = old.textContent;
            old.replaceWith(script);
          }
          document.body.append(host);
        }""",
        touch.page("emo"),
    )
    tab.wait_for_selector('.touch[data-figure="emo"][data-live] .touch-says:not(:empty)')


@FIGURES
@pytest.mark.parametrize("finger", [False, True], ids=["mouse", "finger"])
def test_points_follow_mouse_and_finger(show, name, finger):
    tab = show(name, width=390 if finger else 1000, has_touch=finger)
    handle = tab.locator("[role=slider]:not(input)").first
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    before, scrolled = tab.evaluate(STATE), tab.evaluate("scrollY")
    if finger:
        client = tab.context.new_cdp_session(tab)
        for kind, dx in [("touchStart", 0), ("touchMove", -10), ("touchMove", -30), ("touchMove", -40)]:
            points = [{"x": x + dx, "y": y + dx}]
            client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        client.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    else:
        tab.mouse.move(x, y)
        tab.mouse.down()
        tab.mouse.move(x - 20, y - 20)
        tab.mouse.move(x - 40, y - 40)
        tab.mouse.up()
    assert tab.evaluate(STATE) != before
    assert tab.evaluate("scrollY") == scrolled


@FIGURES
def test_without_scripts_and_in_print_the_picture_stands(show, name):
    tab = show(name, scripts=False)
    picture = tab.locator(".touch-picture")
    assert picture.is_visible()
    assert picture.get_attribute("alt") == touch.figures()[name]
    tab = show(name)
    tab.emulate_media(media="print")
    assert tab.locator(".touch-picture").is_visible()
    assert not tab.locator(".touch-live").is_visible()
    assert tab.evaluate("document.querySelector('.touch-picture').naturalWidth") == 690


# ---------------------------------------------------------------- what is kept


@FIGURES
def test_what_is_stored_is_small_and_shows_the_picture(name):
    page = touch.page(name)
    kept = touch.stored(page)
    assert "<script" not in kept
    assert "<style" not in kept
    assert kept.count("<img") == 1
    assert len(kept) < 200_000
    assert touch.stored(kept) == kept
    assert touch.stored("<p>no figure</p>") == "<p>no figure</p>"
    assert 60 < len(touch.figures()[name]) < 500


@pytest.mark.usefixtures("book_sources")
def test_stored_notebooks_show_the_figures_as_they_are():
    assert tool.renew(check=True) == [], "run: python -m tools.touch"


def test_scripts_and_pictures_are_small():
    size = sum(len(gzip.compress(file.read_bytes())) for file in tool.FOLDER.iterdir())
    assert size < 700_000
    assert json.loads((tool.FOLDER / "figures.json").read_text(encoding="utf-8")).keys() == set(NAMES)
    assert {file.stem for file in tool.FOLDER.glob("*.png")} == set(NAMES)


def test_no_such_figure():
    with pytest.raises(ValueError, match="name must be one of accuracy"):
        touch.page("nothing")
