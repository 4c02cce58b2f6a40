"""The networks of the canvases, of the texts and of the words."""

import subprocess
import sys

import pytest
import torch

from lossbook.models import CanvasNet, TextEncoder, WordModel, text_features
from lossbook.training import seeded


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 2)])
def test_scores_stand_in_the_order_of_the_targets(grid):
    """The score of (cell, digit) depends on that cell alone: change one cell, and its ten scores change."""
    rows, columns = grid
    with seeded(0):
        net = CanvasNet(8)
        images = torch.rand(2, 1, 8 * rows, 8 * columns)
    before = net(images)
    assert before.shape == (2, rows * columns * 10)
    for cell in range(rows * columns):
        r, c = divmod(cell, columns)
        changed = images.clone()
        changed[:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] = 1 - changed[:, :, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8]
        moved = ((net(changed) - before).abs() > 1e-6).any(0).view(rows * columns, 10)
        assert moved[cell].all()
        assert moved.any(1).sum() == 1


def test_ten_scores_of_a_cell_are_those_of_its_digit_alone():
    with seeded(0):
        net = CanvasNet(8)
        cell = torch.rand(1, 1, 8, 8)
    assert torch.allclose(net(cell.repeat(1, 1, 2, 2)).view(4, 10), net(cell).expand(4, 10), atol=1e-6)
    # The order of the ten is that of the last layer's channels.
    with torch.no_grad():
        net.layers[-1].weight.zero_()
        net.layers[-1].bias.copy_(torch.arange(10.0))
    assert net(cell).tolist() == [list(range(10))]


def test_as_many_weights_for_any_canvas():
    assert sum(p.numel() for p in CanvasNet(64).parameters()) == (64 * 64 + 64) + (64 * 10 + 10)


TEXTS = ["Lost my card", "where do i find it??", "", "internationalisation", "I can't pay, it's the 3rd time!", "..."]


@pytest.fixture
def encoder():
    with seeded(0):
        return TextEncoder(16, 8).eval()


def test_features_are_a_word_and_its_letters():
    first = text_features(["Pay, PAY!", "it"])
    assert first.shape == (2, 2, 4)  # <pay>, <pa, pay, ay>
    assert first[0, 0].equal(first[0, 1])
    assert first[1, 1].eq(0).all()  # no second word
    assert (first[1, 0] > 0).sum() == 3  # <it>, <it, it>
    assert first.dtype == torch.int64


def test_features_stay_in_their_buckets():
    features = text_features([f"word{i}" for i in range(300)], buckets=7)
    assert features.unique().tolist() == [0, 1, 2, 3, 4, 5, 6]
    with pytest.raises(ValueError, match="buckets must be at least 2, got 1"):
        text_features(["a"], buckets=1)


def test_no_texts():
    assert text_features([]).shape == (0, 1, 1)


def test_features_are_the_same_in_another_process():
    command = "from lossbook.models import text_features; print(text_features(['forgot my password']).tolist())"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(text_features(["forgot my password"]).tolist())


@pytest.mark.parametrize("texts", [[""], ["?!", ""]])
def test_texts_without_words(texts, encoder):
    features = text_features(texts)
    assert features.shape == (len(texts), 1, 1)
    assert encoder(features).equal(torch.zeros(len(texts), 24))


