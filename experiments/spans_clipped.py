"""Three losses of :mod:`experiments.spans` with clipped gradients: does a bounded step make BCE steady?

Two tasks: data, networks, rates and measures are those of ``Résumé NER`` and ``CoNLL04`` there. Before each step the
gradient of all parameters is scaled down to the norm 1 where it is longer.

    python -m experiments.spans_clipped --scale smoke
    torchrun --standalone --nproc-per-node 2 -m experiments.spans_clipped
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim.optimizer import register_optimizer_step_pre_hook

from experiments import spans
from experiments.harness import Experiment, Job, Task, main
from experiments.spans import BASE, METRICS, MULTI, NEWS, RESUME, SUM

NORM = 1.0


def clip(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Scale the gradient of all parameters down to :data:`NORM`."""
    clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], NORM)


def tasks(scale: str) -> list[Task]:
    """The two tasks."""
    return [
        replace(
            task,
            methods={method: task.methods[method] for method in (MULTI, SUM, BASE)},
            facts={**task.facts, "norm": NORM},
        )
        for task in spans.tasks(scale)
        if task.name in (RESUME, NEWS)
    ]


def run(job: Job) -> dict[str, float]:
    """One run."""
    hook = register_optimizer_step_pre_hook(clip)
    try:
        return spans.run(job)
    finally:
        hook.remove()


EXPERIMENT = Experiment(
    "spans_clipped",
    "the multi-label softmax and BCE from two starts on résumés and news, with clipped gradients",
    tasks,
    run,
    metrics=METRICS,
    baseline=BASE,
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
