"""The pictures' style: contrast, colour blindness, labels."""

import itertools
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("agg")
import matplotlib.pyplot as plt
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from lossbook import plotting
from lossbook.plotting import COLORS, INK, LOSS

PAGES = ("#ffffff", "#121212")

# How two-primary readers see linear RGB at full severity (Machado, Oliveira and Fernandes, 2009).
SEEN_BY = {
    "anyone": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


def linear(color):
    """sRGB as linear light."""
    c = np.array(to_rgb(color))
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    """The contrast ratio of WCAG 2."""
    dark, bright = sorted(linear(color) @ [0.2126, 0.7152, 0.0722] for color in (a, b))
    return (bright + 0.05) / (dark + 0.05)


def lab(rgb):
    """Linear RGB in CIELAB, where distance is about what an eye sees."""
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    x, y, z = np.cbrt(np.maximum(to_xyz @ np.clip(rgb, 0, 1) / [0.95047, 1, 1.08883], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_contrast_of_black_and_white_is_21():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


@pytest.mark.parametrize("page", PAGES)
def test_contrast(page):
    assert contrast(INK, page) >= 4.2
    for color in COLORS.values():
        assert contrast(color, page) >= 3.7, color


@pytest.mark.usefixtures("book_sources")
def test_ink_on_dark_pages():
    """They show pictures lighter than they are drawn."""
    css = (Path(__file__).parents[1] / "_static/book.css").read_text(encoding="utf-8")
    (factor,) = set(re.findall(r'html\[data-theme="dark"\].*? img \{ filter: brightness\((.*?)\)', css))
    ink, *colors = (np.minimum(1, float(factor) * np.array(to_rgb(color))) for color in (INK, *COLORS.values()))
    assert contrast(ink, PAGES[1]) >= 4.5
    assert all(contrast(color, PAGES[1]) >= 4.5 for color in colors)


@pytest.mark.parametrize("eye", SEEN_BY)
def test_colours_differ_for_every_eye(eye):
    for a, b in itertools.combinations(COLORS.values(), 2):
        distance = np.linalg.norm(lab(np.array(SEEN_BY[eye]) @ linear(a)) - lab(np.array(SEEN_BY[eye]) @ linear(b)))
        assert distance >= 20, (a, b)


@pytest.fixture
def axes():
    with matplotlib.rc_context():
        plotting.use_style()
        figure, ax = plt.subplots()
        yield ax
        plt.close(figure)


def test_style_is_transparent_and_uses_the_colours(axes):
    for label in "abcde":
        axes.plot([0, 1], [0, 1], label=label)
    assert [line.get_color() for line in axes.get_lines()] == list(COLORS.values())
    axes.figure.canvas.draw()
    pixels = np.asarray(axes.figure.canvas.buffer_rgba())
    assert pixels[..., 3].min() == 0
    assert (pixels[..., 3] == 0).mean() > 0.8
    parts = [axes.xaxis.label, axes.title, *axes.get_xticklabels(), *axes.get_yticklabels()]
    assert {part.get_color() for part in parts} == {INK}


def test_labels_stand_at_the_ends_in_the_lines_colours(axes):
    axes.plot([0, 1, 2], [0, 1, 5], label="up")
    axes.plot([0, 1, 2], [5, 1, np.nan], label="stops early", color="magenta")
    axes.plot([0, 1], [3, 3])
    up, early = plotting.label_lines(axes)
    assert (up.get_text(), up.get_color(), tuple(up.xy)) == ("up", COLORS["blue"], (2, 5))
    assert (early.get_text(), early.get_color(), tuple(early.xy)) == ("stops early", "magenta", (1, 1))


def test_labels_do_not_overlap_and_stay_in_the_picture(axes):
    for i, name in enumerate(["multi-label softmax", "focal", "BCE, tuned weight", "BCE"]):
        axes.plot([0, 1], [0, 0.001 * i + (i == 3)], label=name)
    texts = plotting.label_lines(axes)
    axes.figure.canvas.draw()
    boxes = [text.get_window_extent() for text in texts]
    for a, b in itertools.combinations(boxes, 2):
        assert not a.overlaps(b)
    assert [box.y0 for box in boxes] == sorted(box.y0 for box in boxes)
    for box in boxes:
        assert box.x1 <= axes.figure.bbox.x1


@given(st.lists(st.floats(-100, 100), max_size=8), st.floats(0, 10))
def test_spread_keeps_gap_order_and_mean(values, gap):
    moved = plotting.spread(values, gap)
    order = sorted(range(len(values)), key=values.__getitem__)
    placed = [moved[i] for i in order]
    assert all(b - a >= gap - 1e-9 for a, b in itertools.pairwise(placed))
    assert sum(moved) == pytest.approx(sum(values), abs=1e-9)
    if all(b - a >= gap for a, b in itertools.pairwise(sorted(values))):
        assert moved == pytest.approx(values, abs=1e-9)


def test_spread_moves_as_little_as_possible():
    """Against a fine search over all pairs of positions."""
    grid = np.arange(-3, 6, 0.05)
    a, b = np.meshgrid(grid, grid)
    cost = np.where(b - a >= 2 - 1e-9, (a - 0.3) ** 2 + (b - 0.9) ** 2, np.inf)
    best = np.unravel_index(cost.argmin(), cost.shape)
    assert plotting.spread([0.3, 0.9], 2) == pytest.approx([a[best], b[best]], abs=0.05)


def test_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'package matplotlib; install it with: pip install "lossbook\[plots\]"'
    ):
        plotting.use_style()


TOGETHER = (
    ("cross-entropy", "BCE", "softmax"),  # one loss under three names
    ("AM-softmax", "CosFace"),
    ("short form", "min-cos"),
)
PICTURES = (  # what stands in one picture
    ("BCE", "weighted BCE", "BCE, base rate", "multi-label softmax", "pairwise loss", "focal loss"),
    ("BCE", "multi-label softmax", "symmetric KL"),
    ("BCE", "multi-label softmax", "mixed losses", "rounded targets"),
    ("BCE", "weighted BCE", "focal loss", "hard truncation", "soft truncation", "asymmetric loss"),
    (
        *("BCE", "BCE, smoothing", "BCE, mixup"),
        *("multi-label softmax", "multi-label softmax, smoothing", "multi-label softmax, mixup"),
    ),
    ("softmax", "normalised softmax", "AM-softmax", "ArcFace", "SphereFace", "short form", "triplet"),
    ("cross-entropy", "EXACT", "EXACT, annealed", "EXACT, no warm-up", "−log P", "soft accuracy", "hinge"),
    ("cross-entropy", "EMO", "EMO + CE"),
)


def test_every_loss_has_one_look_and_none_looks_like_another_beside_it():
    assert set(itertools.chain(*TOGETHER, *PICTURES)) == set(LOSS)
    for look in LOSS.values():
        assert set(look) == {"color", "linestyle"}
        assert look["color"] in COLORS.values()
    for same in TOGETHER:
        assert len({tuple(LOSS[name].values()) for name in same}) == 1
    for beside in PICTURES:
        assert len({tuple(LOSS[name].values()) for name in beside}) == len(beside)
    _, ax = plt.subplots()
    (line,) = ax.plot([0, 1], label="focal loss", **LOSS["focal loss"])
    assert line.get_color() == LOSS["focal loss"]["color"]
    plt.close()
