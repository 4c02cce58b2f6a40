"""Training, as short as it can be read: one loop, reproducible seeds, and a summary over several seeds."""

from __future__ import annotations

import copy
import importlib
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn

from lossbook._checks import check_index, check_integer, check_labels, check_number, describe
from lossbook.devices import best_device

__all__ = ["History", "Runs", "base_rate_bias", "predict", "run_seeds", "seeded", "train"]

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class History:
    """What a training run leaves behind, one entry per epoch."""

    loss: list[float] = field(default_factory=list)
    """The mean loss over the epoch's examples, as they were met."""
    metric: list[float] = field(default_factory=list)
    """The metric after the epoch. Empty where none was asked for."""
    validation: list[float] = field(default_factory=list)
    """The validation value after the epoch. Empty where none was asked for."""
    best_epoch: int | None = None
    """The first epoch with the highest validation value, counted from 0. None where there is none."""


def train(
    model: nn.Module,
    loss_fn: Loss | Sequence[tuple[int, Loss]],
    data: tuple[Tensor, Tensor],
    *,
    epochs: int | None = None,
    batch_size: int = 64,
    lr: float = 1e-3,
    seed: int = 0,
    device: torch.device | str | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    validation: Callable[[nn.Module], float] | None = None,
    desc: str = "",
) -> History:
    """Train ``model`` in place with Adam. Where tqdm is installed, a progress bar shows the loss and the metric.

    Training stops with a warning after an epoch whose loss is not finite. That loss is the last in the history.

    Args:
        model: Maps a batch of inputs to the scores that ``loss_fn`` takes. It is moved to ``device``.
        loss_fn: ``loss_fn(scores, targets)``, one number. Or several losses, one after another, as pairs of epochs and
            loss, such as ``[(2, warm_up), (8, loss)]``. The optimizer goes on from one to the next.
        data: Inputs and targets, one row per example. A sparse matrix stays sparse; its batches are dense.
        epochs: Passes over the data. It may be left out where ``loss_fn`` says how many.
        batch_size: Rows per step. The last step of an epoch may have fewer.
        lr: Adam's learning rate.
        seed: Decides the order of the examples and what dropout drops (see :func:`seeded`).
        device: Where to train, ``lossbook.devices.best_device()`` if None.
        metric: Called with the model, in evaluation mode, after every epoch.
        validation: Called like ``metric``. Higher is better, and the model ends with the weights and buffers of the
            best epoch.
        desc: What the bar is called.

    Returns:
        Losses, metrics and validation values per epoch.

    Raises:
        ValueError: There is no row, there are not as many targets as inputs, a sparse tensor is no matrix in COO or CSR
            layout, or the epochs of ``loss_fn`` do not add up to ``epochs``. The model is as it was.
        TypeError: Inputs or targets are no tensor, ``loss_fn`` is neither a loss nor such pairs, or nothing says how
            many epochs.

    Example:
        >>> with seeded(0):
        ...     model, x = nn.Linear(3, 1), torch.randn(20, 3)
        >>> y = x.sum(1, keepdim=True)
        >>> losses = [(2, nn.functional.l1_loss), (3, nn.functional.mse_loss)]
        >>> history = train(model, losses, (x, y), lr=0.1, validation=lambda m: -(predict(m, x) - y).abs().max().item())
        >>> len(history.loss), history.best_epoch
        (5, 4)
    """
    losses = _loss_per_epoch(loss_fn, epochs)
    inputs, targets = map(_rows_of, data)
    if len(inputs) != len(targets) or not len(inputs):
        raise ValueError(f"data must be rows and as many targets, got {describe(data[0])} and {describe(data[1])}")
    device = best_device() if device is None else torch.device(device)
    model.to(device)
    inputs, targets = inputs.to(device), targets.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    history, highest, best = History(), -math.inf, None
    with seeded(seed), _progress_bar(len(losses), desc) as bar:
        for epoch, loss_of in enumerate(losses):
            model.train()
            total = torch.zeros((), device=device)  # kept on the device: to read it every step would wait for it
            for rows in torch.randperm(len(inputs)).to(device).split(batch_size):  # type: ignore[no-untyped-call]
                loss = loss_of(model(inputs[rows]), targets[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach() * len(rows)
            history.loss.append(total.item() / len(inputs))
            model.eval()
            if not math.isfinite(history.loss[-1]):
                break
            if metric is not None:
                history.metric.append(metric(model))
            if validation is not None:
                history.validation.append(float(validation(model)))
                if history.validation[-1] > highest:
                    highest, best, history.best_epoch = history.validation[-1], copy.deepcopy(model.state_dict()), epoch
            _show(bar, history)
    if best is not None:
        model.load_state_dict(best)
    if history.loss and not math.isfinite(history.loss[-1]):
        what = f"the loss of epoch {len(history.loss) - 1}, counted from 0, is {history.loss[-1]}"
        warnings.warn(f"training stopped early: {what}; a smaller lr may help", RuntimeWarning, stacklevel=2)
    return history


def _loss_per_epoch(loss_fn: Loss | Sequence[tuple[int, Loss]], epochs: int | None) -> list[Loss]:
    """The loss of each epoch."""
    if callable(loss_fn):
        if epochs is None:
            raise TypeError("epochs must say how many passes over the data, got None")
        return [loss_fn] * check_integer("epochs", epochs, low=0)
    pairs = list(loss_fn) if isinstance(loss_fn, Sequence) else []
    if not pairs or not all(isinstance(p, Sequence) and len(p) == 2 and callable(p[1]) for p in pairs):
        raise TypeError(f"loss_fn must be a function or a list of pairs (epochs, function), got {describe(loss_fn)}")
    losses = [loss for count, loss in pairs for _ in range(check_integer("epochs", count, low=0))]
    if epochs is not None and epochs != len(losses):
        raise ValueError(f"the epochs of loss_fn must add up to epochs={epochs}, got {len(losses)}")
    return losses


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor, *, batch_size: int = 1024) -> Tensor:
    """The scores of ``model`` for all ``inputs``, in evaluation mode, on the CPU.

    Args:
        model: It is left in the mode it was in.
        inputs: One row per example, on any device. A sparse matrix stays sparse; its batches are dense.
        batch_size: Rows at a time.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    batches = _rows_of(inputs).split(batch_size)
    scores = torch.cat([model(rows.to(device)).cpu() for rows in batches])
    model.train(was_training)
    return scores


@dataclass(frozen=True)
class _SparseRows:
    """A sparse matrix of ``width`` columns that gives dense batches of its rows, as a dense one would.

    Row ``i`` holds the ``columns`` and ``values`` from ``starts[i]`` to ``starts[i + 1]``.
    """

    starts: Tensor
    columns: Tensor
    values: Tensor
    width: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, rows: Tensor) -> Tensor:
        first = self.starts[rows]
        sizes = self.starts[rows + 1] - first
        row = torch.arange(len(rows), device=rows.device).repeat_interleave(sizes)
        place = (first - sizes.cumsum(0) + sizes)[row] + torch.arange(len(row), device=rows.device)
        dense = self.values.new_zeros(len(rows), self.width)
        dense[row, self.columns[place]] = self.values[place]
        return dense

    def split(self, size: int) -> Iterator[Tensor]:
        """All rows in order, ``size`` at a time."""
        rows = torch.arange(len(self), device=self.starts.device)
        return (self[part] for part in rows.split(size))  # type: ignore[no-untyped-call]

    def to(self, device: torch.device) -> _SparseRows:
        """The same on another device."""
        return _SparseRows(self.starts.to(device), self.columns.to(device), self.values.to(device), self.width)


def _rows_of(matrix: Tensor) -> Any:
    """What gives batches of rows: a dense tensor as it is, a sparse matrix as :class:`_SparseRows`."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"rows must be a tensor, got {describe(matrix)}; pass torch.as_tensor(rows)")
    if matrix.layout == torch.strided:
        return matrix
    if matrix.layout not in (torch.sparse_coo, torch.sparse_csr) or matrix.dim() != 2 or matrix.dense_dim():
        raise ValueError(f"a sparse tensor must be a matrix in COO or CSR layout, got {describe(matrix)}")
    if matrix.layout == torch.sparse_csr:
        return _SparseRows(matrix.crow_indices().long(), matrix.col_indices(), matrix.values(), matrix.shape[1])
    matrix = matrix.coalesce()
    row, column = matrix.indices()
    starts = torch.searchsorted(row.contiguous(), torch.arange(matrix.shape[0] + 1, device=row.device))
    return _SparseRows(starts, column, matrix.values(), matrix.shape[1])


def base_rate_bias(
    target: Tensor, num_classes: int | None = None, *, smoothing: float = 1.0, ignore_index: int = -100
) -> Tensor:
    r"""The bias of a last layer with which training starts at the base rates: each label as likely as in ``target``.

    For labels it is the log-odds of each label's share, for class indices the logarithm of each class's share,

    .. math:: b_j = \log \frac{n_j + a}{n - n_j + a}
        \qquad\text{and}\qquad b_c = \log \frac{n_c + a}{n + C a},

    where :math:`n_j` of :math:`n` rows have the label, and :math:`a` is the smoothing. So a sigmoid of the first, or a
    softmax of the second, gives the shares, as if each outcome had been met :math:`a` times more.

    Args:
        target: Labels ``(N, L)``, boolean, 0 and 1, or soft; or class indices ``(N,)``, with ``num_classes``. Both may
            have more dimensions before.
        num_classes: How many classes there are, None for labels.
        smoothing: What is added to each count. It keeps the bias of a label that is never or always true finite.
        ignore_index: Entries of this value are left out.

    Returns:
        A float32 tensor ``(L,)`` or ``(num_classes,)`` on the CPU, computed in float64.

    Raises:
        TypeError: The target is no dense tensor, or has the wrong dtype.
        ValueError: A shape or value does not fit, nothing is left to count, or a bias is not finite without smoothing.

    Example:
        >>> target = torch.tensor([[1, 0], [1, 0], [0, 0]])
        >>> layer = nn.Linear(4, 2)
        >>> with torch.no_grad():
        ...     _ = layer.bias.copy_(base_rate_bias(target))
        >>> layer.bias.detach().sigmoid()
        tensor([0.6000, 0.2000])
        >>> base_rate_bias(torch.tensor([0, 2, 2, -100]), num_classes=3).softmax(0)
        tensor([0.3333, 0.1667, 0.5000])
    """
    extra = check_number("smoothing", smoothing, low=0.0)
    true, total = _counts(target, num_classes, check_integer("ignore_index", ignore_index))
    rest = total - true + extra if num_classes is None else total + num_classes * extra
    bias = (true + extra).log() - rest.log()
    if not bool(bias.isfinite().all()):
        raise ValueError("smoothing must be above 0: something in target is never or always true")
    return bias.float()


def _counts(target: Tensor, num_classes: int | None, ignored: int) -> tuple[Tensor, Tensor]:
    """How often each label or class is true, and of how many entries."""
    if not isinstance(target, Tensor) or target.layout != torch.strided or target.is_complex():
        raise TypeError(f"target must be a dense tensor of labels or class indices, got {describe(target)}")
    target = target.detach().cpu()
    if num_classes is not None:
        classes = check_integer("num_classes", num_classes, low=1)
        index, counted = check_index(target, target.shape, classes, ignored)
        true, total = index[counted].bincount(minlength=classes), counted.sum()
    elif target.dim() < 2:
        raise ValueError(f"labels must have the shape (N, L), class indices need num_classes, got {describe(target)}")
    else:
        labels = (target if target.is_floating_point() else target.long()).flatten(0, -2)  # uint8 has no -100
        counted = labels != ignored
        labels = check_labels(labels, labels.shape, mask=counted)
        true, total = labels.double().masked_fill(~counted, 0).sum(0), counted.sum(0)
    if not bool(counted.any()):
        raise ValueError(f"target must have an entry that is not ignored, got {describe(target)}")
    return true.double(), total.double()


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


def _progress_bar(total: int, desc: str) -> AbstractContextManager[Any]:
    """A plain-text bar on stderr, shown in terminals and notebooks where tqdm is installed; otherwise None."""
    watched = sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")
    try:
        tqdm = importlib.import_module("tqdm").tqdm if watched else None
    except ModuleNotFoundError:
        tqdm = None
    if tqdm is None:
        return nullcontext()
    # mininterval=0 draws every epoch, also the last one of a fast run
    bar: AbstractContextManager[Any] = tqdm(total=total, desc=desc, leave=False, mininterval=0, unit="epoch")
    return bar


def _show(bar: Any, history: History) -> None:
    """Move the bar, if there is one, by an epoch."""
    if bar is not None:
        shown = {"loss": f"{history.loss[-1]:.3g}"}
        shown |= {name: f"{values[-1]:.3f}" for name in ("metric", "validation") if (values := getattr(history, name))}
        bar.set_postfix(shown, refresh=False)
        bar.update()
