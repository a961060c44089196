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

CONVENTIONS = ("carry", "zero", "truncate")


def check_sequences(
    rewards: Tensor,
    mask: Tensor | None,
    mask_convention: str | None,
    cu_seqlens: Tensor | None,
    terminated: Tensor | None,
    gamma: float,
) -> None:
    _checks.tensor("rewards", rewards, _checks.FLOATS)
    if cu_seqlens is not None:
        _checks.cu_seqlens(cu_seqlens, rewards, "rewards")
    elif rewards.dim() != 2:
        raise ValueError(
            f"rewards: expected shape [B, T], or [N] with cu_seqlens, got {list(rewards.shape)}"
        )
    _checks.mask(mask, rewards, "rewards")
    if mask is not None and mask_convention is None:
        known = ", ".join(CONVENTIONS)
        raise ValueError(f"mask_convention: expected one of {known} with a mask, got None")
    if mask is None and mask_convention is not None:
        raise ValueError(f"mask_convention: expected None without a mask, got {mask_convention!r}")
    if mask is not None:
        _checks.choice("mask_convention", mask_convention, CONVENTIONS)
    flags("terminated", terminated, rewards)
    _checks.number("gamma", gamma, low=0, high=1)


def flags(name: str, value: Tensor | None, rewards: Tensor) -> None:
    """A flag per step, of any dtype: nonzero = yes."""
    if value is not None:
        _checks.tensor(name, value, _checks.MASKS)
        _checks.shape(name, value, rewards.shape, "as rewards")
        _checks.device(name, value, rewards, "as rewards")


def _reference(
    rewards: Tensor,
    values: Tensor | None,
    next_values: Tensor | None,
    bootstrap: Tensor | None,
    mask: Tensor | None,
    convention: str | None,
    cu_seqlens: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    gamma: float,
    lam: float | Tensor,
    value_lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of all sequences at a time, in float64; traced, the loop over the steps unrolls."""
    dtype = _result_dtype(rewards, values, next_values, bootstrap)
    unpacked = _Unpacked(cu_seqlens, rewards)
    exists = unpacked.exists
    live = exists if mask is None else exists & unpacked.rows(mask != 0)
    visited = live if convention == "carry" else exists

    def numbers(x: Tensor | None) -> Tensor:
        rows = rewards.new_zeros(()) if x is None else unpacked.rows(x)
        return torch.where(live, rows, 0.0).double()

    def said(x: Tensor | None) -> Tensor:
        never = torch.zeros_like(live)
        return never if x is None else live & unpacked.rows(x != 0)

    r, v, after_truncation = numbers(rewards), numbers(values), numbers(next_values)
    ended = live if gamma == 0 else said(terminated)
    cut_short = said(truncated) & ~ended
    cut = ended | cut_short
    next_value = r.new_zeros(r.shape[0]) if bootstrap is None else bootstrap.double()
    if convention == "truncate":
        next_value = torch.where((live & unpacked.last).any(1), next_value, 0.0)

    coefficients = [
        gamma * (x.double() if isinstance(x, Tensor) else r.new_tensor(x)) for x in (lam, value_lam)
    ]
    accumulated = [torch.zeros_like(next_value)] * 2
    steps: list[list[Tensor]] = []
    for t in reversed(range(r.shape[1])):
        following = torch.where(cut_short[:, t], after_truncation[:, t], next_value)
        delta = r[:, t] - v[:, t] + gamma * torch.where(ended[:, t], 0.0, following)
        accumulated = [
            torch.where(
                visited[:, t],
                delta + torch.where(cut[:, t] | (c == 0), 0.0, c * beyond),
                beyond,
            )
            for c, beyond in zip(coefficients, accumulated, strict=True)
        ]
        next_value = torch.where(visited[:, t], v[:, t], next_value)
        steps.append(accumulated)

    if steps:
        advantages, targets = (torch.stack(c[::-1], 1) for c in zip(*steps, strict=True))
    else:
        advantages = targets = r
    advantages, targets = (
        unpacked.tokens(torch.where(live, x, 0.0)).to(dtype) for x in (advantages, targets + v)
    )
    return advantages, targets


class _Unpacked:
    """The sequences as rows: padded ones as they are, packed ones spread over [S, longest]."""

    def __init__(self, cu_seqlens: Tensor | None, like: Tensor) -> None:
        self.packed = cu_seqlens is not None
        if cu_seqlens is None:
            self.exists = torch.ones_like(like, dtype=torch.bool)
            self.last = torch.arange(like.shape[1], device=like.device) == like.shape[1] - 1
            return
        total = like.shape[0]
        offsets = cu_seqlens.long().contiguous()
        lengths = offsets.diff()
        # A graph cannot depend on the data: traced, every sequence might be as long as the batch.
        tracing = torch.compiler.is_compiling()
        longest = total if tracing else max(lengths.tolist(), default=0)
        step = torch.arange(longest, device=like.device)
        self.exists = step < lengths[:, None]
        self.last = step == lengths[:, None] - 1
        self.index = (offsets[:-1, None] + step).clamp(max=total - 1)
        token = torch.arange(total, device=like.device)
        self.sequence = torch.searchsorted(offsets, token, right=True) - 1
        self.step = token - offsets[self.sequence]

    def rows(self, tokens: Tensor) -> Tensor:
        return tokens[self.index] if self.packed else tokens

    def tokens(self, rows: Tensor) -> Tensor:
        return rows[self.sequence, self.step] if self.packed else rows


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


def _result_dtype(*inputs: Tensor | None) -> torch.dtype:
    double = any(t is not None and t.dtype == torch.float64 for t in inputs)
    return torch.float64 if double else torch.float32


def _fake_forward(rewards: Tensor, values: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(rewards, values, *args[:2])
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
            return _reference(
                rewards, values, next_values, bootstrap, mask, convention, cu_seqlens,
                terminated, truncated, gamma, lam, lam if value_lam is None else value_lam,
            )  # fmt: skip
        result: tuple[Tensor, Tensor] = self.forward(
            rewards, values, next_values, bootstrap, mask, terminated, truncated, cu_seqlens,
            lams, value_lams, float(gamma), 0.0 if isinstance(lam, Tensor) else float(lam),
            0.0 if value_lam is None or isinstance(value_lam, Tensor) else float(value_lam),
            convention or "none", 1 if value_lam is None else 2, served_by,
        )  # fmt: skip
        return result
