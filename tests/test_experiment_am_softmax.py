"""The pieces of chapter 4's experiment against loops and numbers by hand, on made data."""

import math

import pytest
import torch
from torch.nn import functional as F

from experiments import am_softmax as experiment
from experiments.harness import Job, Task
from lossbook.am_softmax import retrieval_accuracy
from lossbook.data.public import Banking77, Clinc150, TextSplit
from lossbook.models import TextEncoder, text_features

METHODS = tuple(experiment.grids("cpu"))


# ---------------------------------------------------------------- data


def test_place_in_class_counts_earlier_rows():
    labels = torch.tensor([3, 0, 3, 3, 0, 7])
    assert experiment.place_in_class(labels).tolist() == [0, 0, 1, 2, 1, 0]


def test_every_fifth_of_a_label_and_not_of_all():
    labels = torch.tensor([0] * 9 + [1] * 4 + [0] + [1])
    assert experiment.every_fifth(labels).nonzero()[:, 0].tolist() == [4, 13, 14]


def test_intents_are_divided_without_overlap_and_validation_is_never_unseen():
    drawn = [experiment.divide(12, 4, 3, seed) for seed in range(30)]
    for intents in drawn:
        assert len(intents.unseen) == len(intents.unseen.unique()) == 4
        assert sorted(intents.seen.tolist() + intents.unseen.tolist()) == list(range(12))
        assert set(intents.validation.tolist()) <= set(intents.seen.tolist())
        assert intents.validation.tolist() == drawn[0].validation.tolist() == sorted(intents.validation.tolist())
        assert len(intents.validation) == 3
    assert {intent for intents in drawn for intent in intents.unseen.tolist()} == set(range(12)) - set(
        drawn[0].validation.tolist()
    )
    assert experiment.divide(12, 4, 3, 7).unseen.equal(drawn[7].unseen)


def test_groups_hold_one_label_and_a_pass_repeats_no_row():
    labels = torch.tensor([0] * 9 + [1] * 3 + [2] * 8)[torch.randperm(20, generator=torch.Generator().manual_seed(3))]
    groups = experiment.groups_of(labels, 4, 11, torch.Generator().manual_seed(0))
    assert groups.shape == (11, 4)
    assert (labels[groups] == labels[groups][:, :1]).all()
    for passing in (groups[:4], groups[4:8]):  # two groups of label 0, none of label 1, two of label 2
        assert len(passing.unique()) == 16
        assert sorted(labels[passing][:, 0].tolist()) == [0, 0, 2, 2]
    assert not groups[:4].equal(groups[4:8])
    assert groups.equal(experiment.groups_of(labels, 4, 11, torch.Generator().manual_seed(0)))
    # the row of label 0 that is left out is not always the same
    many = experiment.groups_of(labels, 4, 80, torch.Generator().manual_seed(1))
    assert set(many.flatten().tolist()) == set((labels != 1).nonzero()[:, 0].tolist())


def split_of(intents, questions, name):
    texts = [f"{name} {i} of intent{j}" for j in range(intents) for i in range(questions)]
    return TextSplit(texts, torch.arange(intents).repeat_interleave(questions))


@pytest.fixture
def made(monkeypatch):
    """Public sets of twelve intents, made here."""
    bank = Banking77(split_of(12, 10, "train"), split_of(12, 3, "test"), tuple("abcdefghijkl"))
    parts = [split_of(12, n, name) for n, name in ((7, "train"), (5, "validation"), (3, "test"))]
    outside = [[f"{name} outside {i}" for i in range(n)] for n, name in ((9, "train"), (8, "validation"), (4, "test"))]
    clinc = Clinc150(*parts, *outside, tuple("abcdefghijkl"), ("d",) * 12)
    monkeypatch.setattr(experiment, "banking77", lambda: bank)
    monkeypatch.setattr(experiment, "clinc150", lambda: clinc)
    clear()
    yield
    clear()


def clear():
    experiment.questions.cache_clear()
    experiment.corpus.cache_clear()
    experiment.by_letters.cache_clear()


