"""Generalized advantage estimation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ._sequences import check_lambda, check_sequences, check_values
from .scan import Scan


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
    r"""Generalized advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 11 and 16).

    .. math::
        \delta_t = r_t + \gamma v'_t - v_t, \qquad
        A_t = \delta_t + \gamma \lambda A_{t+1}, \qquad
        R_t = A^{(\lambda_v)}_t + v_t

    per sequence, from its last step to its first. v'_t is the value of the next step. At the edges:

    - a terminated step: the episode ended. v'_t = 0, and A_{t+1} does not enter.
    - a truncated (and not terminated) step: the episode was cut short, in a state that
      `next_values` rates; the next step belongs to another one. v'_t = next_values_t, and A_{t+1}
      does not enter.
    - the last step of the sequence: A_{t+1} = 0, and v'_t = 0 or the last column of `values`
      [B, T+1].

    A mask needs a convention. In all of them a masked step's reward, value, flags and next_value
    are never looked at (NaN is fine), and its advantage and return are 0.

    - "carry": masked steps do not exist; next value and accumulator skip them. The result is bit
      for bit that of the batch without them; the last column of `values` [B, T+1] follows the last
      live step.
    - "zero": a masked step has reward 0 and value 0, and time passes: gaps discount, and the step
      before a gap is followed by value 0. The last column of `values` [B, T+1] follows step T-1,
      masked or not.
    - "truncate": each sequence ends with its last live step; the last column of `values` [B, T+1]
      follows step T-1 if that is live, and is not used otherwise. Masked steps before the last
      live one are as in "zero".

    Equivalent to, without mask and flags, in float64::

        advantage, next_value = 0, values[:, T] if values.shape[1] > T else 0
        for t in reversed(range(T)):
            delta = rewards[:, t] + gamma * next_value - values[:, t]
            advantages[:, t] = advantage = delta + gamma * lam * advantage
            next_value = values[:, t]
        returns = advantages + values[:, :T]

    Sums run in float64 and are rounded once: fp32 results are within 1 ulp of the float64
    recurrence on the same inputs. The `cpu` backend has one order of sums: a sequence's bits depend
    on its own steps alone, not on the batch, on padding or packing, or on the thread count. Where
    the coefficient gamma * lam is 0, A_{t+1} is not looked at; where gamma is 0, nor is v'_t.

    Differentiable in `rewards`, `values` and `next_values`. PPO uses the results as constants: call
    it under ``torch.no_grad()``, since `clipped_loss` refuses advantages that require grad.

    Args:
        rewards: [B, T], or packed [N] with `cu_seqlens`. fp32, bf16, fp16 or fp64, any strides, as
            all float tensors here.
        values: [B, T] or [N]; or [B, T+1], the last column being the value after step T-1.
        gamma: Discount, in [0, 1].
        lam: In [0, 1]: a number, or a tensor [B] or [S] with one per sequence, a constant.
        mask: As rewards, nonzero = use. Needs `mask_convention`.
        mask_convention: "carry", "zero" or "truncate", above. Given if and only if `mask` is.
        cu_seqlens: [S+1], int32 or int64: sequence s holds the tokens from cu_seqlens[s] up to
            cu_seqlens[s+1]; it may be empty.
        terminated: As rewards, nonzero = the episode ended with this step.
        truncated: As rewards, nonzero = the episode was cut short after this step. Needs
            `next_values`.
        next_values: As rewards: the value of the state after a truncated step; not looked at
            anywhere else.
        value_lam: The lambda of the returns, as `lam`; None: the same.
        backend: See `use_backend`.

    Returns:
        ``GAE(advantages, returns)``, shaped as rewards; fp32, or fp64 if any of rewards, values and
        next_values is.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected; on CPU
            that includes the contents of `cu_seqlens` and of a tensor `lam`.
    """
    check_sequences(rewards, mask, mask_convention, cu_seqlens, terminated, gamma)
    values, bootstrap = check_values(rewards, values, truncated, next_values)
    check_lambda("lam", lam, rewards, cu_seqlens)
    if value_lam is not None:
        check_lambda("value_lam", value_lam, rewards, cu_seqlens)
    return GAE(
        *_SCAN(
            backend,
            rewards,
            values=values,
            next_values=next_values,
            bootstrap=bootstrap,
            mask=mask,
            convention=mask_convention,
            cu_seqlens=cu_seqlens,
            terminated=terminated,
            truncated=truncated,
            gamma=gamma,
            lam=lam,
            value_lam=value_lam,
        )
    )


_SCAN = Scan("gae", "gae")
