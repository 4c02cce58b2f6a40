"""The page Recipes: every block runs as it stands, and its gradient is that of one big batch."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing import start_processes
from torch.utils.data import DataLoader

from lossbook.am_softmax import linear_am_softmax_loss
from lossbook.distributed import ShardedCosineClassifier
from lossbook.multilabel_softmax import multilabel_softmax_loss
from lossbook.spans import GlobalPointer, span_loss, span_mask, spans_to_index

PAGE = (Path(__file__).parents[1] / "chapters" / "recipes.md").read_text(encoding="utf-8")
BLOCKS: dict[tuple[str, int], str] = {}
for title, text in re.findall(r"^##+ (.+)\n((?:(?!^##).*\n)*)", PAGE, re.M):
    BLOCKS |= {(title, n): code for n, code in enumerate(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))}

RATE, ROWS, SIZE, C = 0.1, 16, 5, 4


def run(title, n=0, **space):
    """Run a block of the page with the reader's names in ``space``."""
    exec(compile(BLOCKS[title, n], f"recipes.md, {title}", "exec"), space)
    return space


def test_every_block_has_a_test():
    tested = re.findall(r'\("([^"]+)", (\d)', Path(__file__).read_text(encoding="utf-8"))
    assert BLOCKS.keys() <= {(title, int(n)) for title, n in tested}


# ---------------------------------------------------------------- slow formulas, a row at a time where it matters


def zlpr(s, t):
    """Rows of the multi-label softmax; a soft label is a share of a positive and of a negative."""
    one = torch.ones_like(s[..., :1])
    negative = torch.cat([one, (1 - t) * s.exp()], -1).sum(-1).log()
    return negative + torch.cat([one, t * (-s).exp()], -1).sum(-1).log()


def focal(s, y, gamma=2.0):
    p = s.softmax(-1).gather(-1, y.clamp(min=0)[..., None])[..., 0]
    return torch.where(y >= 0, -((1 - p) ** gamma) * p.log(), 0)


def am(embedding, weight, y):
    cosine = F.normalize(embedding, dim=-1) @ F.normalize(weight, dim=-1).T
    return F.cross_entropy(30 * (cosine - 0.35 * F.one_hot(y, len(weight))), y, reduction="none")


def emo_ce(s, y, vectors):
    cosine = F.normalize(vectors, dim=-1) @ F.normalize(vectors, dim=-1).T
    ce = F.cross_entropy(s.flatten(0, -2), y.flatten(), reduction="none", ignore_index=-100).view(y.shape)
    emo = (s.softmax(-1) * (1 - cosine[y.clamp(min=0)])).sum(-1)
    return torch.where(y != -100, (ce + (ce / emo).detach() * emo) / 2, 0)


# ---------------------------------------------------------------- what the reader brings, in double precision


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.double)


def layer(inputs, outputs, bias=True):
    made = nn.Linear(inputs, outputs, bias=bias, dtype=torch.double)
    for n, p in enumerate(made.parameters()):
        p.data = normal(*p.shape, seed=n)
    return made


X = normal(ROWS, SIZE, seed=3)
LABELS = (normal(ROWS, C, seed=4) > 0).double()
# The halves, and the quarters, count different numbers of rows.
CLASSES = torch.arange(ROWS) % C
CLASSES[[0, 1, 2, 5, 9]] = -100
NO_CLASS = torch.full_like(CLASSES, -100)


def step(model, *losses):
    """The parameters after gradient descent, a step for each loss of the model."""
    model = deepcopy(model)
    for loss in losses:
        for p, grad in zip(model.parameters(), torch.autograd.grad(loss(model), model.parameters()), strict=True):
            p.data -= RATE * grad
    return parameters(model)


def counted_mean(losses, y):
    return losses.sum() / (y != -100).sum()


def focal_of(rows):
    """The mean over a part of the rows."""
    return lambda model: counted_mean(focal(model(X[rows]), CLASSES[rows]), CLASSES[rows])