@pytest.mark.usefixtures("made")
def test_banking77_gives_a_fifth_for_validation():
    data = experiment.corpus("BANKING77", "cpu")
    assert torch.bincount(data.split).tolist() == [96, 24, 36]
    assert [data.texts[i] for i in data.rows(1, torch.tensor([2]))] == ["train 4 of intent2", "train 9 of intent2"]
    assert all(data.texts[i].startswith("test") for i in data.rows(2, torch.arange(12)))
    assert data.rows(None, torch.tensor([1, 5])).tolist() == [*range(10, 20), *range(50, 60)]
    assert data.features.equal(text_features(data.texts))


@pytest.mark.usefixtures("made")
def test_clinc150_keeps_its_splits_and_the_outliers_to_test():
    data = experiment.corpus("CLINC150", "cpu")
    assert torch.bincount(data.split).tolist() == [84, 60, 40]
    assert [data.texts[i] for i in data.rows(2, torch.tensor([-1]))] == [f"test outside {i}" for i in range(4)]
    for number, name in enumerate(("train", "validation", "test")):
        assert all(data.texts[i].startswith(name) for i in data.rows(number, torch.arange(12)))


@pytest.mark.usefixtures("made")
def test_the_smallest_scale_cuts_intents_and_questions():
    data = experiment.corpus("CLINC150", "smoke")
    assert data.labels.max() == 9
    assert torch.bincount(data.split).tolist() == [70, 50, 34]


# ---------------------------------------------------------------- losses


def triplets_by_loops(z, target, margin, mining):
    cosine = [[F.cosine_similarity(a, b, dim=0).item() for b in z] for a in z]
    every, per_row = [], []
    for a in range(len(z)):
        own = [cosine[a][b] for b in range(len(z)) if target[b] == target[a] and b != a]
        others = [cosine[a][b] for b in range(len(z)) if target[b] != target[a]]
        every += [max(o - p + margin, 0) for p in own for o in others]
        per_row.append(max(max(others) - min(own) + margin, 0))
    if mining == "hard":
        return sum(per_row) / len(per_row)
    return sum(every) / sum(e > 0 for e in every)


@pytest.mark.parametrize("mining", ["all", "hard"])
@pytest.mark.parametrize("margin", [0.1, 0.5])
def test_triplet_loss_is_the_loops(mining, margin):
    z = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.tensor([0, 1, 1, 2, 0, 2, 2, 1, 0])
    ours = experiment.triplet_loss(z, target, margin=margin, mining=mining)
    assert ours.item() == pytest.approx(triplets_by_loops(z, target.tolist(), margin, mining), abs=1e-12)


@pytest.mark.parametrize("mining", ["all", "hard"])
def test_triplets_in_order_cost_nothing(mining):
    z = torch.eye(3).repeat_interleave(2, 0).requires_grad_()
    loss = experiment.triplet_loss(z, torch.tensor([0, 0, 1, 1, 2, 2]), margin=0.2, mining=mining)
    loss.backward()
    assert loss.item() == 0
    assert z.grad.abs().max() == 0


def test_each_method_has_the_loss_of_its_name():
    cosine, target = torch.tensor([[0.6, 0.1, -0.4]]), torch.tensor([0])

    def by_hand(psi, scale):
        return math.log1p((math.exp(scale * 0.1) + math.exp(scale * -0.4)) / math.exp(scale * psi))

    angle = math.acos(0.6)
    expected = {
        ("softmax", None): by_hand(0.6, 5),
        ("normalised softmax", None): by_hand(0.6, 5),
        ("AM-softmax", 0.2): by_hand(0.4, 5),
        ("ArcFace", 0.2): by_hand(math.cos(angle + 0.2), 5),
        ("min-cos", 2): by_hand(math.cos(2 * angle), 5),
    }
    for (method, margin), value in expected.items():
        loss = experiment.loss_of(method, {"lr": 1.0, "scale": 5.0, "margin": margin})
        assert loss(cosine, target).item() == pytest.approx(value, rel=1e-5), method
    scores = torch.tensor([[6.0, 1.0, -4.0]])  # no cosines
    loss = experiment.loss_of("softmax", {"scale": 0.5})
    assert loss(scores, target).item() == pytest.approx(math.log1p(math.exp(-2.5) + math.exp(-5)), rel=1e-5)
    triplets = experiment.loss_of("triplet", {"mining": "hard", "margin": 0.5})
    assert triplets(torch.tensor([[1.0, 0], [1, 1], [0, 1], [0, 2]]), torch.tensor([0, 0, 1, 1])).item() > 0


