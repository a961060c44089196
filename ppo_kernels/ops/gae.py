"""Generalized advantage estimation, and the scan that discounted returns share with it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._op import Op, count, forbid_double_backward
from ..cpu import scan as cpu

CONVENTIONS = ("carry", "zero", "truncate")


class GAE(NamedTuple):
    """Advantages, and the returns that the values are trained on."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    lam: float | Tensor,
    mask: Tensor | None = None,
    mask_convention: str | None = None,
    cu_seqlens: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    next_values: Tensor | None = None,
    value_lam: float | Tensor | None = None,
    backend: str | None = None,
) -> GAE:
    r"""Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, equations 11 and 16).

    .. math::
        \delta_t = r_t + \gamma v'_t - v_t, \qquad
        A_t = \delta_t + \gamma \lambda A_{t+1}, \qquad
        R_t = A^{(\lambda_v)}_t + v_t

    per sequence, from its last step to its first. v'_t is the value of the next step. At the edges:

    - terminated step: v'_t = 0, and A_{t+1} does not enter. The episode ended; nothing follows.
    - truncated step (and not terminated): v'_t = next_values_t, and A_{t+1} does not enter. The episode was cut short, in
      a state that `next_values` rates; the next step belongs to another episode.
    - last step of the sequence: A_{t+1} = 0 and v'_t = 0, or the last column of `values` [B, T+1].

    A mask needs a convention. In all of them a masked step's rewards, values, flags and next_values are never looked at
    (NaN is fine), and its advantage and return are 0:

    - "carry": masked steps do not exist; next value and accumulator skip them. The result is bit for bit that of the batch
      without them; v'_t at the last live step is the last column of `values` [B, T+1].
    - "zero": a masked step has reward 0 and value 0, and time passes: gaps discount, and a step before a gap is followed by
      value 0. The last column of `values` [B, T+1] follows step T-1, masked or not.
    - "truncate": each sequence ends with its last live step; where that is not its last step, nothing follows it and the
      last column of `values` [B, T+1] is not used. Masked steps before it are as in "zero".

    Equivalent to, without mask and flags, in float64::

        advantage, next_value = 0, values[:, T] if values.shape[1] > T else 0
        for t in reversed(range(T)):
            delta = rewards[:, t] + gamma * next_value - values[:, t]
            advantages[:, t] = advantage = delta + gamma * lam * advantage
            next_value = values[:, t]
        returns = advantages + values[:, :T]

    The sums run in float64 and are rounded once, so fp32 results are within 1 ulp of the float64 recurrence on the same
    inputs. The `cpu` backend uses a fixed order of sums: a sequence's bits depend on its own steps alone, not on the batch,
    on padding or packing, or on the thread count. Where a coefficient gamma * lam is 0, A_{t+1} is not looked at; where gamma
    is 0, v'_t is not.

    Differentiable in `rewards`, `values` and `next_values`. PPO uses the results as constants: call it under
    ``torch.no_grad()`` or detach, since `clipped_loss` refuses advantages that require grad.

    Args:
        rewards: [B, T], or packed [N] with `cu_seqlens`. fp32, bf16, fp16 or fp64, any strides, as all float tensors here.
        values: [B, T] or [N]; or [B, T+1], the last column being the value after step T-1.
        gamma: Discount, in [0, 1].
        lam: In [0, 1]: a number, or a tensor [B] or [S] with one per sequence, a constant.
        mask: As rewards, nonzero = use. Needs `mask_convention`.
        mask_convention: "carry", "zero" or "truncate", above. Given if and only if `mask` is.
        cu_seqlens: [S+1], int32 or int64: sequence s holds the tokens cu_seqlens[s] to cu_seqlens[s+1]; it may be empty.
        terminated: As rewards, nonzero = the episode ended with this step.
        truncated: As rewards, nonzero = the episode was cut short after this step. Needs `next_values`.
        next_values: As rewards: the value of the state after a truncated step. Looked at nowhere else.
        value_lam: The lambda of the returns, as `lam`; None: the same.
        backend: See `use_backend`.

    Returns:
        ``GAE(advantages, returns)``, shaped as rewards, fp32 (fp64 if any of rewards, values and next_values is).

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected; on CPU that includes the contents
            of `cu_seqlens` and of a tensor `lam`.
    """
    _checks.tensor("values", values, _checks.FLOATS)
    check_sequences(rewards, mask, mask_convention, cu_seqlens, terminated, gamma)
    bootstrap = None
    if values.dim() == 2 and rewards.dim() == 2 and values.shape[1] == rewards.shape[1] + 1:
        values, bootstrap = values[:, :-1], values[:, -1]
    elif values.shape != rewards.shape:
        shape = list(rewards.shape)
        longer = f" or [{shape[0]}, {shape[1] + 1}]" if len(shape) == 2 else ""
        raise ValueError(
            f"values: expected shape {shape}{longer} (rewards), got {list(values.shape)}"
        )
    _checks.device("values", values, rewards, "as rewards")
    if (truncated is None) != (next_values is None):
        given, missing = ("truncated", "next_values")[:: 1 if next_values is None else -1]
        raise ValueError(f"{missing}: expected together with {given}, got None")
    if truncated is not None and next_values is not None:
        _flags("truncated", truncated, rewards)
        _checks.tensor("next_values", next_values, _checks.FLOATS)
        _checks.shape("next_values", next_values, rewards.shape, "as rewards")
        _checks.device("next_values", next_values, rewards, "as rewards")
    sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _lambda("lam", lam, rewards, sequences)
    if value_lam is not None:
        _lambda("value_lam", value_lam, rewards, sequences)
    return scan(
        "gae", backend, rewards, values, next_values, bootstrap, mask, mask_convention,
        cu_seqlens, terminated, truncated, gamma, lam, value_lam,
    )  # fmt: skip


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
    _flags("terminated", terminated, rewards)
    _checks.number("gamma", gamma, low=0, high=1)


