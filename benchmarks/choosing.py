"""What each loss of the page "Which loss should I use?" costs in time beside the plain loss on the same scores.

Cross-entropy, BCE and cross-entropy on a linear layer take turns with the losses that the page names beside them, each
called as in the page's tables, at one shape of a middle size. A time is that of a forward and a backward pass on one
thread, by its CPU time; ``benchmarks/harness.py`` says how runs alternate and what a ratio is.

``python -m benchmarks.choosing`` takes about a minute and writes ``data/results/bench_choosing.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.am_softmax import cosine
from benchmarks.emo import layer, words
from benchmarks.harness import ROOT, Contender, Loss, compared, rounds, threads
from benchmarks.multilabel_softmax import POSITIVES, chosen
from lossbook.accuracy import exact_loss, expected_accuracy, soft_accuracy_loss
from lossbook.am_softmax import am_softmax_loss, linear_am_softmax_loss
from lossbook.emo import emo_ce_loss, linear_emo_ce_loss
from lossbook.focal import asymmetric_loss, sigmoid_focal_loss, soft_truncated_bce
from lossbook.multilabel_softmax import (
    multilabel_pairwise_loss,
    multilabel_softmax_loss,
    sparse_multilabel_softmax_loss,
    subset_softmax_loss,
)
from lossbook.soft_labels import mixup, multilabel_symmetric_kl, smooth_labels
from tools.provenance import commit, machine, versions

METHOD = (
    "forward plus backward on one thread, by its CPU time; medians of alternating runs in one process after warm-up; "
    "ratio = quotient of the median and that of the plain loss, with the quartiles of the ratios within a round"
)


@dataclass(frozen=True)
class Group:
    """Losses on the same arguments. The first is the plain one that the others are compared with."""

    make: Callable[..., tuple[Tensor, ...]]
    shape: tuple[int, ...]
    tiny: tuple[int, ...]
    losses: Mapping[str, Loss]

    @property
    def plain(self) -> str:
        return next(iter(self.losses))


def several(rows: int, labels: int) -> tuple[Tensor, ...]:
    """Scores, labels, the indices of the positives, a second pass, and samples of as many numbers as labels."""
    s, t = chosen(rows, labels, min(POSITIVES, labels // 2))
    index = t.nonzero()[:, 1].reshape(rows, -1)
    return s, t, index, torch.randn(rows, labels), torch.randn(rows, labels)


def bce(s: Tensor, t: Tensor, weight: float | None = None) -> Tensor:
    pos_weight = None if weight is None else torch.tensor(weight)
    return F.binary_cross_entropy_with_logits(s, t.float(), pos_weight=pos_weight)


GROUPS = (
    Group(
        words,
        (2048, 128),
        (6, 5),
        {
            "cross-entropy": lambda s, y, _: F.cross_entropy(s, y),
            "exact_loss": lambda s, y, _: exact_loss(s, y),
            "soft_accuracy_loss": lambda s, y, _: soft_accuracy_loss(s, y),
            "expected_accuracy": lambda s, y, _: expected_accuracy(s, y, sigma=1.0),
            "emo_ce_loss": emo_ce_loss,
        },
    ),
    Group(
        several,
        (4096, 80),
        (6, 5),
        {
            "BCE": lambda s, t, *_: bce(s, t),
            "pos_weight": lambda s, t, *_: bce(s, t, 3.0),
            "asymmetric_loss": lambda s, t, *_: asymmetric_loss(s, t),
            "multilabel_softmax_loss": lambda s, t, *_: multilabel_softmax_loss(s, t),
            "sigmoid_focal_loss": lambda s, t, *_: sigmoid_focal_loss(s, t, alpha=0.75),
            "soft_truncated_bce": lambda s, t, *_: soft_truncated_bce(s, t),
            "sparse_multilabel_softmax_loss": lambda s, t, index, *_: sparse_multilabel_softmax_loss(s, index),
            "subset_softmax_loss": lambda s, t, *_: subset_softmax_loss(s, t),
            "multilabel_pairwise_loss": lambda s, t, *_: multilabel_pairwise_loss(s, t),
            "multilabel_symmetric_kl": lambda s, t, _, r, x: multilabel_symmetric_kl(s, r),
            "smooth_labels": lambda s, t, *_: multilabel_softmax_loss(s, smooth_labels(t.float(), 0.03)),
            "mixup": lambda s, t, _, r, x: bce(s, mixup(x, t)[1]),
        },
    ),
    Group(
        layer,
        (256, 4000, 128),
        (6, 5, 4),
        {
            "cross-entropy on a linear layer": lambda e, weight, y, _: F.cross_entropy(F.linear(e, weight), y),
            "am_softmax_loss": lambda e, weight, y, _: am_softmax_loss(cosine(e, weight), y, margin=0.0),
            "linear_am_softmax_loss": lambda e, weight, y, _: linear_am_softmax_loss(e, weight, y),
            "linear_emo_ce_loss": linear_emo_ce_loss,
        },
    ),
)


def measure(group: Group, *, tiny: bool, seconds: float) -> list[dict[str, Any]]:
    """A row for each loss of a group."""
    shape = group.tiny if tiny else group.shape
    torch.manual_seed(0)
    args = group.make(*shape)
    contenders = {name: Contender(name, loss, args) for name, loss in group.losses.items()}
    with threads(1):
        times = rounds(contenders, torch.device("cpu"), time.thread_time, seconds, 3 if tiny else 15)
    return [
        {
            "loss": name,
            "beside": group.plain,
            "shape": list(shape),
            "rounds": len(own),
            "seconds": float(f"{statistics.median(own):.4g}"),
            **compared(own, times[group.plain]),
        }
        for name, own in times.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure all groups, print and write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choosing", description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="at tiny size: a check, not a measurement")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "results", help="folder of the record")
    parser.add_argument("--seconds", type=float, default=15.0, help="time for the rounds of a group (15)")
    options = parser.parse_args(argv)
    seconds = 0.0 if options.tiny else options.seconds
    rows = [row for group in tqdm(GROUPS, disable=None) for row in measure(group, tiny=options.tiny, seconds=seconds)]
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"{row['loss']}: {row['ratio']:.3g} [{low:.3g}, {high:.3g}] times {row['beside']}, {row['rounds']} rounds"
        )
    where = machine(torch.device("cpu"))
    where.pop("threads")  # one
    record = {
        "slug": "choosing",
        "tiny": options.tiny,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **commit("lossbook", "benchmarks"),
        "machine": where,
        "versions": versions(),
        "method": METHOD,
        "cases": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "bench_choosing.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
