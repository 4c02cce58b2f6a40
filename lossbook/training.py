"""Training, as short as it can be read: one loop, reproducible seeds, and a summary over several seeds."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn

from lossbook._extras import require
from lossbook.devices import best_device


@dataclass
class History:
    """What a training run leaves behind, one entry per epoch."""

    loss: list[float] = field(default_factory=list)
    """The mean loss over the epoch's examples, as they were met."""
    metric: list[float] = field(default_factory=list)
    """The metric after the epoch. Empty where none was asked for."""


def train(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    data: tuple[Tensor, Tensor],
    *,
    epochs: int,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    device: torch.device | str | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    desc: str = "",
) -> History:
    """Train ``model`` in place with Adam. A progress bar shows the loss and the metric.

    Args:
        model: Maps a batch of inputs to the scores that ``loss_fn`` takes. It is moved to ``device``.
        loss_fn: ``loss_fn(scores, targets)``, one number.
        data: Inputs and targets, one row per example.
        epochs: Passes over the data.
        batch_size: Rows per step. The last step of an epoch may have fewer.
        lr: Adam's learning rate.
        seed: Decides the order of the examples and what dropout drops (see :func:`seeded`).
        device: Where to train, :func:`lossbook.devices.best_device` if None.
        metric: Called with the model, in evaluation mode, after every epoch.
        desc: What the bar is called.

    Returns:
        Losses and metrics per epoch.
    """
    device = best_device() if device is None else torch.device(device)
    model.to(device)
    inputs, targets = (tensor.to(device) for tensor in data)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    history = History()
    with seeded(seed), _progress_bar(epochs, desc) as bar:
        for _ in range(epochs):
            model.train()
            total = torch.zeros((), device=device)  # kept on the device: to read it every step would wait for it
            for rows in torch.randperm(len(inputs)).to(device).split(batch_size):  # type: ignore[no-untyped-call]
                loss = loss_fn(model(inputs[rows]), targets[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach() * len(rows)
            history.loss.append(total.item() / len(inputs))
            shown = {"loss": f"{history.loss[-1]:.3g}"}
            model.eval()
            if metric is not None:
                history.metric.append(metric(model))
                shown["metric"] = f"{history.metric[-1]:.3f}"
            bar.set_postfix(shown, refresh=False)
            bar.update()
    return history


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor, *, batch_size: int = 1024) -> Tensor:
    """The scores of ``model`` for all ``inputs``, in evaluation mode, on the CPU.

    Args:
        model: It is left in the mode it was in.
        inputs: One row per example, on any device.
        batch_size: Rows at a time.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    batches = inputs.split(batch_size)  # type: ignore[no-untyped-call]
    scores = torch.cat([model(rows.to(device)).cpu() for rows in batches])
    model.train(was_training)
    return scores


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw torch's random numbers from ``seed`` inside the block, and leave those after it as if there were no block.

    On a CPU the same seed gives the same numbers whatever was drawn before. On a GPU the numbers are the same too, but
    sums may be taken in another order, so results repeat only to rounding.

    Example:
        >>> with seeded(1):
        ...     first = torch.rand(3)
        >>> with seeded(1):
        ...     second = torch.rand(3)
        >>> bool((first == second).all())
        True
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Runs:
    """One number measured once per seed.

    Example:
        >>> print(Runs((0.50, 0.52, 0.57)))
        0.53 ± 0.04 (3 seeds)
        >>> f"{Runs((0.50, 0.52, 0.57)):.3f}"
        '0.530 ± 0.036 (3 seeds)'
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.values)

    @property
    def std(self) -> float:
        """The sample standard deviation over seeds (n - 1), 0 for a single seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        spec = spec or ".2f"
        seeds = len(self.values)
        return f"{self.mean:{spec}} ± {self.std:{spec}} ({seeds} seed{'s' if seeds > 1 else ''})"


@overload
def run_seeds(fn: Callable[[int], float], seeds: Iterable[int]) -> Runs: ...
@overload
def run_seeds(fn: Callable[[int], Mapping[str, float]], seeds: Iterable[int]) -> dict[str, Runs]: ...
def run_seeds(
    fn: Callable[[int], float] | Callable[[int], Mapping[str, float]], seeds: Iterable[int]
) -> Runs | dict[str, Runs]:
    """Measure the same thing once per seed.

    Args:
        fn: Takes a seed and returns a number, or several numbers by name.
        seeds: The seeds, at least one.

    Returns:
        The :class:`Runs` of the number, or of each number by its name.

    Example:
        >>> print(run_seeds(lambda seed: seed / 10, seeds=(1, 2, 3)))
        0.20 ± 0.10 (3 seeds)
    """
    results: list[Any] = [fn(seed) for seed in seeds]
    if not results:
        raise ValueError("seeds must hold at least one seed, got none")
    if isinstance(results[0], Mapping):
        return {name: Runs(tuple(float(result[name]) for result in results)) for name in results[0]}
    return Runs(tuple(map(float, results)))


def _progress_bar(total: int, desc: str) -> Any:
    """A plain-text bar on stderr, shown in terminals and notebooks, silent where the output goes to a file."""
    tqdm = require("tqdm", "notebook").tqdm
    watched = sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")
    # mininterval=0 draws every epoch, also the last one of a fast run
    return tqdm(total=total, desc=desc, disable=not watched, leave=False, mininterval=0, unit="epoch")