def test_a_text_has_the_same_vector_alone_and_in_any_batch(encoder):
    together = encoder(text_features(TEXTS))
    assert together.shape == (len(TEXTS), encoder.out_features)
    alone = torch.cat([encoder(text_features([text])) for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-6)
    turned = encoder(text_features(TEXTS).flip(0)).flip(0)
    assert torch.allclose(together, turned, atol=1e-6)
    padded = torch.nn.functional.pad(text_features(TEXTS), (0, 3, 0, 5))
    assert torch.allclose(together, encoder(padded), atol=1e-6)


def test_the_vector_is_that_of_a_loop(encoder):
    (features,) = text_features(["pay the bill"])
    weight = encoder.pieces.weight
    vectors = [weight[[i for i in row if i]].sum(0) / sum(i > 0 for i in row) ** 0.5 for row in features.tolist()]
    states, _ = encoder.gru(torch.stack(vectors).unsqueeze(0))
    expected = torch.cat([torch.stack(vectors).mean(0), 0.3 * states[0].mean(0)])
    assert torch.allclose(encoder(features.unsqueeze(0))[0], expected, atol=1e-6)


def test_the_gru_sees_the_order_and_the_mean_does_not(encoder):
    a, b = encoder(text_features(["dog bites man", "man bites dog"]))
    assert torch.allclose(a[:16], b[:16], atol=1e-6)
    assert (a[16:] - b[16:]).abs().max() > 1e-3
    assert TextEncoder(16, 0).eval()(text_features(TEXTS)).shape == (len(TEXTS), 16)


def test_a_typing_error_moves_a_word_little(encoder):
    right, typo, other = torch.nn.functional.normalize(encoder(text_features(["password", "pasword", "elephant"])))
    assert right @ typo > 0.4 + right @ other


def test_words_are_dropped_in_training_only(encoder):
    features = text_features(["one two three four five six seven"] * 64)
    assert encoder(features).std(0).max() < 1e-6
    encoder.train()
    with seeded(0):
        first = encoder(features)
    assert first.std(0).max() > 1e-3
    with seeded(0):
        assert encoder(features).equal(first)


def test_rare_pieces_start_long():
    features = text_features(["the cat", "the dog", "the owl", "the"])
    with seeded(0):
        plain = TextEncoder(16, 8)
    with seeded(0):
        encoder = TextEncoder(16, 8, features=features)
    ratio = encoder.pieces.weight.detach().norm(dim=1) / plain.pieces.weight.detach().norm(dim=1)
    the, cat = (int(text_features([word])[0, 0, 0]) for word in ("the", "cat"))
    assert (ratio[cat] / ratio[the]).item() == pytest.approx(1 + torch.log(torch.tensor(5 / 2)).item(), rel=1e-4)
    assert encoder.pieces.weight[0].eq(0).all()


def test_gradients_reach_everything(encoder):
    encoder(text_features(TEXTS)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in encoder.parameters())


def test_scores_see_the_words_up_to_here_and_none_after():
    with seeded(0):
        model = WordModel(11, 6)
    words = torch.randint(11, (2, 7), generator=torch.Generator().manual_seed(0))
    before = model(words)
    assert before.shape == (2, 7, 11)
    changed = words.clone()
    changed[0, 3] = (words[0, 3] + 1) % 11
    moved = ((model(changed) - before).abs() > 1e-7).any(-1)
    assert not moved[0, :3].any()
    assert moved[0, 3:].all()
    assert not moved[1].any()


def test_scores_are_states_times_the_input_vectors_plus_bias():
    with seeded(0):
        model = WordModel(11, 6)
        torch.nn.init.normal_(model.bias)
    words = torch.tensor([[1, 2, 3]])
    by_hand = model.hidden(words) @ model.vectors.weight.T + model.bias
    assert torch.allclose(model(words), by_hand, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == 11 * 6 + 11 + 2 * (3 * 6 * 6 + 3 * 6)


def test_dropout_acts_in_training_only():
    with seeded(0):
        model = WordModel(11, 64, dropout=0.5)
    words = torch.tensor([[1, 2, 3]])
    with seeded(1):
        assert (model.hidden(words) == 0).any()  # of the outputs
        assert not torch.allclose(model(words), model(words))
    model.eval()
    assert torch.equal(model(words), model(words))


def test_scores_start_at_size_one():
    with seeded(0):
        scores = WordModel(1500, 64)(torch.randint(1500, (4, 20)))
    assert 0.05 < scores.std().item() < 2
