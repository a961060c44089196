"""torchrl's advantages and returns, by our scans: ``torchrl.patch()``.

Discounts that differ from step to step, and whatever else the scans do not know, are torchrl's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import discounted_returns, vtrace
from ._common import number
from ._patching import Host, Replacement, original

_FUNCTIONAL = "torchrl.objectives.value.functional"


def generalized_advantage_estimate(
    gamma: float,
    lmbda: float,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets."""
    made = _gae(gamma, lmbda, state_value, next_state_value, reward, done, terminated, time_dim)
    return made or original(f"{_FUNCTIONAL}:generalized_advantage_estimate")(
        gamma, lmbda, state_value, next_state_value, reward, done, terminated, time_dim=time_dim
    )


def vec_generalized_advantage_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets."""
    made = _gae(
        gamma,
        lmbda,
        state_value,
        next_state_value,
        reward,
        done,
        terminated,
        time_dim,
        torch.float32,
    )
    return made or original(f"{_FUNCTIONAL}:vec_generalized_advantage_estimate")(
        gamma, lmbda, state_value, next_state_value, reward, done, terminated, time_dim=time_dim
    )


def td_lambda_return_estimate(
    gamma: float,
    lmbda: float,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
) -> Tensor:
    """TD(lambda) returns."""
    made = _td_lambda(
        gamma, lmbda, next_state_value, reward, done, terminated, rolling_gamma, time_dim
    )
    if made is not None:
        return made
    return original(f"{_FUNCTIONAL}:td_lambda_return_estimate")(
        gamma, lmbda, next_state_value, reward, done, terminated, rolling_gamma, time_dim=time_dim
    )


def vec_td_lambda_return_estimate(
    gamma: Any,
    lmbda: Any,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
) -> Tensor:
    """TD(lambda) returns."""
    made = _td_lambda(
        gamma, lmbda, next_state_value, reward, done, terminated, rolling_gamma, time_dim,
        torch.float32,
    )  # fmt: skip
    if made is not None:
        return made
    return original(f"{_FUNCTIONAL}:vec_td_lambda_return_estimate")(
        gamma, lmbda, next_state_value, reward, done, terminated, rolling_gamma, time_dim=time_dim
    )


def vtrace_advantage_estimate(
    gamma: float,
    log_pi: Tensor,
    log_mu: Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rho_thresh: float | Tensor = 1.0,
    c_thresh: float | Tensor = 1.0,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """Advantages and value targets; differentiated, they are torchrl's."""
    made = _vtrace(
        gamma, log_pi, log_mu, state_value, next_state_value, reward, done, terminated, rho_thresh,
        c_thresh, time_dim,
    )  # fmt: skip
    return made or original(f"{_FUNCTIONAL}:vtrace_advantage_estimate")(
        gamma, log_pi, log_mu, state_value, next_state_value, reward, done, terminated, rho_thresh,
        c_thresh, time_dim=time_dim,
    )  # fmt: skip


class _Steps:
    """Trajectories as rows [N, T] in float64, and the way back."""

    def __init__(self, like: Tensor, time_dim: int) -> None:
        self._time_dim = time_dim
        self._moved_shape = like.movedim(time_dim, -1).shape

    def rows(self, x: Tensor) -> Tensor:
        return x.movedim(self._time_dim, -1).reshape(-1, self._moved_shape[-1])

    def wide(self, x: Tensor) -> Tensor:
        return self.rows(x).double()

    def back(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).view(self._moved_shape).movedim(-1, self._time_dim)


def _gae(
    gamma: Any,
    lmbda: Any,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None,
    time_dim: int,
    at_least: torch.dtype | None = None,
) -> tuple[Tensor, Tensor] | None:
    terminated = done if terminated is None else terminated
    discounts = _discounts(gamma, lmbda)
    values = (state_value, next_state_value, reward)
    if discounts is None or not _regular(values, (done, terminated), time_dim):
        return None
    g, lam = discounts
    steps = _Steps(reward, time_dim)
    value = steps.wide(state_value)
    following = torch.where(steps.rows(terminated), 0.0, steps.wide(next_state_value))
    error = steps.wide(reward) + g * following - value
    advantage = _sums(error, steps.rows(done), g * lam)
    dtype = _result_dtype(next_state_value, at_least)
    return steps.back(advantage, dtype), steps.back(advantage + value, dtype)