WANTED = {
    "labels": lambda model: zlpr(model(X), LABELS).mean(),
    "classes": focal_of(slice(None)),
}
TARGETS = {"labels": LABELS, "classes": CLASSES}


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def batches(y, size, rank=0, ranks=1):
    return list(zip(X.split(size)[rank::ranks], y.split(size)[rank::ranks], strict=True))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=RATE)


# What both processes import, once for all: they are forked from a server that has imported it.
PRELOAD = ["lightning", "transformers.trainer", "transformers.models.llama.modeling_llama"]


def as_rank(rank, worker, port, folder):
    """One of two processes, with what torchrun would tell it."""
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "recipes", "GROUP_RANK": 0}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {name: str(value) for name, value in (address | ranks).items()}
    os.chdir(folder)
    torch.set_num_threads(1)
    found = worker(rank)
    torch.distributed.destroy_process_group()
    if rank == 0:
        torch.save(found, "found.pt")


def two_processes(worker, folder):
    """What a worker makes of the blocks as the first of two gloo processes."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    pair = start_processes(as_rank, (worker, port, folder), nprocs=2, join=False, start_method="forkserver")
    end = time.monotonic() + 300
    while not pair.join(timeout=5):
        if time.monotonic() > end:
            for process in pair.processes:
                process.kill()
            pytest.fail("two processes wait for each other")
    return torch.load(folder / "found.pt")


# ---------------------------------------------------------------- plain torch


def test_plain_loop():
    model = layer(SIZE, C)
    wanted = step(model, WANTED["labels"])
    run("Plain loop", 0, model=model, loader=batches(LABELS, ROWS), optimizer=sgd(model.parameters()))
    same(parameters(model), wanted)


def test_accumulation():
    model = layer(SIZE, C)
    wanted = step(model, focal_of(slice(12)), focal_of(slice(12, ROWS)))
    run("Gradient accumulation", 0, model=model, loader=batches(CLASSES, 3), optimizer=sgd(model.parameters()))
    same(parameters(model), wanted)


def test_accumulation_of_a_step_without_a_row():
    model = layer(SIZE, C)
    wanted = step(model, lambda m: m(X).sum() * 0)
    loader = batches(NO_CLASS, 4)
    assert run("Gradient accumulation", 0, model=model, loader=loader, optimizer=sgd(model.parameters()))["loss"] == 0
    same(parameters(model), wanted)


class Encoder(nn.Module):
    """Hidden states of three features; the head, where it has one, is for the loss."""

    def __init__(self, head=None):
        super().__init__()
        self.layer, self.head = layer(SIZE, 3), head

    def forward(self, x):
        return self.layer(x).tanh()


FSDP = [("The loss inside forward", 0), ("Unshard the head first", 0), ("Gather the weight yourself", 0)]


def sharded(rank):
    """An encoder, and class vectors of which this rank holds half."""
    head = ShardedCosineClassifier(3, C, dtype=torch.double)
    head.weight.data.to_local().copy_(layer(3, C, bias=False).weight.data.chunk(2)[rank])
    return nn.ModuleDict({"encoder": Encoder(), "head": head}), head


def uneven(rank):
    """The first way of FSDP2 as the page says it for processes that count different numbers of rows."""
    code, ((x, y),) = BLOCKS[FSDP[0]], batches(CLASSES, ROWS // 2, rank, 2)
    rows = (y != -100).sum()
    torch.distributed.all_reduce(rows)
    for old, new in {"weight, y)": 'weight, y, reduction="sum")', "model(x, y)": "(model(x, y) * 2 / rows)"}.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    encoder, head = Encoder(), layer(3, C, bias=False)
    exec(code, {"encoder": encoder, "head": head, "loader": [(x, y)], "make_optimizer": sgd, "rows": rows})
    return [p.full_tensor() for p in (*encoder.layer.parameters(), *head.parameters())]


def plain_worker(rank):
    """DDP, then each way of FSDP2 for two steps: the second would show a weight left over from the first."""
    found = {}
    model = layer(SIZE, C)
    loader = [
        pair for y in (NO_CLASS, CLASSES) for pair in batches(y, ROWS // 2, rank, 2)
    ]  # a step that changes nothing
    run("Several processes: DDP", 0, model=model, loader=loader, optimizer=sgd(model.parameters()))
    found["ddp"] = parameters(model)
    ((x, y),) = loader = batches(CLASSES.clamp(min=0), ROWS // 2, rank, 2)
    for title, n in FSDP:
        head = layer(3, C, bias=False)
        model = Encoder(head if title.startswith("Unshard") else None)
        space = {"model": model, "encoder": model, "head": head, "loader": loader * 2, "make_optimizer": sgd}
        run(title, n, **space)
        found[title] = [p.full_tensor() for p in (*model.layer.parameters(), *head.parameters())]
    found["FSDP2, uneven"] = uneven(rank)
    model, head = sharded(rank)
    one = run("Classes on several ranks", 0)["step"]
    for _ in range(2):
        one(model, sgd(model.parameters()), x, y)
    found["sharded"] = [*parameters(model["encoder"]), head.weight.full_tensor().detach()]
    for name in ("unclipped", "clipped"):
        if name == "clipped":
            run("Classes on several ranks", 1, model=model)
        grads = [*(p.grad for p in model["encoder"].parameters()), head.weight.grad.full_tensor()]
        found[name] = torch.cat([g.flatten() for g in grads])
    model, head = sharded(rank)
    model["encoder"].unused = nn.Parameter(torch.ones(2))
    one(model, sgd(model.parameters()), *batches(CLASSES, ROWS // 2, rank, 2)[0])
    found["sharded, uneven"] = [*parameters(model["encoder"].layer), head.weight.full_tensor().detach()]
    none = one(model, sgd(model.parameters()), x, torch.full_like(y, -100))
    found["sharded, no row"] = [none, *parameters(model["encoder"].layer), head.weight.full_tensor().detach()]
    assert model["encoder"].unused.grad is None
    for way in ("full_tensor", "unshard"):
        head = fully_shard(layer(3, C, bias=False))
        if way == "unshard":
            head.unshard()
        linear_am_softmax_loss(
            x[:, :3], head.weight.full_tensor() if way == "full_tensor" else head.weight, y
        ).backward()
        grad = head.weight.grad
        found[f"{way}, wrong"] = grad.full_tensor() if way == "full_tensor" else grad
    return found


def test_ddp_and_fsdp2(tmp_path):
    found = two_processes(plain_worker, tmp_path)
    same(found["ddp"], step(layer(SIZE, C), WANTED["classes"]))
    y = CLASSES.clamp(min=0)
    model = nn.ModuleList([Encoder(), layer(3, C, bias=False)])
    wanted = step(model, *[lambda m: am(m[0](X), m[1].weight, y).mean()] * 2)
    for name in ("sharded", *(title for title, _ in FSDP)):
        same(found[name], wanted)
    counted = CLASSES != -100
    once = step(model, lambda m: am(m[0](X[counted]), m[1].weight, CLASSES[counted]).mean())
    same(found["FSDP2, uneven"], once)
    same(found["sharded, uneven"], once)
    same(found["sharded, no row"], [torch.zeros((), dtype=torch.double), *once])
    assert found["unclipped"].norm() > 1.1
    torch.testing.assert_close(found["clipped"], found["unclipped"] / (found["unclipped"].norm() + 1e-6))
    weight = model[1].weight
    (grad,) = torch.autograd.grad(am(X[:, :3], weight, y).mean(), weight)
    for way in ("full_tensor", "unshard"):  # what the page warns of
        assert (found[f"{way}, wrong"] - grad).norm() > 0.1 * grad.norm()


def test_classes_on_several_ranks_are_those_of_the_example():
    functions = BLOCKS["Classes on several ranks", 0].partition("\n\n\n")[2]
    assert functions.count("def ") == 4
    assert functions in (Path(__file__).parents[1] / "examples/sharded_am_softmax.py").read_text(encoding="utf-8")


# ---------------------------------------------------------------- Lightning


LIGHTNING = {"labels": ("Lightning", 0), "classes": ("Lightning", 1)}


def fit(target, size, accumulation, rank=0, ranks=1):
    """The parameters after a block has seen every row once; without a sampler, each process has its own loader."""
    import lightning as L

    model = layer(SIZE, C)
    loader = DataLoader(batches(TARGETS[target], size, rank, ranks), batch_size=None)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp" if ranks > 1 else "auto",
        max_epochs=1,
        accumulate_grad_batches=accumulation,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    run(*LIGHTNING[target], trainer=trainer, model=model, loader=loader)
    return parameters(model)


def lightning_worker(rank):
    found = {target: fit(target, 4, 2, rank, 2) for target in TARGETS}
    return found


@pytest.mark.parametrize(("size", "accumulation"), [(16, 1), (4, 4)])
@pytest.mark.parametrize("target", TARGETS)
def test_lightning(target, size, accumulation):
    pytest.importorskip("lightning", reason="the recipes of Lightning need it")
    same(fit(target, size, accumulation), step(layer(SIZE, C), WANTED[target]))


def test_lightning_counts_each_step_anew():
    pytest.importorskip("lightning", reason="the recipes of Lightning need it")
    wanted = step(layer(SIZE, C), focal_of(slice(12)), focal_of(slice(12, ROWS)))
    same(fit("classes", 4, 3), wanted)


def test_lightning_makes_no_step_without_a_row(monkeypatch):
    pytest.importorskip("lightning", reason="the recipes of Lightning need it")
    monkeypatch.setitem(TARGETS, "classes", NO_CLASS)
    same(fit("classes", 4, 4), parameters(layer(SIZE, C)))


def test_lightning_in_two_processes(tmp_path):
    pytest.importorskip("lightning", reason="the recipes of Lightning need it")
    found = two_processes(lightning_worker, tmp_path)
    for target in TARGETS:
        same(found[target], step(layer(SIZE, C), WANTED[target]))


# ---------------------------------------------------------------- Hugging Face Trainer

WORDS, LENGTH = 7, 6
TOKENS = torch.randint(WORDS, (ROWS, LENGTH), generator=generator(5))
PADDING = torch.arange(LENGTH) >= (torch.arange(ROWS) % 4 + 3)[:, None]
TAGS = torch.where(PADDING, -100, TOKENS % C)
NEXT = torch.where(PADDING, -100, TOKENS)


class Scores(nn.Module):
    """A model of the reader's that returns what those of Hugging Face return."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def get_input_embeddings(self):
        return self.body[0]

    def forward(self, x, labels=None):
        from transformers.modeling_outputs import SequenceClassifierOutput

        return SequenceClassifierOutput(logits=self.body(x))


