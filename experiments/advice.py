"""Checks the page "Which loss should I use?" against every record: ``python -m experiments.advice``.

Each statement of ``data/advice.toml`` is a prediction. It is printed with the tasks on which it holds, fails or stays
open, and with what each task says. The command ends with 1 if a statement does not hold more often than it fails in its
own records.
"""

from __future__ import annotations

from lossbook.advice import leave_one_out, predictions

MARKS = {"holds": "+", "fails": "-", "open": " "}


def main() -> int:
    """Print all verdicts; 1 if a statement does not stand."""
    fallen = 0
    for prediction in predictions():
        fallen += not prediction.stands
        stands = "stands" if prediction.stands else "DOES NOT STAND"
        print(f"{prediction.name} {stands}: {prediction.text} [{prediction.brief()}]")
        for verdict in prediction.verdicts():
            print(f"  {MARKS[verdict.says]} {verdict.task}: {verdict.difference * 100:+.1f}")
    found = leave_one_out()
    print(f"advice formed on all data sets but one, tried on that one: {found}")
    return int(fallen > 0)


if __name__ == "__main__":
    raise SystemExit(main())
