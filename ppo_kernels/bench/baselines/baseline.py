"""Something to compare with, and where it comes from."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...testing import Inputs

Function = Callable[..., Any]


class UnavailableError(Exception):
    """Why a baseline cannot run here."""


@dataclass(frozen=True)
class Baseline:
    """Something to compare with.

    Attributes:
        load: From a device, the function to call. Raises UnavailableError with the reason.
        shorten: For a loop over the steps: the first `n` steps of the arguments.
    """

    load: Callable[[torch.device], Function]
    shorten: Callable[[Inputs, int], Inputs] | None = None


def torch_and_inductor(function: Function) -> dict[str, Baseline]:
    def compiled(device: torch.device) -> Function:
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return {"eager": Baseline(lambda device: function), "compile": Baseline(compiled)}


def imported(module: str, name: str) -> Function:
    package = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        reason = "is not installed" if missing == package else f"needs {missing}, not installed"
        raise UnavailableError(f"{package} {reason}") from error
    except Exception as error:
        raise UnavailableError(f"{module}.{name}: {type(error).__name__}: {error}") from error


def peer(module: str, name: str, adapt: Callable[[Function], Function]) -> Baseline:
    """A function of a public package, if that is installed."""
    return Baseline(lambda device: adapt(imported(module, name)))