def words(outputs):
    table = nn.Embedding(WORDS, 3, dtype=torch.double)
    table.weight.data = normal(WORDS, 3, seed=6)
    return nn.Sequential(table, layer(3, outputs))


def llama():
    """A model that the Trainer knows as causal."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes, bos_token_id=0, eos_token_id=1)).double()


# A block's title, a model, its inputs, labels, and the mean over the whole batch.
CASES = {
    "labels": (
        ("Several labels a row", 0),
        lambda: Scores(layer(SIZE, C)),
        {"x": X},
        LABELS,
        lambda s, frozen: zlpr(s, LABELS).mean(),
    ),
    "tokens": (
        ("One label a token, or one a row", 0),
        lambda: Scores(words(C)),
        {"x": TOKENS},
        TAGS,
        lambda s, frozen: counted_mean(focal(s, TAGS), TAGS),
    ),
    "language": (
        ("Language model", 0),
        lambda: Scores(words(WORDS)),
        {"x": TOKENS},
        NEXT,
        lambda s, frozen: counted_mean(emo_ce(s[:, :-1], NEXT[:, 1:], frozen), NEXT[:, 1:]),
    ),
    "causal": (
        ("Language model", 0),
        llama,
        {"input_ids": TOKENS},
        NEXT,
        lambda s, frozen: counted_mean(emo_ce(s[:, :-1], NEXT[:, 1:], frozen), NEXT[:, 1:]),
    ),
}


def arguments(folder, size, accumulation):
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        max_steps=1,
        learning_rate=RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        use_cpu=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )


def rows_of(inputs, labels):
    return [{**{k: v[i] for k, v in inputs.items()}, "labels": labels[i]} for i in range(ROWS)]


def train(case, folder, size, accumulation):
    block, make, inputs, labels, _ = CASES[case]
    model = make()
    run(*block, model=model, args=arguments(folder, size, accumulation), dataset=rows_of(inputs, labels))
    return parameters(model)


def wanted_of(case):
    _, make, inputs, _, mean = CASES[case]
    model = make()
    frozen = model.get_input_embeddings().weight.detach().clone() if case in ("language", "causal") else None
    return step(model, lambda m: mean(m(**inputs).logits, frozen))


def train_with(loss, folder, size, accumulation, model=None, labels=CLASSES, **inputs):
    """The parameters after a step with a reader's own ``compute_loss_func``."""
    from transformers import Trainer

    model = Scores(layer(SIZE, C)) if model is None else model
    data = rows_of(inputs or {"x": X}, labels)
    Trainer(model=model, args=arguments(folder, size, accumulation), train_dataset=data, compute_loss_func=loss).train()
    return parameters(model)


