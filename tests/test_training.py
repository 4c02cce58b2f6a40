"""The training loop, its determinism, and several seeds."""

import contextlib
import io
import math
import statistics
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lossbook.training import Runs, base_rate_bias, predict, run_seeds, seeded, train

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
    hooks = {"metric": lambda model: 0.25, "validation": lambda model: 0.125}
    train(net(), F.mse_loss, DATA, epochs=2, device="cpu", desc="squares", **hooks)
    text = sys.stderr.getvalue()
    assert [part in text for part in ("squares", "2/2", "loss=", "metric=0.250", "validation=0.125")] == [shown] * 5
    assert shown or text == ""


def test_without_tqdm_there_is_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    history = train(net(), F.mse_loss, DATA, epochs=2, device="cpu")
    assert len(history.loss) == 2
    assert sys.stderr.getvalue() == ""


def test_torch_and_numpy_are_enough():
    """In a fresh interpreter, with every package hidden that only an extra installs."""
    hidden = ["tqdm", "sklearn", "scipy", "matplotlib", "pooch", "pandas", "IPython"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({hidden}))
import torch
from lossbook import fit_scale, paired_difference
from lossbook.training import train
model = torch.nn.Linear(1, 1)
train(model, torch.nn.functional.mse_loss, (torch.ones(4, 1), torch.ones(4, 1)), epochs=2, device="cpu")
fit_scale(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, True, False]))
print(paired_difference([2.0, 3.0], [1.0, 2.5]).n)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("2\n", "")


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("rows", "targets"), [(10, 9), (9, 10), (0, 0)])
def test_rows_and_targets_are_equally_many(rows, targets):
    model = net().train()
    before = weights(model).clone()
    text = rf"as many targets, got float32 tensor of shape \({rows}, 3\) and float32 tensor of shape \({targets}, 1\)"
    with pytest.raises(ValueError, match=text):
        train(model, F.mse_loss, (DATA[0][:rows], DATA[1][:targets]), epochs=1, device="meta")
    assert weights(model).equal(before)
    assert model.training
    assert model[0].weight.device.type == "cpu"


@pytest.mark.parametrize(
    ("loss_fn", "epochs", "error", "message"),
    [
        (F.mse_loss, None, TypeError, "epochs must say how many"),
        (F.mse_loss, 1.5, TypeError, "epochs must be an integer, got float 1.5"),
        (F.mse_loss, -1, ValueError, "epochs must be at least 0, got -1"),
        ([(2, F.mse_loss), (1, F.l1_loss)], 4, ValueError, "must add up to epochs=4, got 3"),
        ([(2.5, F.mse_loss)], None, TypeError, "epochs must be an integer, got float 2.5"),
        ([(F.mse_loss, 2)], None, TypeError, r"list of pairs \(epochs, function\), got list"),
        ([F.mse_loss], None, TypeError, r"list of pairs \(epochs, function\), got list"),
        ([], 0, TypeError, r"list of pairs \(epochs, function\), got list"),
        (None, 2, TypeError, r"list of pairs \(epochs, function\), got NoneType"),
    ],
)
def test_what_is_no_loss(loss_fn, epochs, error, message):
    with pytest.raises(error, match=message):
        train(net(), loss_fn, DATA, epochs=epochs, device="cpu")


# ------------------------------------------------------------------------------------------------ losses one by another


def test_a_schedule_goes_on_with_the_optimizer_and_the_random_numbers():
    """As one loss that changes after two epochs of three steps."""
    steps = 0

    def changing(scores, target):
        nonlocal steps
        steps += 1
        return (F.mse_loss if steps <= 6 else F.l1_loss)(scores, target)

    results = []
    for loss_fn, epochs in (
        (changing, 5),
        ([(2, F.mse_loss), (3, F.l1_loss)], None),
        ([[2, F.mse_loss], (3, F.l1_loss)], 5),
    ):
        model = net(0.5)
        history = train(model, loss_fn, DATA, epochs=epochs, batch_size=4, lr=0.05, seed=2, device="cpu")
        results.append((weights(model), history.loss))
    for found, losses in results[1:]:
        assert found.equal(results[0][0])
        assert losses == results[0][1]
    model = net(0.5)
    for epochs, loss_fn in ((2, F.mse_loss), (3, F.l1_loss)):  # a second training starts anew
        train(model, loss_fn, DATA, epochs=epochs, batch_size=4, lr=0.05, seed=2, device="cpu")
    assert not weights(model).equal(results[0][0])


# ------------------------------------------------------------------------------------------------------ best of epochs


