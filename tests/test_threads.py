"""Pieces of work on several threads: the same results, errors that are seen, torch left as it was."""

import multiprocessing
import threading
import time

import pytest
import torch

from lossbook._fast._threads import each, numbers, slices
from lossbook.accuracy import exact_loss
from lossbook.emo import emo_ce_loss
from lossbook.focal import asymmetric_loss, sigmoid_focal_loss, soft_truncated_cross_entropy
from lossbook.soft_labels import multilabel_symmetric_kl

CPU = torch.device("cpu")


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_every_piece_is_worked_on_once_with_the_room_of_its_thread():
    done, rooms = [], []
    names = set()

    def begin():
        rooms.append([])
        return rooms[-1]

    def work(piece, room):
        room.append(piece)
        done.append(piece)
        names.add(threading.current_thread().name)
        assert torch.get_num_threads() == 1
        assert not torch.is_grad_enabled()

    each(CPU, range(50), begin, work)
    assert sorted(done) == list(range(50))
    assert len(rooms) == 2
    assert sorted(piece for room in rooms for piece in room) == list(range(50))
    assert all(name.startswith("lossbook") for name in names)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_an_error_is_raised_when_no_thread_works_any_more():
    done = []

    def work(piece, room):
        if piece == 0:
            raise ValueError("the first piece")
        time.sleep(0.02)
        done.append(piece)

    with pytest.raises(ValueError, match="the first piece"):
        each(CPU, range(8), list, work)
    assert sorted(done) == list(range(1, 8))


@pytest.mark.usefixtures("two_threads")
def test_threads_that_come_later_get_torchs_number():
    each(CPU, range(4), list, lambda piece, room: None)
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [2]


@pytest.mark.usefixtures("two_threads")
def test_an_error_in_a_piece_is_raised():
    def work(piece, room):
        if piece == 7:
            raise RuntimeError("piece 7")

    with pytest.raises(RuntimeError, match="piece 7"):
        each(CPU, range(20), list, work)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_piece_and_accelerators_stay_in_the_callers_thread(device, two_threads):
    count, names = (1 if device == "cpu" else 5), []
    each(torch.device(device), range(count), list, lambda piece, room: names.append(threading.current_thread().name))
    assert names == [threading.current_thread().name] * count


def test_slices_cover_all_rows():
    assert slices(torch.device("cuda"), 7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert slices(CPU, 0, 3) == []


def test_each_thread_gets_as_many_pieces(two_threads):
    assert slices(CPU, 90, 30) == [slice(0, 23), slice(23, 46), slice(46, 69), slice(69, 90)]
    assert slices(CPU, 3, 4) == [slice(0, 3)]


def cases():
    torch.manual_seed(0)
    s, t = torch.randn(3600, 120) * 3, torch.rand(3600, 120) < 0.1
    y = torch.arange(3600) % 120
    assert s.numel() > 3 * numbers(CPU)
    yield "focal", lambda s: sigmoid_focal_loss(s, t, reduction="none"), s
    yield "asymmetric", lambda s: asymmetric_loss(s, t), s
    yield "KL", lambda s: multilabel_symmetric_kl(s, 0.5 * s.detach()), s
    yield "truncation", lambda s: soft_truncated_cross_entropy(s, s.detach().roll(1).softmax(-1)), s
    yield "EXACT", lambda s: exact_loss(s, y[:200]), s[:200]
    yield "EMO", lambda s: emo_ce_loss(s, y, torch.randn(120, 8, generator=torch.Generator().manual_seed(1))), s


@pytest.mark.parametrize(("name", "loss", "s"), [pytest.param(*case, id=case[0]) for case in cases()])
def test_the_number_of_threads_does_not_show(name, loss, s):
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x = s.clone().requires_grad_()
        value = loss(x)
        value.sum().backward()
        found.append((value.detach(), x.grad))
    torch.set_num_threads(before)
    for value, grad in found[1:]:
        torch.testing.assert_close(value, found[0][0], rtol=3e-6, atol=1e-9)
        torch.testing.assert_close(grad, found[0][1], rtol=3e-5, atol=1e-9)


def child(queue):
    found = []
    each(CPU, range(6), list, lambda piece, room: found.append(piece))
    queue.put(sorted(found))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("two_threads")
def test_a_forked_process_has_threads_of_its_own():
    each(CPU, range(6), list, lambda piece, room: None)  # the parent's threads are there
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == list(range(6))
    process.join(10)
    assert process.exitcode == 0