def mean_of_rows(outputs, labels, num_items_in_batch=None):
    return multilabel_softmax_loss(outputs.logits, labels)


def trainer_worker(rank):
    found = {case: train(case, ".", 4, 2) for case in CASES}
    found["mean"] = train_with(mean_of_rows, ".", 8, 1, labels=LABELS)
    return found


@pytest.mark.parametrize(("size", "accumulation"), [(16, 1), (4, 4)])
@pytest.mark.parametrize("case", CASES)
def test_trainer(case, size, accumulation, tmp_path):
    pytest.importorskip("transformers", reason="the recipes of the Trainer need it")
    same(train(case, tmp_path, size, accumulation), wanted_of(case))


def times_too_large(found):
    """By what the step of ``mean_of_rows`` is longer than that of one big batch."""
    start = parameters(layer(SIZE, C))
    wanted = step(layer(SIZE, C), WANTED["labels"])
    factors = torch.cat([((a - s) / (b - s)).flatten() for a, b, s in zip(found, wanted, start, strict=True)])
    torch.testing.assert_close(factors, factors.mean().expand_as(factors))
    return factors.mean().item()


def test_trainer_in_two_processes(tmp_path):
    pytest.importorskip("transformers", reason="the recipes of the Trainer need it")
    found = two_processes(trainer_worker, tmp_path)
    for case in CASES:
        same(found[case], wanted_of(case))
    assert times_too_large(found["mean"]) == pytest.approx(2)


