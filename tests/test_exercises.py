"""Exercises: open, solved, and a reader's own error."""

import pytest

from lossbook.claims import claim
from lossbook.exercises import exercise


def test_solved(capsys):
    with exercise("1.1", "sums") as checks:
        assert checks.solved is None
    assert checks.solved is True
    assert capsys.readouterr().out == "Exercise 1.1 (sums): solved.\n"


def fail_assert():
    assert 1 == 2, "one is not two"


def not_written():
    raise NotImplementedError("write the body of f")


def fail_claim():
    claim("it is so", False, a=0.5)


def say_nothing():
    raise NotImplementedError


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (fail_assert, ": still open. one is not two"),
        (not_written, ": still open. write the body of f"),
        (fail_claim, ": still open. does not hold: it is so (a = 0.5)"),
        (say_nothing, ": still open."),
    ],
)
def test_open(capsys, body, said):
    with exercise("2.3") as checks:
        body()
    assert checks.solved is False
    assert capsys.readouterr().out.startswith(f"Exercise 2.3{said}")


def test_other_errors_come_through(capsys):
    checks = exercise("1.2")
    with pytest.raises(NameError), checks:
        undefined_name  # noqa: B018, F821
    assert checks.solved is False
    assert capsys.readouterr().out == ""


def test_running_it_again_forgets_the_last_result():
    checks = exercise("1.3")
    with checks:
        raise NotImplementedError
    assert checks.solved is False
    with checks:
        assert checks.solved is None
    assert checks.solved is True
