"""The losses on entities with three times the steps of :mod:`experiments.spans`: does what was behind catch up?

One task: data, networks and measures are those of ``Résumé NER`` there, with three times the epochs, for the
multi-label softmax, its nearest rivals and the CRF tagger. The learning rates begin lower, since with more steps
smaller ones suffice.

    python -m experiments.spans_longer --scale smoke
    torchrun --standalone --nproc-per-node 2 -m experiments.spans_longer
"""

from __future__ import annotations

from dataclasses import replace

from experiments import spans
from experiments.harness import SCALES, Experiment, Job, Task, main
from experiments.spans import BASE, CRF, KNOBS, METRICS, MULTI, POWER, RATES, RESUME, SIZES, SUM, facts

TIMES = 3
METHODS = (MULTI, SUM, BASE, POWER, CRF)

for scale in SCALES:
    short = SIZES[scale][RESUME]
    SIZES[f"{scale}, longer"] = {RESUME: replace(short, epochs=TIMES * short.epochs)}


def tasks(scale: str) -> list[Task]:
    """The one task."""
    usual = next(task for task in spans.tasks(scale) if task.name == RESUME)
    rates = [float(f"{rate / TIMES:.1g}") for rate in RATES[scale]]
    methods = {method: [{"lr": lr, **KNOBS[method]} for lr in rates] for method in METHODS}
    return [replace(usual, methods=methods, facts=facts(RESUME, SIZES[f"{scale}, longer"][RESUME]))]


def run(job: Job) -> dict[str, float]:
    """One run."""
    return spans.run(replace(job, scale=f"{job.scale}, longer"))


EXPERIMENT = Experiment(
    "spans_longer",
    "the multi-label softmax, BCE, power BCE and a CRF tagger on résumés, with three times the steps",
    tasks,
    run,
    metrics=METRICS,
    baseline=BASE,
)

if __name__ == "__main__":
    raise SystemExit(main(EXPERIMENT))