def test_trainer_multiplies_a_mean_by_the_accumulation(tmp_path):
    pytest.importorskip("transformers", reason="the recipes of the Trainer need it")
    assert times_too_large(train_with(mean_of_rows, tmp_path, 4, 4, labels=LABELS)) == pytest.approx(4)


def test_trainer_multiplies_once_more_where_one_process_drives_several_devices(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="the recipes of the Trainer need it")
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", 2)
    space = {}
    exec(BLOCKS["Several labels a row", 0].split("trainer =")[0], space)
    found = train_with(space["compute_loss"], tmp_path, 8, 1, labels=LABELS)
    assert times_too_large(found) == pytest.approx(2)


@pytest.mark.parametrize(
    ("make", "name", "first"), [(lambda: Scores(words(WORDS)), "x", 0), (llama, "input_ids", 1)], ids=["any", "causal"]
)
def test_trainer_counts_the_first_token_of_models_it_does_not_know(make, name, first, tmp_path):
    pytest.importorskip("transformers", reason="the recipes of the Trainer need it")
    seen = []

    def loss(outputs, labels, num_items_in_batch=None):
        seen.append(int(num_items_in_batch))
        return outputs.logits.sum() * 0

    train_with(loss, tmp_path, 4, 4, make(), NEXT, **{name: TOKENS})
    assert set(seen) == {int((NEXT[:, first:] != -100).sum())}