def normalised_net():
    with seeded(5):
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


@pytest.mark.parametrize(("values", "best"), [([1, 3, 2, 3], 1), ([1, 2, 3, 4], 3), ([math.nan, 0, -1, math.nan], 1)])
def test_the_best_epoch_is_kept(values, best):
    left, modes = iter(values), []

    def validation(model):
        modes.append(model.training)
        return torch.tensor(float(next(left)))

    model, early = normalised_net(), normalised_net()
    options = {"batch_size": 5, "lr": 0.05, "seed": 1, "device": "cpu"}
    history = train(model, F.mse_loss, DATA, epochs=4, validation=validation, **options)
    assert history.validation == pytest.approx(values, nan_ok=True)
    assert history.best_epoch == best
    assert len(history.loss) == 4
    assert modes == [False] * 4
    train(early, F.mse_loss, DATA, epochs=best + 1, **options)
    for name, value in early.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_without_a_number_no_epoch_is_the_best():
    model, last = net(), net()
    history = train(model, F.mse_loss, DATA, epochs=2, device="cpu", validation=lambda model: math.nan)
    train(last, F.mse_loss, DATA, epochs=2, device="cpu")
    assert history.best_epoch is None
    assert weights(model).equal(weights(last))


# ---------------------------------------------------------------------------------------------------- losses that break