def test_a_reader_reads_the_rows_at_the_places():
    features = text_features(["one two three four five", "six", "", "seven eight"])
    encoder = TextEncoder(8, 4).eval()
    reader = experiment.Reader(features, encoder, torch.nn.Identity()).eval()
    places = torch.tensor([[3, 1], [2, 3]])
    assert torch.allclose(reader(places), encoder(features)[places.flatten()], atol=1e-6)


# ---------------------------------------------------------------- search


def found_by_loops(cosine, intent, stored, k):
    hits = 0
    for row, own in zip(cosine.tolist(), intent.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], stored[j] == own))  # strangers first where equal
        hits += any(stored[j] == own for j in order[:k])
    return hits / len(intent)


@pytest.mark.parametrize("levels", [None, 4])
def test_found_is_the_loops(levels):
    generator = torch.Generator().manual_seed(0)
    cosine = 2 * torch.rand(40, 15, generator=generator, dtype=torch.float64) - 1
    if levels:
        cosine = (cosine * levels).round() / levels  # many are equal
    intent, stored = torch.randint(5, (40,), generator=generator), torch.arange(15) % 6
    shares = experiment.found(cosine, intent, stored, (1, 2, 5, 15))
    assert shares == pytest.approx([found_by_loops(cosine, intent, stored, k) for k in (1, 2, 5, 15)])
    assert len(set(shares)) > 2


def test_found_agrees_with_the_package_where_all_search_all():
    generator = torch.Generator().manual_seed(1)
    z, label = torch.randn(30, 3, generator=generator), torch.arange(30) % 7
    cosine = experiment.by_vectors(z)(torch.arange(30), torch.arange(30)).fill_diagonal_(-2)
    theirs = retrieval_accuracy(z, label, k=(1, 5, 10))
    assert experiment.found(cosine, label, label) == pytest.approx([share.item() for share in theirs.values()])


def test_nan_finds_nothing_and_an_intent_without_store_is_no_hit():
    cosine = torch.tensor([[0.9, 0.1], [math.nan, math.nan], [0.9, 0.1]])
    assert experiment.found(cosine, torch.tensor([0, 0, 5]), torch.tensor([0, 1]), (1, 9)) == [1 / 3, 2 / 3]


def test_greatest_cosine_in_blocks():
    z = torch.randn(1300, 5, generator=torch.Generator().manual_seed(2))
    queries, stored = torch.arange(1200), torch.arange(1200, 1300)
    whole = F.normalize(z[:1200], dim=1) @ F.normalize(z[1200:], dim=1).T
    assert torch.allclose(experiment.greatest(experiment.by_vectors(z), queries, stored), whole.amax(1), atol=1e-6)


def test_rejection_by_hand():
    validation = torch.arange(40) / 40  # 5 % are below 0.05
    inside, outside = torch.tensor([0.05, 0.04, 0.9, 0.5]), torch.tensor([0.05, 0.01, 0.0, 0.6, 0.04])
    result = experiment.rejection(validation, inside, outside)
    assert result["in_scope_accepted"] == pytest.approx(3 / 4)
    assert result["oos_accepted"] == pytest.approx(2 / 5)
    pairs = [(i > o) + (i == o) / 2 for i in inside.tolist() for o in outside.tolist()]
    assert result["auroc"] == pytest.approx(sum(pairs) / len(pairs))
    assert (validation >= 0.05).double().mean() == pytest.approx(experiment.ACCEPTED)


