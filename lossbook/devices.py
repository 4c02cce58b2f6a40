"""Which device to compute on, and what to call it."""

from __future__ import annotations

import os
import platform

import numpy as np
import torch

import lossbook

OVERRIDE = "LOSSBOOK_DEVICE"  # the environment variable that overrides the choice


def best_device() -> torch.device:
    """The device to compute on: ``cuda``, else ``mps``, else ``cpu``.

    The environment variable ``LOSSBOOK_DEVICE`` overrides the choice, for example ``cpu`` or ``cuda:1``.

    Raises:
        ValueError: ``LOSSBOOK_DEVICE`` names no device, or one that is not available here.
    """
    wanted = os.environ.get(OVERRIDE, "").strip()
    if not wanted:
        kinds = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
        return torch.device(kinds[0])
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)  # an absent device is only noticed when it is used
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{OVERRIDE} must name a device that is available here, got {wanted!r}: {reason}") from error
    return device


def describe_device(device: torch.device | str | None = None) -> str:
    """A name for readers, such as ``NVIDIA H200``, ``Apple GPU`` or ``CPU, 2 threads``.

    Args:
        device: The device, :func:`best_device` if None.
    """
    device = best_device() if device is None else torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    if device.type == "cpu":
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    return str(device)


def describe_environment() -> str:
    """One line for the head of a notebook: the device and the versions that decide its outputs."""
    versions = {
        "lossbook": lossbook.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "Python": platform.python_version(),
    }
    return ", ".join([describe_device(), *(f"{name} {version}" for name, version in versions.items())])