def _td_lambda(
    gamma: Any,
    lmbda: Any,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None,
    rolling_gamma: bool | None,
    time_dim: int,
    at_least: torch.dtype | None = None,
) -> Tensor | None:
    terminated = done if terminated is None else terminated
    discounts = _discounts(gamma, lmbda)
    regular = _regular((next_state_value, reward), (done, terminated), time_dim)
    if discounts is None or rolling_gamma is False or not regular:
        return None
    g, lam = discounts
    steps = _Steps(reward, time_dim)
    following = torch.where(steps.rows(terminated), 0.0, steps.wide(next_state_value))
    last = steps.rows(done).clone()
    last[:, -1] = True
    # After the last step of a trajectory the value has no returns to share its weight with.
    weight = torch.full_like(following, g * (1 - lam)).masked_fill(last, g)
    returns = _sums(steps.wide(reward) + weight * following, last, g * lam)
    return steps.back(returns, _result_dtype(next_state_value, at_least))


def _vtrace(
    gamma: Any,
    log_pi: Tensor,
    log_mu: Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None,
    rho_thresh: Any,
    c_thresh: Any,
    time_dim: int,
) -> tuple[Tensor, Tensor] | None:
    terminated = done if terminated is None else terminated
    inputs = (log_pi, log_mu, state_value, next_state_value, reward)
    discounts = _discounts(gamma, 1.0)
    rho, c = number(rho_thresh), number(c_thresh)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    if discounts is None or rho is None or c is None or differentiated:
        return None
    if not _regular(inputs, (done, terminated), time_dim):
        return None
    g, steps = discounts[0], _Steps(reward, time_dim)
    value, after, rewards = map(steps.wide, (state_value, next_state_value, reward))
    log_pi, log_mu = steps.wide(log_pi), steps.wide(log_mu)
    ends, ended = steps.rows(done), steps.rows(terminated)
    error = rewards + torch.where(ended, 0.0, g * after) - value
    corrected = vtrace(
        log_pi, log_mu, error, torch.zeros_like(value), gamma=g, rho_clip=rho, c_clip=c,
        terminated=ends,
    ).returns  # fmt: skip
    target = corrected + value
    # torchrl's advantages look at the targets of the next step, its errors at next_state_value.
    following = torch.where(ends, after, torch.cat([target[:, 1:], after[:, -1:]], 1))
    advantage = rewards + torch.where(ended, 0.0, g * following) - value
    advantage = (log_pi - log_mu).exp().clamp(max=rho) * advantage
    dtype = _result_dtype(state_value, torch.float32)
    return steps.back(advantage, dtype), steps.back(target, dtype)


def _result_dtype(like: Tensor, at_least: torch.dtype | None) -> torch.dtype:
    """Torchrl's vectorised forms widen half precision to fp32, its loops do not."""
    return like.dtype if at_least is None else torch.promote_types(like.dtype, at_least)


def _sums(x: Tensor, ends: Tensor, discount: float) -> Tensor:
    return discounted_returns(x, gamma=discount, terminated=ends)


def _discounts(gamma: Any, lmbda: Any) -> tuple[float, float] | None:
    g, lam = number(gamma), number(lmbda)
    if g is None or lam is None or not (0 <= g <= 1 and 0 <= lam <= 1):
        return None
    return g, lam


def _regular(values: tuple[Tensor, ...], flags: tuple[Tensor, ...], time_dim: int) -> bool:
    """One shape with a time dimension of some steps, floats and bools."""
    shape = values[0].shape
    return (
        all(x.shape == shape for x in (*values, *flags))
        and all(x.is_floating_point() for x in values)
        and all(x.dtype == torch.bool for x in flags)
        and values[0].numel() > 0
        and -len(shape) <= time_dim < len(shape)
    )


_SERIES = "sums in float64, rounded once"
HOST = Host(
    "torchrl",
    ["0.14"],
    [
        Replacement(f"{_FUNCTIONAL}:{function.__name__}", function, calls, changes)
        for function, calls, changes in (
            (generalized_advantage_estimate, "discounted_returns", _SERIES),
            (
                vec_generalized_advantage_estimate,
                "discounted_returns",
                f"{_SERIES}; the series is not cut at 1e-7",
            ),
            (td_lambda_return_estimate, "discounted_returns", _SERIES),
            (
                vec_td_lambda_return_estimate,
                "discounted_returns",
                f"{_SERIES}; the series is not cut at 1e-7",
            ),
            (vtrace_advantage_estimate, "vtrace", f"{_SERIES}; differentiated, it is torchrl's"),
        )
    ],
)
patch, unpatch = HOST.patch, HOST.unpatch