@pytest.mark.usefixtures("made")
def test_letter_counts_learn_rarity_from_the_training_split_alone():
    data = experiment.corpus("CLINC150", "cpu")
    everything = torch.arange(len(data.texts))
    cosine = experiment.by_letters("CLINC150", "cpu", 2, 3)(everything, everything)
    assert torch.allclose(cosine.diagonal()[data.labels >= 0], torch.ones(184 - 4), atol=1e-5)
    assert torch.allclose(cosine, cosine.T, atol=1e-6)
    a, b, c = (data.texts.index(text) for text in ("test 1 of intent5", "train 1 of intent5", "train 2 of intent5"))
    assert cosine[a, b] > cosine[a, c]
    unknown = data.texts.index("test outside 0")
    assert cosine[unknown, unknown] == pytest.approx(1, abs=1e-5)
    clear()
    data.texts[a] = "zzz"  # a test question: it must change no other cosine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "corpus", lambda *_: data)
        again = experiment.by_letters("CLINC150", "cpu", 2, 3)(everything, everything)
    rest = everything != a
    assert again[rest][:, rest].equal(cosine[rest][:, rest])


# ---------------------------------------------------------------- runs


def job_of(name, method, settings, final, seed=3):
    return Job(Task(name, (), {}, "top1"), method, settings, seed, final, "smoke")


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("method", METHODS)
def test_a_tuning_run_reads_neither_test_questions_nor_unseen_intents(method):
    data = experiment.corpus("CLINC150", "smoke")
    settings = experiment.grids("smoke")[method][1]
    before = experiment.run(job_of("CLINC150", method, settings, False))
    assert set(before) == {"top1"}
    hidden = experiment.divide(10, 3, 3, 3).unseen
    # rarity may know the texts of the training split, whatever their intents: only the labels are spoilt there
    data.features[data.split == 2] = 1
    data.texts[:] = [t if s < 2 else "spoilt" for t, s in zip(data.texts, data.split.tolist(), strict=True)]
    data.labels[torch.isin(data.labels, hidden)] = int(hidden[0])
    experiment.by_letters.cache_clear()
    assert experiment.run(job_of("CLINC150", method, settings, False)) == before


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("name", ["BANKING77", "CLINC150"])
def test_what_is_learnt_searched_and_refused(name, monkeypatch):
    """With vectors that have nothing to do with the texts, and the sets of questions written out."""
    data = experiment.corpus(name, "smoke")
    z = torch.randn(len(data.texts), 3, generator=torch.Generator().manual_seed(0))
    learnt, asked = [], []

    def fit(job, corpus, intents):
        learnt.append(set(intents.tolist()))

    def predict(model, places):
        asked.append(places)
        return z[places]

    monkeypatch.setattr(experiment, "fit", fit)
    monkeypatch.setattr(experiment, "predict", predict)
    settings = {"lr": 0.1, "scale": 1.0}
    tuned = experiment.run(job_of(name, "softmax", settings, False))
    final = experiment.run(job_of(name, "softmax", settings, True))

    intents = experiment.divide(10, 3, 3, 3)
    seen, unseen, validation = (set(part.tolist()) for part in (intents.seen, intents.unseen, intents.validation))
    assert learnt == [seen - validation, seen]
    rows = {
        (part, kind): [
            i
            for i, (label, split) in enumerate(zip(data.labels.tolist(), data.split.tolist(), strict=True))
            if split == part and label in group
        ]
        for part in range(3)
        for kind, group in (("seen", seen), ("unseen", unseen), ("validation", validation), ("outside", {-1}))
    }
    own = sorted(rows[0, "validation"] + rows[1, "validation"])
    assert asked[0].tolist() == own
    assert tuned["top1"] == retrieval_accuracy(z[own], data.labels[own], k=1)[1].item()

    unit = F.normalize(z, dim=1)
    queries, store = rows[2, "unseen"], rows[0, "unseen"]
    cosine = unit[queries] @ unit[store].T
    for k in (1, 5, 10):
        expected = found_by_loops(cosine, data.labels[queries], data.labels[store].tolist(), k)
        assert final[f"top{k}"] == pytest.approx(expected)
    counted = experiment.by_letters(name, "smoke", 2, 4)(torch.tensor(queries), torch.tensor(store))
    joined = found_by_loops(cosine + counted, data.labels[queries], data.labels[store].tolist(), 1)
    assert final["top1_joined"] == pytest.approx(joined, abs=1e-6)

    def nearest(kind):
        return (unit[rows[kind]] @ unit[rows[0, "seen"]].T).amax(1)

    outliers = nearest((2, "outside") if name == "CLINC150" else (2, "unseen"))
    expected = experiment.rejection(nearest((1, "seen")), nearest((2, "seen")), outliers)
    assert {key: final[key] for key in expected} == pytest.approx(expected)


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize("name", ["BANKING77", "CLINC150"])
@pytest.mark.parametrize("method", METHODS)
def test_a_final_run_returns_every_metric_and_repeats(name, method):
    settings = experiment.grids("smoke")[method][0]
    results = [experiment.run(job_of(name, method, settings, True)) for _ in range(2)]
    assert results[0] == results[1]
    assert results[0].keys() == experiment.METRICS.keys()
    assert all(0 <= value <= 1 for value in results[0].values())
    assert results[0]["top1"] <= results[0]["top5"] <= results[0]["top10"]


