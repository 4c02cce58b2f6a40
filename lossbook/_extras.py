"""Optional packages: imported where they are needed, named by their extra where they are missing. Private."""

from __future__ import annotations

import importlib
from typing import Any


def require(module: str, extra: str) -> Any:
    """The imported ``module``, or an error that says which extra installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = {"sklearn": "scikit-learn"}.get(module.partition(".")[0], module.partition(".")[0])
        raise ModuleNotFoundError(
            f'this needs the package {package}; install it with: pip install "lossbook[{extra}]"', name=error.name
        ) from error
