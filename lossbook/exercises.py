"""Exercises that check themselves: a reader's attempt, and the checks it has to pass."""

from __future__ import annotations

from types import TracebackType


class exercise:  # noqa: N801 - read as a statement: with exercise("1.1"):
    """A block of checks that says whether an exercise is solved.

    ``NotImplementedError`` (nothing written yet) and ``AssertionError`` (a failed check or claim) leave the exercise
    open, and the notebook runs on. Every other error is the reader's own and comes through with its traceback.

    Args:
        number: The exercise's number, for example ``"1.1"``.
        title: What it is about.

    Example:
        >>> with exercise("0.1", "addition") as addition:
        ...     assert 1 + 1 == 3, "1 + 1 is not 3"
        Exercise 0.1 (addition): still open. 1 + 1 is not 3
        >>> addition.solved
        False
    """

    def __init__(self, number: str, title: str = "") -> None:
        self.number = number
        self.title = title
        self.solved: bool | None = None
        """True or False after the block, None before."""

    def __enter__(self) -> exercise:
        self.solved = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        name = f"Exercise {self.number}" + (f" ({self.title})" if self.title else "")
        self.solved = error is None
        if error is None:
            print(f"{name}: solved.")
            return False
        if not isinstance(error, (NotImplementedError, AssertionError)):
            return False
        print(f"{name}: still open. {error}".rstrip())
        return True