@pytest.mark.usefixtures("made")
def test_a_diverged_encoder_has_no_result():
    settings = {"lr": math.inf, "scale": 1.0}
    for final in (True, False):
        with pytest.warns(RuntimeWarning, match="training stopped early"):
            found = experiment.run(job_of("CLINC150", "softmax", settings, final))
        assert all(map(math.isnan, found.values()) if final else [math.isnan(found["top1"])])


@pytest.mark.usefixtures("made")
def test_all_losses_start_from_the_same_encoder_and_see_the_same_groups(monkeypatch):
    seen = []

    def keep(model, loss, data, **_):
        seen.append((model.encoder.pieces.weight.clone(), model.encoder.gru.weight_hh_l0.clone(), *data))

    monkeypatch.setattr(experiment, "train", keep)
    data = experiment.corpus("CLINC150", "smoke")
    intents = torch.tensor([1, 4, 5, 8])
    for method in METHODS[:6]:
        settings = experiment.grids("smoke")[method][0]
        experiment.fit(job_of("CLINC150", method, settings, True), data, intents)
    assert len(seen) == 6
    for found in seen[1:]:
        assert all(a.equal(b) for a, b in zip(found, seen[0], strict=True))
    _, _, places, labels = seen[0]
    assert places.shape == labels.shape == (3 * experiment.GROUPS, experiment.GROUP)
    assert intents[labels].equal(data.labels[places])
    assert (data.split[places] == 0).all()


def test_grids_are_equally_long_and_hold_the_defaults():
    for scale in ("smoke", "cpu", "gpu"):
        assert len({len(grid) for grid in experiment.grids(scale).values()}) == 1
    for scale in ("cpu", "gpu"):
        grids = experiment.grids(scale)
        assert any(s["scale"] == 30 and s["margin"] == 0.35 for s in grids["AM-softmax"])
        assert any(s["margin"] == 0.5 for s in grids["ArcFace"])
        assert any(s["margin"] == 4 for s in grids["min-cos"])
        assert any(s["scale"] == 1 for s in grids["softmax"])
        assert {"shortest": 2, "longest": 4} in grids[experiment.COUNTED]


def test_product_counts_through():
    assert experiment.product(a=(1, 2), b=("x", "y")) == [
        {"a": 1, "b": "x"},
        {"a": 1, "b": "y"},
        {"a": 2, "b": "x"},
        {"a": 2, "b": "y"},
    ]