def _flags(name: str, value: Tensor | None, rewards: Tensor) -> None:
    if value is not None:
        _checks.tensor(name, value)
        _checks.shape(name, value, rewards.shape, "as rewards")
        _checks.device(name, value, rewards, "as rewards")


def _lambda(name: str, value: float | Tensor, rewards: Tensor, sequences: int) -> None:
    if not isinstance(value, Tensor):
        _checks.number(name, value, low=0, high=1)
        return
    _checks.tensor(name, value, _checks.FLOATS)
    _checks.shape(name, value, (sequences,), "one per sequence")
    _checks.device(name, value, rewards, "as rewards")
    _checks.constant(name, value)


def scan(
    public_name: str,
    backend: str | None,
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
    value_lam: float | Tensor | None,
) -> GAE:
    """Advantages and returns of checked arguments; values None counts as zeros, and gives no advantages."""
    lams = lam if isinstance(lam, Tensor) else None
    value_lams = value_lam if isinstance(value_lam, Tensor) else None
    served_by = _FORWARD.resolve(rewards.device, backend)
    if served_by == "torch":
        count(public_name, "torch")
        if not torch.compiler.is_compiling() and rewards.device.type == "cpu":
            cpu.check_contents(rewards, cu_seqlens, lams, value_lams)
        return _reference(
            rewards, values, next_values, bootstrap, mask, convention, cu_seqlens,
            terminated, truncated, gamma, lam, lam if value_lam is None else value_lam,
        )  # fmt: skip
    number = float(lam) if lams is None else 0.0
    value_number = float(value_lam) if value_lam is not None and value_lams is None else 0.0
    result = _FORWARD(
        rewards, values, next_values, bootstrap, mask, terminated, truncated, cu_seqlens,
        lams, value_lams, float(gamma), number, value_number, convention or "none",
        1 if value_lam is None else 2, values is not None, served_by,
    )  # fmt: skip
    return GAE(*result)


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
) -> GAE:
    """One step of all sequences at a time, in float64. Under torch.compile the loop over the steps is unrolled."""
    dtype = _result_dtype(rewards, values, next_values, bootstrap)
    unpacked = _Unpacked(cu_seqlens, rewards)
    exists = unpacked.exists
    live = exists if mask is None else exists & unpacked.rows(mask != 0)
    visited = live if convention == "carry" else exists

    def numbers(x: Tensor | None) -> Tensor:
        rows = rewards.new_zeros(()) if x is None else unpacked.rows(x)
        return torch.where(live, rows, 0.0).double()

    def flags(x: Tensor | None) -> Tensor:
        never = torch.zeros_like(live)
        return never if x is None else live & unpacked.rows(x != 0)

    r, v, after_truncation = numbers(rewards), numbers(values), numbers(next_values)
    ended = live if gamma == 0 else flags(terminated)
    cut_short = flags(truncated) & ~ended
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

    advantages, targets = (
        torch.stack(column[::-1], 1) for column in zip(*steps, strict=True)
    ) if steps else (r, r)
    return GAE(
        *(
            unpacked.tokens(torch.where(live, x, 0.0)).to(dtype)
            for x in (advantages, targets + v)
        )
    )


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


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rewards: Tensor,
        values: Tensor | None,
        next_values: Tensor | None,
        bootstrap: Tensor | None,
        *args: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args[:6])
        ctx.settings, ctx.backend = args[6:-2], args[-1]
        ctx.public_name = "gae" if args[-2] else "discounted_returns"
        inputs = (rewards, values, next_values, bootstrap)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs]
        advantages, returns = _FORWARD.below(*inputs, *args)
        if not args[-2]:
            ctx.mark_non_differentiable(advantages)
        return advantages, returns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_double_backward(ctx.public_name)
        constants = (None,) * 13
        if grads[0] is None and grads[1] is None:
            return (None, None, None, None, *constants)
        needs = list(ctx.needs_input_grad[:4])
        results = _BACKWARD(*grads, *ctx.saved_tensors, *ctx.settings, needs, ctx.backend)
        gradients = (
            result.to(dtype) if needed else None
            for needed, result, dtype in zip(needs, results, ctx.dtypes, strict=True)
        )
        return (*gradients, *constants)


