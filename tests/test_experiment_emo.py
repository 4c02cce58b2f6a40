"""The pieces of the experiment of chapter 6 against hand-made and brute-force values, on made text."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from experiments import emo as experiment
from experiments.harness import Job
from lossbook.data.public import WikiText2
from lossbook.emo import emo_ce_loss, emo_loss
from lossbook.models import WordModel
from lossbook.training import seeded

PLAN = replace(
    experiment.PLANS["smoke"],
    vocabulary=12,
    hidden=6,
    length=8,
    start_words=700,
    more_words=300,
    validation_words=400,
    test_words=300,
    prompts=6,
    clusters=3,
    dimensions=3,
    counted=4,
    fitted_windows=10,
)


def small_model(words=7, hidden=5, seed=0):
    with seeded(seed):
        model = WordModel(words, hidden)
        _ = torch.nn.init.normal_(model.bias)
    return model


# The text


def test_cut_numbers_words_by_how_frequent_they_are():
    text = torch.tensor([4, 4, 4, 2, 2, 0, 1, 3])
    counts = torch.tensor([5, 1, 9, 2, 7])
    # 2, 4 and 0 stay, as 0, 1 and 2; the others become word 4
    assert experiment.cut(text, counts, 3, rare=4).tolist() == [1, 1, 1, 0, 0, 2, 1, 1]


def test_cut_keeps_everything_where_there_is_room():
    text = torch.tensor([0, 1, 2])
    assert experiment.cut(text, torch.tensor([1, 3, 2]), 9, rare=0).tolist() == [2, 0, 1]


@pytest.mark.parametrize(("words", "rows"), [(9, 2), (8, 1), (10, 2), (5, 1)])
def test_windows_are_followed_by_the_next_word(words, rows):
    x, t = experiment.windows(torch.arange(words), 4)
    assert x.shape == t.shape == (rows, 4)
    assert torch.equal(t, x + 1)
    assert x.flatten().tolist() == list(range(4 * rows))


def test_prompts_and_continuations_do_not_meet():
    before, after, others = experiment.prompts(torch.arange(96 * 9 + 50), 3)
    assert before.tolist() == [list(range(s, s + 32)) for s in (0, 192, 384)]
    assert after.tolist() == [list(range(s + 32, s + 96)) for s in (0, 192, 384)]
    assert others.tolist() == [list(range(s + 128, s + 192)) for s in (0, 192, 384)]


def test_prompts_are_spread_over_the_text_and_never_more_than_there_are():
    before, _, _ = experiment.prompts(torch.arange(96 * 20), 5)
    assert before[:, 0].tolist() == [0, 384, 768, 1152, 1536]
    assert len(experiment.prompts(torch.arange(96 * 20), 99)[0]) == 10


# Samples


def test_distinct_and_repeats_by_hand():
    samples = torch.tensor([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]])
    assert experiment.distinct(samples, 1) == 5 / 10
    assert experiment.distinct(samples, 2) == 5 / 8  # 12, 21, 23, 34, 45
    assert experiment.repeats(samples, 2) == (1 / 2 + 0) / 2
    assert experiment.repeats(torch.ones(1, 9, dtype=torch.int64)) == 5 / 6


def test_a_cold_sample_is_the_best_word_each_time():
    model = small_model()
    prompt = torch.tensor([[1, 2, 3], [6, 0, 6]])
    drawn = experiment.sample(model, prompt, 5, 1e-4, seed=0)
    text = prompt
    with torch.no_grad():
        for _ in range(5):
            text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(drawn, text[:, 3:])


def test_samples_have_the_model_s_frequencies_at_a_temperature():
    model = small_model()
    prompt = torch.tensor([[1, 2, 3]]).expand(20_000, 3)
    drawn = experiment.sample(model, prompt, 1, 0.7, seed=3)
    wanted = (model(prompt[:1])[0, -1] / 0.7).softmax(-1)
    found = torch.bincount(drawn.flatten(), minlength=7) / 20_000
    assert (found - wanted).abs().max() < 0.015
    assert torch.equal(drawn, experiment.sample(model, prompt, 1, 0.7, seed=3))
    assert not torch.equal(drawn, experiment.sample(model, prompt, 1, 0.7, seed=4))


# Samples against text


def slow_area(p, q, scaling, steps):
    """The area under the curve by a fine sum of rectangles, in plain Python."""

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    curve = [(0.0, 1.0)]
    for i in range(1, steps):
        r = [i / steps * x + (1 - i / steps) * y for x, y in zip(p, q, strict=True)]
        curve.append((math.exp(-scaling * kl(q, r)), math.exp(-scaling * kl(p, r))))
    curve = sorted([*curve, (1.0, 0.0)])
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(curve))


@pytest.mark.parametrize("scaling", [1.0, 5.0])
@pytest.mark.parametrize("seed", range(4))
def test_area_is_that_of_a_direct_computation(seed, scaling):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(6, 0.7), size=2)
    p[seed] = 0  # an empty cluster
    p /= p.sum()
    wanted = slow_area(p.tolist(), q.tolist(), scaling, 5000)
    assert 0.02 < wanted < 0.98
    assert experiment.divergence_area(100 * p, 7 * q, scaling) == pytest.approx(wanted, abs=1e-3)
    assert experiment.divergence_area(q, p, scaling) == pytest.approx(wanted, abs=1e-3)


def test_area_of_the_same_and_of_disjoint_histograms():
    p = np.array([3.0, 1.0, 0.0, 6.0])
    assert experiment.divergence_area(p, 2 * p) == pytest.approx(1, abs=1e-12)
    # disjoint: the curve is ((1 - w)^5, w^5), and the area under it 5 B(6, 5) = 1 / 252
    disjoint = experiment.divergence_area(np.array([1.0, 2, 0, 0]), np.array([0, 0, 1.0, 1]))
    assert disjoint == pytest.approx(1 / 252, abs=2e-5)


def test_area_falls_as_the_histograms_part():
    areas = [experiment.divergence_area(np.array([0.5, 0.5]), np.array([0.5 + x, 0.5 - x])) for x in (0, 0.1, 0.3, 0.5)]
    assert areas == sorted(areas, reverse=True)
    assert areas[0] > areas[1] + 0.001 > areas[2] + 0.1 > areas[3] + 0.2


def test_bags_by_hand():
    rows = torch.tensor([[0, 1, 0, 1], [2, 2, 2, 2]])
    bags = experiment.bags(rows, vocabulary=3, pairs=100).toarray()
    assert bags[:, :3].tolist() == [[2, 2, 0], [0, 0, 4]]
    assert bags[:, 3:].sum(1).tolist() == [3, 3]
    pair = [3 + (a * 1_000_003 + b) % 100 for a, b in ((0, 1), (1, 0), (2, 2))]
    assert [bags[0, pair[0]], bags[0, pair[1]], bags[1, pair[2]]] == [2, 1, 3]


def test_likeness_knows_the_same_cloud_and_another():
    rng = np.random.default_rng(0)
    cloud, same = rng.normal(size=(2, 400, 3))
    assert experiment.likeness(cloud, cloud, 5, seed=0) == pytest.approx(1, abs=1e-12)
    assert experiment.likeness(cloud, same, 5, seed=0) > 0.9
    # clusters may be of one cloud alone only
    assert experiment.likeness(cloud, same + 50, 4, seed=0) == pytest.approx(1 / 252, abs=2e-5)
    assert experiment.likeness(cloud, cloud + np.eye(3)[0], 5, seed=0) < 0.9


# Costs


def test_neighbour_vectors_are_the_root_of_the_ratios():
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(6, (200,), generator=generator)
    pairs = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(200):
        for j in range(200):
            if 0 < abs(i - j) <= 2:
                pairs[text[i], text[j]] += 1
    ratio = (pairs * pairs.sum() / (pairs.sum(1, keepdim=True) * pairs.sum(0))).log().clamp(min=0)
    u, s, _ = torch.linalg.svd(ratio)
    wanted = (u[:, :5] * s[:5]) @ u[:, :5].T  # signs of columns are free, inner products are not
    found = experiment.neighbour_vectors(text, 6, 5).double()
    assert found.shape == (6, 5)
    assert (found @ found.T - wanted).abs().max() < 1e-5


# Losses


@pytest.mark.parametrize("weight", [0.5, 0.25])
def test_the_weight_of_emo(weight):
    model = small_model()
    frozen = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    states = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2), requires_grad=True)
    target = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(3))

    def gradient(loss):
        return torch.autograd.grad(loss, states)[0]

    scores = F.linear(states, model.vectors.weight, model.bias)
    rows = F.cross_entropy(scores.mT, target, reduction="none")
    costs = emo_loss(scores, target, frozen, reduction="none")
    emo = gradient(((rows / costs).detach() * costs).mean())
    scores = F.linear(states, model.vectors.weight, model.bias)
    ce = gradient(F.cross_entropy(scores.mT, target))
    found = experiment.loss_on_states(experiment.BOTH, weight, model, frozen)(states, target)
    assert found.item() == pytest.approx(rows.mean().item(), rel=1e-5)
    assert torch.allclose(gradient(found), (1 - weight) * ce + weight * emo, atol=1e-6)


def test_the_losses_are_the_package_s():
    model = small_model()
    frozen = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    words = torch.randint(7, (2, 9), generator=torch.Generator().manual_seed(3))
    states, scores, target = model.hidden(words[:, :-1]), model(words[:, :-1]), words[:, 1:]
    found = {
        method: experiment.loss_on_states(method, 0.5, model, frozen)(states, target).item()
        for method in (experiment.CE, experiment.EMO, experiment.BOTH)
    }
    assert found[experiment.CE] == pytest.approx(F.cross_entropy(scores.mT, target).item(), rel=1e-5)
    assert found[experiment.EMO] == pytest.approx(emo_loss(scores, target, frozen).item(), rel=1e-5)
    assert found[experiment.BOTH] == pytest.approx(emo_ce_loss(scores, target, frozen).item(), rel=1e-5)


# Measures


SHORT = replace(PLAN, length=5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_evaluate_against_the_definitions(temperature):
    model = small_model()
    text = torch.randint(7, (20 * 5 + 4,), generator=torch.Generator().manual_seed(0))
    vectors = torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rare = model(text[None, :100]).argmax(-1).flatten().mode().values.item()  # the most frequent answer
    found = experiment.evaluate(model, text, SHORT, rare, temperature, {"cost": vectors.float()})
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    logs, hits, entropy, cost, n = 0.0, 0, 0.0, 0.0, 0
    among_words = []
    for piece in range(20):
        scores = model(text[None, piece * 5 : piece * 5 + 5])[0].double() / temperature
        for place, p in enumerate(scores.softmax(-1).detach()):
            t = text[piece * 5 + place + 1].item()
            logs -= math.log(p[t])
            hits += int(p.argmax() == t)
            entropy -= sum(x * math.log(x) for x in p.tolist())
            cost += float((p * (1 - unit @ unit[t])).sum())
            n += 1
            if t != rare:
                among_words.append(max((i for i in range(7) if i != rare), key=p.tolist().__getitem__) == t)
    assert n == 100
    wanted = {"perplexity": math.exp(logs / n), "accuracy": hits / n, "entropy": entropy / n, "cost": cost / n}
    wanted["accuracy_words"] = sum(among_words) / len(among_words)
    assert len(among_words) < n
    assert wanted["accuracy_words"] != wanted["accuracy"]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_temperature_gives_the_wanted_entropy():
    model = small_model()
    text = torch.randint(7, (101,), generator=torch.Generator().manual_seed(0))
    for wanted in (0.5, 1.2, 1.6):
        temperature = experiment.temperature_for(model, text, SHORT, 0, wanted)
        found = experiment.evaluate(model, text, SHORT, 0, temperature)
        assert found["entropy"] == pytest.approx(wanted, abs=1e-3)


# The whole of it


@pytest.fixture
def made_text(monkeypatch):
    """A text with an order in place of WikiText-2: words go up by 1 or 2."""
    generator = torch.Generator().manual_seed(0)

    def text(length):
        return (torch.randint(1, 3, (length,), generator=generator).cumsum(0) ** 2 // 3) % 20

    words = ("<unk>", *(f"w{i}" for i in range(1, 20)))
    made = WikiText2(text(1000), text(500), text(1500), words)
    monkeypatch.setattr(experiment, "wikitext2", lambda: made)
    monkeypatch.setitem(experiment.PLANS, "smoke", PLAN)
    caches = (experiment.texts, experiment.features, experiment.count_vectors)
    for cached in caches:
        cached.cache_clear()
    yield made
    for cached in caches:
        cached.cache_clear()


def job(task, method, folder, final=True, seed=1, **settings):
    chosen = next(t for t in experiment.tasks("smoke") if t.name == task)
    return Job(chosen, method, settings, seed, final, "smoke", kept=folder)


def test_parts_of_the_text_do_not_overlap(made_text):
    parts = experiment.texts(PLAN)
    assert [len(part) for part in parts[:4]] == [700, 300, 500, 1500]
    counts = torch.bincount(made_text.train, minlength=20)
    whole = experiment.cut(made_text.train, counts, 12, rare=0)
    assert torch.equal(torch.cat([parts.start, parts.more]), whole)
    assert parts.rare == counts.argsort(descending=True, stable=True).tolist().index(0) < 12


def test_all_continue_from_the_same_start_and_keep_their_models(made_text, tmp_path):
    start = experiment.run(job(experiment.START, experiment.CE, tmp_path, lr=0.005))
    rivals = (experiment.CE, experiment.EMO, experiment.BOTH)
    found = {
        (task, method): experiment.run(job(task, method, tmp_path, lr=0.003))
        for task in (experiment.CHOSEN, experiment.LEVEL)
        for method in rivals
    }
    assert len(list(tmp_path.iterdir())) == 1 + 3  # one start, one model for each method, none made twice
    for run in (start, *found.values()):
        assert run.keys() >= experiment.EXPERIMENT.metrics.keys()
    for method in rivals:
        plain, level = found[experiment.CHOSEN, method], found[experiment.LEVEL, method]
        assert plain["temperature"] == 1
        assert level["temperature"] < 1
        assert plain["accuracy"] == pytest.approx(level["accuracy"])
        assert level["entropy"] < plain["entropy"]
    assert len({start["perplexity"], *(found[experiment.CHOSEN, method]["perplexity"] for method in rivals)}) == 4


def test_the_text_itself_is_measured_like_samples(made_text, tmp_path):
    found = experiment.run(job(experiment.TEXT, "other true continuations", tmp_path))
    _, true, others = experiment.prompts(experiment.texts(PLAN).test, PLAN.prompts)
    assert found["distinct_2"] == experiment.distinct(others, 2)
    assert found["repeats"] == experiment.repeats(others)
    own = experiment.measure_samples(true, true, PLAN, 1)
    assert own["mauve"] == pytest.approx(1)
    assert 0 < found["mauve"] <= 1


def test_a_run_gives_the_same_numbers_with_and_without_kept_weights(made_text, tmp_path):
    first = experiment.run(job(experiment.CHOSEN, experiment.BOTH, tmp_path, lr=0.003, weight=0.25))
    again = experiment.run(job(experiment.CHOSEN, experiment.BOTH, tmp_path, lr=0.003, weight=0.25))
    alone = experiment.run(job(experiment.CHOSEN, experiment.BOTH, None, lr=0.003, weight=0.25))
    other = experiment.run(job(experiment.CHOSEN, experiment.BOTH, tmp_path, lr=0.003, weight=0.5))
    assert first == again == alone
    assert other["perplexity"] != first["perplexity"]


def test_tuning_reads_validation_text_only(made_text, tmp_path, monkeypatch):
    tuning = job(experiment.CHOSEN, experiment.CE, tmp_path, final=False, lr=0.003)
    experiment.texts(PLAN).test.zero_()
    found = experiment.run(tuning)
    again = experiment.run(tuning)
    assert found == again
    assert found.keys() == {"perplexity", "accuracy", "accuracy_words", "entropy"}
    experiment.texts(PLAN).validation.copy_(experiment.texts(PLAN).validation.flip(0))
    assert experiment.run(tuning)["perplexity"] != found["perplexity"]


@pytest.mark.parametrize("scale", ["smoke", "cpu", "gpu"])
def test_all_rivals_are_tuned_alike(scale):
    found = {task.name: task for task in experiment.tasks(scale)}
    grids = found[experiment.CHOSEN].methods
    assert len({len(grid) for grid in grids.values()}) == 1
    assert found[experiment.LEVEL].methods == grids  # so both choose the same models
    assert {setting["weight"] for setting in grids[experiment.BOTH]} == {0.5, 0.25}
    assert {setting["lr"] for setting in grids[experiment.BOTH]} <= {s["lr"] for s in grids[experiment.CE]}
    one = found[experiment.ONE_RATE].methods
    assert one.keys() == grids.keys()
    assert len({setting["lr"] for (setting,) in one.values()}) == 1
    # weights are made once: whoever reads them comes later
    stages = [found[n].stage for n in (experiment.START, experiment.CHOSEN, experiment.ONE_RATE, experiment.LEVEL)]
    assert stages == sorted(set(stages))
