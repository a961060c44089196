"""The scan behind `gae` and `discounted_returns`: reference, autograd.Function, ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._op import Op, count, forbid_double_backward
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..native import scan as native
from ..triton import kernel as triton
from ._sequences import Steps


def _reference(
    steps: Steps, gamma: float, lam: float | Tensor, value_lam: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """One step of all sequences at a time, in float64; traced, the loop over the steps unrolls."""
    coefficients = [
        gamma * (x.double() if isinstance(x, Tensor) else steps.values.new_tensor(x))
        for x in (lam, value_lam)
    ]
    accumulated = [steps.nothing] * 2
    advantages: list[Tensor] = []
    targets: list[Tensor] = []
    for t, delta in steps.backwards:
        accumulated = [
            torch.where(
                steps.visited[:, t],
                delta + torch.where(steps.cut[:, t] | (c == 0), 0.0, c * beyond),
                beyond,
            )
            for c, beyond in zip(coefficients, accumulated, strict=True)
        ]
        advantages.append(accumulated[0])
        targets.append(accumulated[1])
    return steps.tokens(advantages, 0.0, dtype), steps.tokens(targets, steps.values, dtype)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scan: Scan,
        rewards: Tensor,
        values: Tensor | None,
        next_values: Tensor | None,
        bootstrap: Tensor | None,
        *args: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:6])
        ctx.scan, ctx.settings, ctx.backend = scan, args[6:-1], args[-1]
        inputs = (rewards, values, next_values, bootstrap)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        advantages, returns = scan.forward.below(*inputs, *args)
        if values is None:
            ctx.mark_non_differentiable(advantages)
        return advantages, returns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_double_backward(ctx.scan.function)
        constants = (None,) * 12
        if grads[0] is None and grads[1] is None:
            return (None,) * 5 + constants
        needs = list(ctx.needs_input_grad[1:5])
        results = ctx.scan.backward(*grads, *ctx.saved_tensors, *ctx.settings, needs, ctx.backend)
        gradients = (
            result.to(dtype) if needed else None
            for needed, result, dtype in zip(needs, results, ctx.dtypes, strict=True)
        )
        return (None, *gradients, *constants)


def _fake_forward(rewards: Tensor, values: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = _checks.compute_dtype(rewards, values, *args[:2])
    returns = rewards.new_empty(rewards.shape, dtype=dtype)
    return rewards.new_empty(0 if values is None else rewards.shape, dtype=dtype), returns


def _fake_backward(
    grad_advantages: Tensor | None, grad_returns: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    grad = grad_advantages if grad_advantages is not None else grad_returns
    assert grad is not None
    cu_seqlens, needs = args[3], args[-1]
    sequences = grad.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shapes = (*[grad.shape] * 3, (sequences,))
    return tuple(
        grad.new_empty(shape if needed else (0,))
        for needed, shape in zip(needs, shapes, strict=True)
    )


_SETTING = (
    "Tensor? mask, Tensor? terminated, Tensor? truncated, Tensor? cu_seqlens, Tensor? lams, "
    "Tensor? value_lams, float gamma, float lam, float value_lam, str convention, int chains"
)


class Scan:
    """The ops of one public function: both functions run the same kernels."""

    def __init__(self, function: str, name: str) -> None:
        self.function = function
        self.forward = Op(
            f"{name}_forward",
            "(Tensor rewards, Tensor? values, Tensor? next_values, Tensor? bootstrap, "
            f"{_SETTING}) -> (Tensor, Tensor)",
            function=function,
            fake=_fake_forward,
            autograd=self._autograd,
            cpu=cpu(native.scan_forward),
            triton=triton("scan", "scan_forward"),
            cuda=cuda(native.scan_forward),
        )
        self.backward = Op(
            f"{name}_backward",
            f"(Tensor? grad_advantages, Tensor? grad_returns, {_SETTING}, bool[] needs) "
            "-> (Tensor, Tensor, Tensor, Tensor)",
            function=function,
            fake=_fake_backward,
            cpu=cpu(native.scan_backward),
            triton=triton("scan", "scan_backward"),
            cuda=cuda(native.scan_backward),
        )

    def _autograd(self, *args: Any) -> tuple[Tensor, ...]:
        live = any(t is not None and t.requires_grad for t in args[:4])
        if torch.is_grad_enabled() and live:
            return _Function.apply(self, *args)
        return self.forward.below(*args)

    def __call__(
        self,
        backend: str | None,
        rewards: Tensor,
        *,
        gamma: float,
        lam: float | Tensor,
        values: Tensor | None = None,
        next_values: Tensor | None = None,
        bootstrap: Tensor | None = None,
        mask: Tensor | None = None,
        convention: str | None = None,
        cu_seqlens: Tensor | None = None,
        terminated: Tensor | None = None,
        truncated: Tensor | None = None,
        value_lam: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Advantages and returns; values None counts as zeros."""
        lams = lam if isinstance(lam, Tensor) else None
        value_lams = value_lam if isinstance(value_lam, Tensor) else None
        served_by = self.forward.resolve(rewards.device, backend)
        if served_by == "torch":
            count(self.function, "torch")
            if not torch.compiler.is_compiling() and rewards.device.type == "cpu":
                native.check_contents(rewards, cu_seqlens, lams, value_lams)
            steps = Steps(
                rewards, values, next_values, bootstrap, mask, convention, cu_seqlens, terminated,
                truncated, gamma,
            )  # fmt: skip
            dtype = _checks.compute_dtype(rewards, values, next_values, bootstrap)
            return _reference(steps, gamma, lam, lam if value_lam is None else value_lam, dtype)
        result: tuple[Tensor, Tensor] = self.forward(
            rewards, values, next_values, bootstrap, mask, terminated, truncated, cu_seqlens,
            lams, value_lams, float(gamma), 0.0 if isinstance(lam, Tensor) else float(lam),
            0.0 if value_lam is None or isinstance(value_lam, Tensor) else float(value_lam),
            convention or "none", 1 if value_lam is None else 2, served_by,
        )  # fmt: skip
        return result