@pytest.mark.parametrize("case", CASES)
def test_without_a_count_the_batch_counts_itself(case, tmp_path):
    pytest.importorskip("transformers", reason="the recipes of the Trainer need it")
    block, make, inputs, labels, mean = CASES[case]
    model, trainer = make(), SimpleNamespace(train=lambda: None)
    space = {"Trainer": trainer, "model": model, "args": None, "dataset": None}
    code = BLOCKS[block].split("trainer =")[0]
    exec(code, space)
    with torch.no_grad():
        outputs = model(**inputs)
        torch.testing.assert_close(space["compute_loss"](outputs, labels), mean(outputs.logits, space.get("frozen")))
        if case != "labels":
            for counts in ({}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(0)}):
                assert space["compute_loss"](outputs, torch.full_like(labels, -100), **counts) == 0


# ---------------------------------------------------------------- shapes, masks and weights, against the formula


def test_segmentation():
    scores, classes = normal(2, C, 3, 5), torch.randint(C, (2, 3, 5), generator=generator())
    classes[0, 1] = classes[1, :, 2] = 255
    found = run("Segmentation", 0, model=lambda images: scores, images=None, classes=classes)["loss"]
    counted = classes != 255
    torch.testing.assert_close(found, focal(scores.movedim(1, -1)[counted], classes[counted]).mean())


def test_segmentation_with_several_labels():
    scores, labels = normal(2, C, 3, 5), normal(2, C, 3, 5, seed=1) > 0
    found = run("Segmentation", 1, model=lambda images: scores, images=None, labels=labels)["loss"]
    torch.testing.assert_close(found, zlpr(scores.movedim(1, -1), labels.movedim(1, -1).double()).mean())


@pytest.mark.parametrize("background", [False, True])
def test_detection(background):
    scores, match = normal(2, 9, C), torch.randint(-2, C, (2, 9), generator=generator())
    if background:
        match = match.clamp(max=-1)
    found = run("Detection with ignored anchors", 0, model=lambda images: scores, images=None, match=match)["loss"]
    wanted = torch.zeros((), dtype=torch.double)
    for s, m in zip(scores.flatten(0, 1), match.flatten().tolist(), strict=True):
        for i, p in enumerate(s.sigmoid()):
            if m != -2:
                wanted -= 0.25 * (1 - p) ** 2 * p.log() if m == i else 0.75 * p**2 * (1 - p).log()
    torch.testing.assert_close(found, wanted / max(1, int((match >= 0).sum())))


def test_unknown_labels():
    scores, labels = normal(ROWS, C), torch.randint(-1, 2, (ROWS, C), generator=generator())
    found = run("Unknown labels", 0, scores=scores, labels=labels)["loss"]
    rows = [zlpr(s[t >= 0], t[t >= 0].double()) for s, t in zip(scores, labels, strict=True) if (t >= 0).any()]
    torch.testing.assert_close(found, torch.stack(rows).mean())


def test_long_lists():
    positives = [[5, 700], [], [9]]
    scores, labels = normal(3, 1000), torch.zeros(3, 1000, dtype=torch.double)
    for i, row in enumerate(positives):
        labels[i, row] = 1
    found = run("Long lists of labels", 0, scores=scores, positives=positives)["loss"]
    torch.testing.assert_close(found, zlpr(scores, labels).mean())


LENGTHS = torch.tensor([6, 4, 5])
ENTITIES = [[(0, 0, 1), (2, 3, 5), (2, 5, 5)], [], [(1, 2, 2)]]


def span_rows(scores, spans, lengths, triangular=True):
    """The loss of each sentence and type, on the pairs that count."""
    rows = torch.zeros(scores.shape[:2], dtype=torch.double)
    for b, n in enumerate(lengths.tolist()):
        pairs = [(i, j) for i in range(n) for j in range(n) if i <= j or not triangular]
        for kind in range(scores.shape[1]):
            s = torch.stack([scores[b, kind, i, j] for i, j in pairs])
            t = torch.tensor([(kind, i, j) in spans[b] for i, j in pairs], dtype=torch.double)
            rows[b, kind] = zlpr(s, t)
    return rows