@pytest.mark.parametrize(("broken", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
@pytest.mark.parametrize("restored", [True, False])
def test_a_loss_that_is_not_finite_stops_training(broken, shown, restored):
    steps, asked = 0, []

    def breaking(scores, target):
        nonlocal steps
        steps += 1
        return F.mse_loss(scores, target) * (broken if steps == 5 else 1)  # within the second epoch of three steps

    model, early = net(), net()
    options = {"batch_size": 4, "seed": 1, "device": "cpu"}
    hooks = {"metric": lambda model: asked.append(model) or 0.5, "validation": (lambda m: 0.5) if restored else None}
    with pytest.warns(RuntimeWarning, match=f"stopped early: the loss of epoch 1, counted from 0, is ({shown}|nan)"):
        history = train(model, breaking, DATA, epochs=9, **hooks, **options)
    train(early, F.mse_loss, DATA, epochs=1, **options)
    assert len(history.loss) == 2
    assert history.loss[0] == pytest.approx(F.mse_loss(net()(DATA[0]), DATA[1]).item(), rel=0.1)
    assert not math.isfinite(history.loss[1])
    assert history.metric == [0.5]
    assert len(asked) == 1
    assert history.best_epoch == (0 if restored else None)
    assert weights(model).equal(weights(early)) is restored
    assert not model.training


# --------------------------------------------------------------------------------------------------- sparse rows


def sparse(seed, rows=10, columns=3):
    """A matrix with empty rows: in COO layout with entries of the same place, in CSR layout and dense."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.stack([torch.randint(0, n, (9,), generator=generator) for n in (rows - 1, columns)])
    place = torch.cat([place, place[:, :3]], 1)
    coo = torch.sparse_coo_tensor(place, torch.rand(12, generator=generator), (rows, columns), check_invariants=True)
    return {"coo": coo, "csr": coo.to_sparse_csr(), "dense": coo.to_dense()}


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_sparse_rows_train_and_predict_like_dense_ones(layout):
    inputs, targets = sparse(0), sparse(1, columns=1)
    trained = {}
    for kind in (layout, "dense"):
        model = net(0.5)
        train(model, F.mse_loss, (inputs[kind], targets[kind]), epochs=3, batch_size=4, lr=0.1, device="cpu")
        trained[kind] = weights(model)
    assert trained[layout].equal(trained["dense"])
    for batch_size in (3, 10, 99):
        assert torch.equal(
            predict(model, inputs[layout], batch_size=batch_size),
            predict(model, inputs["dense"], batch_size=batch_size),
        )


def test_other_sparse_tensors_are_refused():
    for tensor in (torch.eye(4).to_sparse_csc(), torch.ones(4, 2, 2).to_sparse(), torch.ones(4, 2).to_sparse(1)):
        with pytest.raises(ValueError, match="a sparse tensor must be a matrix in COO or CSR layout, got sparse_"):
            train(net(), F.mse_loss, (tensor, torch.ones(4, 1)), epochs=1, device="cpu")


def test_rows_that_are_no_tensor_are_refused():
    rows = [[1.0, 2.0, 3.0]]
    for call in (lambda: predict(net(), rows), lambda: train(net(), F.mse_loss, (rows, DATA[1][:1]), epochs=1)):
        with pytest.raises(TypeError, match=r"rows must be a tensor, got list; pass torch.as_tensor\(rows\)"):
            call()


# ------------------------------------------------------------------------------------------------------ base rates

ONES = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 1], [1, 0, 1]])


def log_odds(true, rows, extra):
    return math.log((true + extra) / (rows - true + extra))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("extra", [1.0, 0.5, 1e-6])
def test_the_bias_is_the_log_odds_of_each_label(dtype, extra):
    bias = base_rate_bias(ONES.to(dtype), smoothing=extra)
    assert bias.dtype == torch.float32
    assert bias.tolist() == torch.tensor([log_odds(n, 4, extra) for n in (3, 0, 3)]).tolist()
    assert base_rate_bias(ONES.to(dtype).view(2, 2, 3), smoothing=extra).equal(bias)


def test_soft_and_ignored_labels():
    soft = torch.tensor([[0.25, -100.0], [0.5, 1.0], [-100.0, -100.0]], requires_grad=True)
    bias = base_rate_bias(soft, smoothing=0.25)
    assert not bias.requires_grad
    assert bias.tolist() == torch.tensor([math.log(1.0 / 1.5), math.log(1.25 / 0.25)]).tolist()
    hard = torch.tensor([[1, -100, -100], [-100, 0, -100]])
    assert base_rate_bias(hard).tolist() == torch.tensor([math.log(2), -math.log(2), 0.0]).tolist()
    assert base_rate_bias(hard.masked_fill(hard == -100, 7), ignore_index=7).equal(base_rate_bias(hard))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("extra", [1.0, 0.25])
def test_the_bias_of_classes_is_the_logarithm_of_their_shares(dtype, extra):
    index = torch.tensor([0, 2, 2, 0, 0, 2, 3, 2])
    wanted = torch.tensor([math.log((n + extra) / (8 + 4 * extra)) for n in (3, 0, 4, 1)])
    bias = base_rate_bias(index.to(dtype), 4, smoothing=extra)
    assert bias.tolist() == wanted.tolist()
    assert bias.softmax(0).tolist() == pytest.approx([(n + extra) / (8 + 4 * extra) for n in (3, 0, 4, 1)])
    assert base_rate_bias(index.to(dtype).view(4, 2), 4, smoothing=extra).equal(bias)
    if dtype != torch.uint8:
        ignoring = torch.cat([index, torch.tensor([-100, -100])]).to(dtype)
        assert base_rate_bias(ignoring, 4, smoothing=extra).equal(bias)


@pytest.mark.parametrize(
    ("target", "options", "error", "message"),
    [
        ([[1, 0]], {}, TypeError, "target must be a dense tensor of labels or class indices, got list"),
        (
            ONES.float().to_sparse(),
            {},
            TypeError,
            "target must be a dense tensor of labels or class indices, got sparse_coo",
        ),
        (ONES * 1j, {}, TypeError, "target must be a dense tensor of labels or class indices, got complex64"),
        (ONES[0], {}, ValueError, r"labels must have the shape \(N, L\), class indices need num_classes, got int64"),
        (ONES * 2, {}, ValueError, r"target must be labels in \[0, 1\], got 2"),
        (ONES / 0, {}, ValueError, r"target must be labels in \[0, 1\], got inf"),
        (ONES[:0], {}, ValueError, "target must have an entry that is not ignored"),
        (ONES * 0 - 100, {}, ValueError, "target must have an entry that is not ignored"),
        (ONES[0] * 0 - 100, {"num_classes": 2}, ValueError, "target must have an entry that is not ignored"),
        (
            ONES[0],
            {"num_classes": 1},
            ValueError,
            r"target must be class indices in \[0, 1\) or ignore_index=-100, got 1",
        ),
        (
            ONES[0].float(),
            {"num_classes": 2},
            TypeError,
            "target must be class indices of an integer dtype, got float32",
        ),
        (ONES[0], {"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        (ONES, {"smoothing": -1}, ValueError, "smoothing must be a finite number >= 0, got -1"),
        (ONES, {"smoothing": 0}, ValueError, "smoothing must be above 0: something in target is never or always true"),
        (ONES[0], {"smoothing": 0, "num_classes": 3}, ValueError, "smoothing must be above 0"),
        (ONES, {"ignore_index": None}, TypeError, "ignore_index must be an integer, got NoneType None"),
    ],
)
def test_what_has_no_base_rates(target, options, error, message):
    with pytest.raises(error, match=message):
        base_rate_bias(target, **options)


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
