"""A case: one way of calling one public function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Case:
    """One way of calling one public function.

    Attributes:
        function: Its public name.
        label: What is particular about this call.
        inputs: Makes the arguments from a generator; floating-point tensors in float64.
        forward: The ops a compiled backend runs.
        backward: The ops it runs for the gradient; empty where nothing is differentiated.
        grads: The arguments that receive a gradient.
        scale: From float64 inputs, the condition scale of each output (by position) and gradient
            (by argument name); what it leaves out is judged against the largest magnitude in the
            exact result.
    """

    function: str
    label: str
    inputs: Callable[[torch.Generator], Inputs]
    forward: tuple[str, ...]
    backward: tuple[str, ...] = ()
    grads: tuple[str, ...] = ()
    scale: Callable[[Inputs], Mapping[int | str, Tensor | float]] = lambda inputs: {}
    unit_upstream: bool = False

    @property
    def id(self) -> str:
        return f"{self.function}-{self.label}".replace(" ", "_")