def pointers(**options):
    """An encoder of numbers of words and a pointer for three types."""
    torch.manual_seed(0)
    encoder, pointer = nn.Embedding(WORDS, 4), GlobalPointer(4, 3, head_features=4, **options)
    return encoder.double(), pointer.double()


def test_spans():
    encoder, pointer = pointers()
    model, tokens = nn.Sequential(encoder, pointer), TOKENS[:3]
    wanted = step(model, lambda m: span_rows(m(tokens), ENTITIES, LENGTHS).mean())
    space = {"loader": [(tokens, LENGTHS, ENTITIES)], "optimizer": sgd(model.parameters())}
    run("Spans, plain loop", 0, encoder=encoder, pointer=pointer, **space)
    same(parameters(model), wanted)


def test_spans_in_lightning():
    L = pytest.importorskip("lightning", reason="the recipes of Lightning need it")
    encoder, pointer = pointers()
    model, tokens = nn.Sequential(encoder, pointer), TOKENS[:3]
    wanted = step(model, lambda m: span_rows(m(tokens), ENTITIES, LENGTHS).mean())
    index = spans_to_index(ENTITIES, LENGTH, 3, lengths=LENGTHS)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, **quiet)
    loader = DataLoader([(tokens, LENGTHS, index)], batch_size=None)
    run("Spans in Lightning", 0, encoder=encoder, pointer=pointer, trainer=trainer, loader=loader)
    same(parameters(model), wanted)


