"""The choice of a device and its name."""

import sys

import numpy as np
import pytest
import torch

import lossbook
from lossbook import devices


@pytest.fixture
def machine(monkeypatch):
    """Pretend that this machine has the named accelerators and no override."""
    monkeypatch.delenv("LOSSBOOK_DEVICE", raising=False)

    def pretend(*names):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in names)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in names)

    return pretend


@pytest.mark.parametrize(
    ("has", "chosen"), [(("cuda", "mps"), "cuda"), (("cuda",), "cuda"), (("mps",), "mps"), ((), "cpu")]
)
def test_order_of_preference(machine, has, chosen):
    machine(*has)
    assert devices.best_device() == torch.device(chosen)


@pytest.mark.parametrize("wanted", ["cpu", " cpu "])
def test_override_wins(machine, monkeypatch, wanted):
    machine("cuda")
    monkeypatch.setenv("LOSSBOOK_DEVICE", wanted)
    assert devices.best_device() == torch.device("cpu")


def test_empty_override_is_none(machine, monkeypatch):
    machine("mps")
    monkeypatch.setenv("LOSSBOOK_DEVICE", "")
    assert devices.best_device() == torch.device("mps")


@pytest.mark.parametrize("wanted", ["gpu", "cuda:99", "cpu:x"])
def test_bad_override_says_what_it_got(machine, monkeypatch, wanted):
    machine()
    monkeypatch.setenv("LOSSBOOK_DEVICE", wanted)
    with pytest.raises(ValueError, match=rf"LOSSBOOK_DEVICE must name a device .*'{wanted}'"):
        devices.best_device()


@pytest.mark.parametrize(("threads", "name"), [(1, "CPU, 1 thread"), (2, "CPU, 2 threads")])
def test_cpu_is_described_by_threads(monkeypatch, threads, name):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert devices.describe_device("cpu") == name


def test_best_device_is_described_by_default(monkeypatch):
    monkeypatch.setenv("LOSSBOOK_DEVICE", "cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert devices.describe_device() == "CPU, 3 threads"


def test_accelerators_are_described_by_their_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU at {device}")
    assert devices.describe_device(torch.device("cuda:1")) == "GPU at cuda:1"
    assert devices.describe_device("mps") == "Apple GPU"
    assert devices.describe_device("meta") == "meta"


def test_environment_names_device_and_versions(monkeypatch):
    monkeypatch.setattr(devices, "describe_device", lambda: "CPU, 2 threads")
    python = ".".join(map(str, sys.version_info[:3]))
    assert devices.describe_environment() == (
        f"CPU, 2 threads, lossbook {lossbook.__version__}, torch {torch.__version__}, numpy {np.__version__}, "
        f"Python {python}"
    )
