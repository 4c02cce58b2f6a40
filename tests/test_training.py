"""The training loop, its determinism, and several seeds."""

import contextlib
import io
import math
import statistics
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lossbook.training import Runs, predict, run_seeds, seeded, train

DATA = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10.0).view(10, 1) / 10


def net(dropout=0.0):
    with seeded(5):
        return nn.Sequential(nn.Linear(3, 4), nn.Dropout(dropout), nn.Linear(4, 1))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_is_adam_on_shuffled_batches():
    """The same steps by hand: order from the seed, Adam from its paper's formulas, in float64."""
    model = nn.Linear(3, 1).double()
    inputs, targets = (t.double() for t in DATA)
    theta = [p.detach().clone().requires_grad_() for p in model.parameters()]
    history = train(model, F.mse_loss, (inputs, targets), epochs=2, batch_size=4, lr=0.1, seed=3, device="cpu")
    m, v, step = [0.0, 0.0], [0.0, 0.0], 0
    losses = []
    with seeded(3):
        for _ in range(2):
            order, total = torch.randperm(10), 0.0
            for rows in (order[:4], order[4:8], order[8:]):
                step += 1
                loss = ((inputs[rows] @ theta[0].T + theta[1] - targets[rows]) ** 2).mean()
                total += loss.item() * len(rows)
                grads = torch.autograd.grad(loss, theta)
                for i, grad in enumerate(grads):
                    m[i] = 0.9 * m[i] + 0.1 * grad
                    v[i] = 0.999 * v[i] + 0.001 * grad**2
                    move = 0.1 * (m[i] / (1 - 0.9**step)) / ((v[i] / (1 - 0.999**step)).sqrt() + 1e-8)
                    theta[i] = (theta[i] - move).detach().requires_grad_()
            losses.append(total / 10)
    by_hand = torch.cat([t.detach().flatten() for t in theta])
    assert torch.allclose(weights(model), by_hand, atol=1e-9)
    assert history.loss == pytest.approx(losses, abs=1e-6)  # summed up in float32
    assert history.metric == []


def test_same_seed_same_result_whatever_was_drawn_before():
    results = []
    for drawn in (0, 7):
        torch.rand(drawn)
        model = net(dropout=0.5)
        history = train(model, F.mse_loss, DATA, epochs=3, batch_size=4, lr=0.01, seed=1, device="cpu")
        results.append((weights(model), history.loss))
    assert results[0][0].equal(results[1][0])
    assert results[0][1] == results[1][1]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_another_seed_another_result(dropout):
    results = []
    for seed in (1, 2):
        model = net(dropout)
        train(model, F.mse_loss, DATA, epochs=1, batch_size=4 if not dropout else 10, seed=seed, device="cpu")
        results.append(weights(model))
    assert not results[0].equal(results[1])


def test_random_numbers_outside_go_on_as_if_nothing_happened():
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    train(net(0.5), F.mse_loss, DATA, epochs=1, device="cpu")
    assert torch.rand(4).equal(expected)


def test_seeded_restores_after_an_error():
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    with contextlib.suppress(KeyError), seeded(0):
        torch.rand(9)
        raise KeyError
    assert torch.rand(4).equal(expected)


def test_metric_is_asked_in_evaluation_mode_after_each_epoch():
    seen = []

    def metric(model):
        seen.append(model.training)
        return float(len(seen))

    trained_in = []
    model = net(0.5)
    model[1].register_forward_pre_hook(lambda layer, args: trained_in.append(layer.training))
    history = train(model, F.mse_loss, DATA, epochs=3, batch_size=5, device="cpu", metric=metric)
    assert history.metric == [1.0, 2.0, 3.0]
    assert len(history.loss) == 3
    assert seen == [False] * 3
    assert trained_in == [True] * 6
    assert not model.training


def test_default_device(monkeypatch):
    monkeypatch.setenv("LOSSBOOK_DEVICE", "meta")
    model = nn.Linear(3, 1)
    with pytest.raises(RuntimeError, match="meta"):  # a meta tensor has no value to report
        train(model, F.mse_loss, DATA, epochs=1)
    assert model.weight.device.type == "meta"


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Notebook(io.StringIO):
    pass


Notebook.__module__ = "ipykernel.iostream"


@pytest.mark.parametrize(("stream", "shown"), [(Terminal, True), (Notebook, True), (io.StringIO, False)])
def test_progress_bar(monkeypatch, stream, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    train(net(), F.mse_loss, DATA, epochs=2, device="cpu", metric=lambda model: 0.25, desc="squares")
    text = sys.stderr.getvalue()
    assert [part in text for part in ("squares", "2/2", "loss=", "metric=0.250")] == [shown] * 4
    assert shown or text == ""


def test_missing_tqdm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ModuleNotFoundError, match=r'package tqdm; install it with: pip install "lossbook\[notebook\]"'):
        train(net(), F.mse_loss, DATA, epochs=1, device="cpu")


@pytest.mark.parametrize("training_mode", [True, False])
@pytest.mark.parametrize("batch_size", [3, 10, 99])
def test_predict_is_the_whole_batch_at_once_without_dropout(training_mode, batch_size):
    model = net(0.5).train(training_mode)
    scores = predict(model, DATA[0], batch_size=batch_size)
    assert model.training is training_mode
    assert not scores.requires_grad
    assert torch.allclose(scores, model[2](model[0](DATA[0])))


VALUES = (0.5, 0.25, 0.9)


def test_runs_summarise():
    runs = Runs(VALUES)
    assert runs.mean == pytest.approx(sum(VALUES) / 3)
    assert runs.std == pytest.approx(statistics.stdev(VALUES))
    assert math.isclose(runs.std**2 * 2, sum((v - runs.mean) ** 2 for v in VALUES))
    assert str(runs) == f"{runs}" == "0.55 ± 0.33 (3 seeds)"
    assert f"{runs:.1%}" == "55.0% ± 32.8% (3 seeds)"
    assert str(Runs((0.5,))) == "0.50 ± 0.00 (1 seed)"


def test_run_seeds():
    assert run_seeds(lambda seed: torch.tensor(seed / 4), (1, 2)) == Runs((0.25, 0.5))
    by_name = run_seeds(lambda seed: {"a": seed, "b": -seed}, range(3))
    assert by_name == {"a": Runs((0.0, 1.0, 2.0)), "b": Runs((0.0, -1.0, -2.0))}
    with pytest.raises(ValueError, match="seeds must hold at least one seed"):
        run_seeds(lambda seed: 1.0, [])
