"""scan_forward, scan_backward and vtrace."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _checks
from . import Native, rows, rows_cols


def scan_forward(
    native: Native,
    rewards: Tensor,
    values: Tensor | None,
    next_values: Tensor | None,
    bootstrap: Tensor | None,
    *setting: Any,
) -> tuple[Tensor, Tensor]:
    dtype = _checks.compute_dtype(rewards, values, next_values, bootstrap)
    returns = native.empty(rewards.shape, dtype)
    advantages = native.empty((0,) if values is None else rewards.shape, dtype)
    fault = native.module.scan_forward(
        rows(rewards), rows(values), rows(next_values), rows(bootstrap),
        _setting(rewards, *setting),
        None if values is None else rows(advantages), rows(returns), native.target(),
    )  # fmt: skip
    if fault is not None:
        check_contents(rewards, *setting[3:6])
    return advantages, returns


def scan_backward(
    native: Native, grad_advantages: Tensor | None, grad_returns: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    *setting, needs = args
    grad = grad_advantages if grad_advantages is not None else grad_returns
    assert grad is not None
    sequences = _sequences(grad, setting[3])
    results = tuple(
        native.empty(shape if needed else (0,), grad.dtype)
        for needed, shape in zip(needs, (grad.shape,) * 3 + ((sequences,),), strict=True)
    )
    to_rewards, to_values, to_next_values, to_bootstrap = (
        rows(t) if needed else None for needed, t in zip(needs, results, strict=True)
    )
    native.module.scan_backward(
        rows(grad_advantages), rows(grad_returns), _setting(grad, *setting),
        to_rewards, to_values, to_next_values, to_bootstrap, native.target(),
    )  # fmt: skip
    return results


def vtrace(
    native: Native,
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor | None,
    bootstrap: Tensor | None,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    cu_seqlens: Tensor | None,
    lams: Tensor | None,
    gamma: float,
    lam: float,
    rho_clip: float,
    c_clip: float,
    pg_rho_clip: float,
    convention: str,
) -> tuple[Tensor, Tensor]:
    dtype = _checks.compute_dtype(logprobs, rollout_logprobs, rewards, values, next_values)
    advantages, returns = (native.empty(rewards.shape, dtype) for _ in range(2))
    setting = _setting(
        rewards, mask, terminated, truncated, cu_seqlens, lams, None, gamma, lam, 0.0, convention, 1
    )
    fault = native.module.vtrace(
        rows(logprobs), rows(rollout_logprobs), rho_clip, c_clip, pg_rho_clip,
        rows(rewards), rows(values), rows(next_values), rows(bootstrap), setting,
        rows(advantages), rows(returns), native.target(),
    )  # fmt: skip
    if fault is not None:
        check_contents(rewards, cu_seqlens, lams, None)
    return advantages, returns


def check_contents(
    rewards: Tensor, cu_seqlens: Tensor | None, lams: Tensor | None, value_lams: Tensor | None
) -> None:
    """Raise what only the data can tell."""
    if cu_seqlens is not None:
        _checks.cu_seqlens_contents(cu_seqlens, rewards.shape[0])
    if lams is not None:
        _checks.fractions("lam", lams)
    if value_lams is not None:
        _checks.fractions("value_lam", value_lams)


def _sequences(like: Tensor, cu_seqlens: Tensor | None) -> int:
    return like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _setting(
    like: Tensor,
    mask: Tensor | None,
    terminated: Tensor | None,
    truncated: Tensor | None,
    cu_seqlens: Tensor | None,
    lams: Tensor | None,
    value_lams: Tensor | None,
    gamma: float,
    lam: float,
    value_lam: float,
    convention: str,
    chains: int,
) -> tuple[Any, ...]:
    return (
        rows(mask), rows(terminated), rows(truncated), rows(cu_seqlens), rows(lams),
        rows(value_lams), *rows_cols(like), _sequences(like, cu_seqlens),
        int(convention == "carry"), int(convention == "truncate"), gamma, lam, value_lam, chains,
    )  # fmt: skip