def _autograd(*args: Any) -> tuple[Tensor, ...]:
    inputs = args[:4]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _Scan.apply(*args)
    return _FORWARD.below(*args)


def _result_dtype(*inputs: Tensor | None) -> torch.dtype:
    double = any(t is not None and t.dtype == torch.float64 for t in inputs)
    return torch.float64 if double else torch.float32


def _fake_forward(rewards: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = _result_dtype(rewards, *args[:3])
    shape, with_advantages = rewards.shape, args[-1]
    return (
        rewards.new_empty(shape if with_advantages else (0,), dtype=dtype),
        rewards.new_empty(shape, dtype=dtype),
    )


def _fake_backward(
    grad_advantages: Tensor | None, grad_returns: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    grad = grad_advantages if grad_advantages is not None else grad_returns
    assert grad is not None
    cu_seqlens, needs = args[3], args[-1]
    sequences = grad.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shapes = (grad.shape, grad.shape, grad.shape, (sequences,))
    return tuple(
        grad.new_empty(shape if needed else (0,))
        for needed, shape in zip(needs, shapes, strict=True)
    )


_SETTING = (
    "Tensor? mask, Tensor? terminated, Tensor? truncated, Tensor? cu_seqlens, Tensor? lams, "
    "Tensor? value_lams, float gamma, float lam, float value_lam, str convention, int chains"
)
_FORWARD = Op(
    "scan_forward",
    "(Tensor rewards, Tensor? values, Tensor? next_values, Tensor? bootstrap, "
    f"{_SETTING}, bool with_advantages) -> (Tensor, Tensor)",
    fake=_fake_forward,
    autograd=_autograd,
    cpu=cpu.scan_forward,
)
_BACKWARD = Op(
    "scan_backward",
    f"(Tensor? grad_advantages, Tensor? grad_returns, {_SETTING}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    cpu=cpu.scan_backward,
)
