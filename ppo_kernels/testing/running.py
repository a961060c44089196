"""The executors that can run here, and running a case on one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import ppo_kernels

from .. import cpu
from .._op import BACKENDS, OPS, refusal, use_backend
from .case import Case, Inputs


def executors(*functions: str, device: str | None = None) -> list[str]:
    """Every executor that can run these public functions here, on tensors of `device` (None: any).

    The backends, `cpu` once per instruction-set level.
    """
    ops = [op for op in OPS.values() if op.function in functions]
    names = []
    for name in BACKENDS:
        runs_on = device_of(name) if device is None else device
        if all(refusal(op, name, runs_on) is None for op in ops) and _present(runs_on):
            names += [f"cpu:{isa}" for isa in cpu.supported_isas()] if name == "cpu" else [name]
    return names


def device_of(name: str) -> str:
    """The type of the device whose tensors this executor is tested with."""
    devices = BACKENDS[name.partition(":")[0]].devices or ("cpu",)
    return next(filter(_present, devices), devices[0])


def _present(device: str) -> bool:
    return device != "cuda" or torch.cuda.is_available()


@contextmanager
def executor(name: str) -> Iterator[str]:
    """Run the block's calls on this executor; gives the backend's name."""
    backend, _, isa = name.partition(":")
    if not isa:
        with use_backend(backend):
            yield backend
        return
    before = cpu.isa()
    cpu.set_isa(isa)
    try:
        with use_backend(backend):
            yield backend
    finally:
        cpu.set_isa(before)


def flatten(result: Any) -> list[Tensor]:
    """All tensors of a result, in order."""
    if result is None:
        return []
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flatten(part)]


def run(
    case: Case, inputs: Inputs, *, grad: bool = True, call: Callable[..., Any] | None = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of a case, for a fixed pseudo-random upstream gradient, or for 1.

    `call` takes the place of the case's public function.
    """
    inputs = dict(inputs)
    for name in case.grads if grad else ():
        inputs[name] = inputs[name].detach().requires_grad_()
    outputs = flatten((call or getattr(ppo_kernels, case.function))(**inputs))
    live = [t for t in outputs if t.requires_grad]
    if not live or not grad:
        return [t.detach() for t in outputs], {}
    generator = torch.Generator().manual_seed(1)
    upstream = [
        (torch.rand(t.shape, generator=generator, dtype=torch.float64) + 0.5).to(t) for t in live
    ]
    if case.unit_upstream:
        upstream = [torch.ones_like(t) for t in live]
    grads = torch.autograd.grad(live, [inputs[n] for n in case.grads], upstream)
    return [t.detach() for t in outputs], dict(zip(case.grads, grads, strict=True))