def test_spans_on_an_encoder():
    transformers = pytest.importorskip("transformers", reason="the recipes of the Trainer need it")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "Ada", "Hol", "##berg", "lives", "in", "Nor", "##by", "."]
    words = Tokenizer(models.WordPiece({w: i for i, w in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 4}
    config = transformers.BertConfig(vocab_size=len(vocabulary), hidden_dropout_prob=0.0, **sizes)
    encoder, pointer = transformers.BertModel(config).double().eval(), pointers()[1]
    texts = ["Ada Holberg lives in Norby.", "Norby lives."]
    space = {"tokenizer": tokenizer, "encoder": encoder, "pointer": pointer, "texts": texts}
    space = run("Spans on a Hugging Face encoder", 0, entities=[[(0, 0, 11), (1, 21, 26)], [(2, 0, 5)]], **space)
    # without [CLS] and [SEP], first: Ada Hol ##berg lives in Nor ##by .
    spans, lengths = [[(0, 0, 2), (1, 5, 6)], [(2, 0, 1)]], torch.tensor([8, 4])
    torch.testing.assert_close(space["loss"], span_rows(space["scores"][..., 1:-1, 1:-1], spans, lengths).mean())
    for row, own in enumerate(space["found"]):
        places = (space["scores"][row] > 0) & space["mask"][row]
        assert len(own) == int(places.sum())
        assert all(text and text in texts[row] for _, text in own)
    with pytest.raises(TypeError, match="end must be an integer, got NoneType"):
        run("Spans on a Hugging Face encoder", 0, **space | {"entities": [[(0, 0, 99)], []]})


def relation_loss():
    """That of chapter 7."""
    text = (Path(__file__).parents[1] / "chapters/spans.md").read_text(encoding="utf-8")
    space = {"span_loss": span_loss, "span_mask": span_mask, "spans_to_index": spans_to_index}
    exec(re.search(r"^def relation_loss.*?(?=\n\n\n)", text, re.M | re.S)[0], space)
    return space["relation_loss"]


def test_triples():
    torch.manual_seed(0)
    features, stated = torch.randn(3, LENGTH, 8), [[(0, 1, 1, 4, 5), (3, 3, 0, 0, 1)], [], [(2, 2, 1, 4, 4)]]
    space = run("Triples from four matrices", 0, features=features, lengths=LENGTHS, size=8, P=2, triples=stated)
    ends = [[(0, 0, 1), (1, 4, 5), (0, 3, 3), (1, 0, 1)], [], [(0, 2, 2), (1, 4, 4)]]
    ties = [[(1, 0, 4), (3, 1, 5), (0, 3, 0), (2, 3, 1)], [], [(1, 2, 4), (3, 2, 4)]]
    wanted = span_rows(space["spans"], ends, LENGTHS).sum() + span_rows(space["pairs"], ties, LENGTHS, False).sum()
    torch.testing.assert_close(space["loss"], wanted / 3, check_dtype=False)
    scores = *space["spans"].chunk(2, 1), *space["pairs"].chunk(2, 1)
    torch.testing.assert_close(space["loss"], relation_loss()(*scores, stated, LENGTHS))
    s, p = space["spans"], space["pairs"]
    for row, own in enumerate(space["found"]):
        for a, b, k, c, d in own:
            assert min(s[row, 0, a, b], s[row, 1, c, d], p[row, k, a, c], p[row, 2 + k, b, d]) > 0
    assert any(space["found"])


def test_distillation():
    model, teacher = layer(SIZE, C), lambda x: x[:, :C]
    p, log_p = teacher(X).softmax(-1), model(X).log_softmax(-1)
    found = run("Distillation", 0, x=X, model=model, teacher=teacher)["loss"]
    torch.testing.assert_close(found, F.cross_entropy(model(X), p))
    torch.testing.assert_close(found, -(p * log_p).sum(-1).mean())


def test_distillation_with_several_labels():
    model, teacher = layer(SIZE, C), lambda x: x[:, :C]
    found = run("Distillation", 1, x=X, model=model, teacher=teacher)["loss"]
    torch.testing.assert_close(found, zlpr(model(X), (2 * teacher(X)).sigmoid()).mean())


def test_weights():
    model, class_weight, sample_weight = layer(SIZE, C), torch.rand(C) + 0.1, torch.rand(ROWS) + 0.1
    space = {"x": X, "y": CLASSES, "model": model, "class_weight": class_weight, "sample_weight": sample_weight}
    found = run("Class weights and sample weights", 0, **space)["loss"]
    total = weights = 0.0
    noise = normal(100_000, C, seed=9)
    for s, y, w in zip(model(X), CLASSES.tolist(), sample_weight, strict=True):
        if y != -100:
            wrong = ((s + noise).argmax(-1) != y).double().mean()
            total, weights = total + w * class_weight[y] * wrong, weights + w * class_weight[y]
    torch.testing.assert_close(found, total / weights, rtol=0, atol=0.01, check_dtype=False)
    assert run("Class weights and sample weights", 0, **space | {"y": NO_CLASS})["loss"] == 0


def test_margin_for_each_class():
    cosine, count = normal(ROWS, C).tanh(), torch.tensor([1000.0, 100.0, 10.0, 1.0], dtype=torch.double)
    found = run("A margin for each class", 0, cosine=cosine, y=CLASSES, class_count=count)["loss"]
    counted = CLASSES != -100
    y, c = CLASSES[counted], cosine[counted]
    wanted = F.cross_entropy(30 * (c - F.one_hot(y, C) * 0.5 * count**-0.25), y)
    torch.testing.assert_close(found, wanted)


def test_smoothing():
    scores = normal(ROWS, C).requires_grad_()
    for y in (torch.arange(ROWS) % C, CLASSES):
        found = run("Label smoothing", 0, scores=scores, y=y)["loss"]
        torch.testing.assert_close(found, F.cross_entropy(scores, y, label_smoothing=0.1))
        soft, log_p = F.one_hot(y.clamp(min=0), C) * 0.9 + 0.025, scores.log_softmax(-1)
        torch.testing.assert_close(found, -(soft * log_p).sum(-1)[y >= 0].mean())
    found = run("Label smoothing", 0, scores=scores, y=NO_CLASS)["loss"]
    assert found == 0
    assert torch.autograd.grad(found, scores)[0].abs().max() == 0


def test_smoothing_of_several_labels():
    scores = normal(ROWS, C)
    found = run("Label smoothing", 1, scores=scores, y=LABELS)["loss"]
    torch.testing.assert_close(found, zlpr(scores, LABELS * 0.9 + 0.05).mean())
