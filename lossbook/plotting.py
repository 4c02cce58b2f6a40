"""One style for every picture: legible on light and dark pages, for colour-blind readers, with labels at the lines."""

from __future__ import annotations

from typing import Any

from lossbook._extras import require

INK = "#787878"
"""Axes and text: 4.4 : 1 on white, 4.2 : 1 on #121212."""

COLORS = {"blue": "#2763F9", "orange": "#CC4303", "green": "#13955B", "magenta": "#BB428E", "violet": "#9870D4"}
"""Five colours of at least 3.7 : 1 on both pages, far apart also for readers who see two primaries only."""

_FAMILIES = {
    "orange": {
        **{"cross-entropy": "-", "BCE": "-", "softmax": "-", "weighted BCE": "--", "BCE, base rate": ":"},
        **{"normalised softmax": "-.", "BCE, smoothing": "--", "BCE, mixup": "-."},
    },
    "blue": {
        **{"multi-label softmax": "-", "pairwise loss": "--", "symmetric KL": ":", "EMO + CE": "--"},
        **{"mixed losses": "--", "rounded targets": ":"},
        **{"multi-label softmax, smoothing": "--", "multi-label softmax, mixup": "-."},
    },
    "green": {"focal loss": "-", "asymmetric loss": "--", "EMO": "-", "hinge": ":", "triplet": "-"},
    "magenta": {
        **{"soft truncation": "-", "hard truncation": "--"},
        **{"EXACT": "-", "−log P": "--", "EXACT, annealed": "-.", "EXACT, no warm-up": ":"},
        **{"short form": "-", "min-cos": "-"},
    },
    "violet": {"AM-softmax": "-", "CosFace": "-", "ArcFace": "--", "SphereFace": ":", "soft accuracy": "-"},
}
LOSS: dict[str, dict[str, str]] = {
    name: {"color": COLORS[color], "linestyle": line} for color, own in _FAMILIES.items() for name, line in own.items()
}
"""Colour and line of each loss, the same in every picture: ``ax.plot(x, y, **LOSS["focal loss"])``.

The plain losses share a colour, and so do a loss and its relatives; what stands in one picture differs at least in the
line. A name that is missing here gets a line in ``_FAMILIES``.
"""


def use_style() -> None:
    """Draw every later picture in the book's style: transparent, grey ink, the book's colours in turn, no legends."""
    matplotlib = require("matplotlib", "plots")
    clear = (0.0, 0.0, 0.0, 0.0)
    matplotlib.rcParams.update(
        {
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), clear),
            **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
            "axes.titlecolor": INK,
            "axes.prop_cycle": matplotlib.cycler(color=list(COLORS.values())),
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "axes.titlesize": "medium",
            "figure.constrained_layout.use": True,
            "figure.figsize": (6.0, 3.4),  # at most as wide as this: text of 11 points has 9 pixels on a phone
            "figure.dpi": 144,  # sharp on screens with two pixels per point
            "savefig.dpi": 144,
            "font.size": 11,
            "grid.color": INK,
            "grid.alpha": 0.3,
            "image.cmap": "gray",
            "lines.linewidth": 2,
            "legend.frameon": False,
        }
    )


def label_lines(ax: Any, *, gap: float = 1.2) -> list[Any]:
    """Write the label of each line of ``ax`` at its right end, in its colour, and move labels apart where they meet.

    Call it last: it measures the axes as they are. Lines without a label stay without one.

    Args:
        ax: The axes.
        gap: The least distance between two labels, in heights of the letters.

    Returns:
        The texts, in the order of the lines.
    """
    lines = [line for line in ax.get_lines() if not line.get_label().startswith("_")]
    ends = [line.get_xydata()[~_missing(line)][-1] for line in lines]
    ax.get_ylim()  # settles limits that are still open
    to_points = 72 / ax.figure.dpi
    heights = [float(ax.transData.transform(end)[1]) * to_points for end in ends]
    size = require("matplotlib", "plots").rcParams["font.size"]
    moved = spread(heights, gap * size)
    return [
        ax.annotate(
            line.get_label(),
            end,
            xytext=(6, new - old),
            textcoords="offset points",
            color=line.get_color(),
            va="center",
            annotation_clip=False,
        )
        for line, end, old, new in zip(lines, ends, heights, moved, strict=True)
    ]


def _missing(line: Any) -> Any:
    """Which points of a line have no value."""
    points = line.get_xydata()
    return (points != points).any(axis=1)


def spread(values: list[float], gap: float) -> list[float]:
    """Positions at least ``gap`` apart, in the order of ``values`` and as near to them as can be (least squares).

    Example:
        >>> spread([0.0, 0.2, 5.0], 1.0)
        [-0.4, 0.6, 5.0]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    # With the gaps taken out the positions must only not decrease: pool neighbours that do into their mean.
    pools: list[list[float]] = []
    for rank, index in enumerate(order):
        pools.append([values[index] - rank * gap])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    placed = [_mean(pool) for pool in pools for _ in pool]
    result = [0.0] * len(values)
    for rank, index in enumerate(order):
        result[index] = placed[rank] + rank * gap
    return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
