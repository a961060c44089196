"""Discounted sums of rewards: the scan of `gae` without values."""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from ._sequences import check_sequences
from .scan import Scan


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float,
    mask: Tensor | None = None,
    mask_convention: str | None = None,
    cu_seqlens: Tensor | None = None,
    terminated: Tensor | None = None,
    bootstrap: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Discounted returns, per sequence from its last step to its first.

    .. math::
        G_t = r_t + \gamma G_{t+1}

    G_{t+1} is 0 after a terminated step, and `bootstrap` (or 0) after the last step of a sequence.
    Masks are as in `gae`: "carry" skips masked steps as if they did not exist, and the bootstrap
    follows the last live step; "zero" gives them reward 0 while time passes; "truncate" ends a
    sequence with its last live step, and uses the bootstrap only where that is its last step.
    Masked returns are 0; masked rewards and flags are never looked at.

    Equivalent to, without mask and flags, in float64::

        following = 0 if bootstrap is None else bootstrap
        for t in reversed(range(T)):
            returns[:, t] = following = rewards[:, t] + gamma * following

    Precision and order of sums are those of `gae`. Differentiable in `rewards` and `bootstrap`.

    Args:
        rewards: [B, T], or packed [N] with `cu_seqlens`. fp32, bf16, fp16 or fp64, any strides.
        gamma: Discount, in [0, 1]. At 0, nothing later is looked at.
        mask: As rewards, nonzero = use. Needs `mask_convention`.
        mask_convention: "carry", "zero" or "truncate". Given if and only if `mask` is.
        cu_seqlens: [S+1], int32 or int64: sequence s holds the tokens from cu_seqlens[s] up to
            cu_seqlens[s+1]; it may be empty.
        terminated: As rewards, nonzero = the episode ended with this step.
        bootstrap: [B] or [S]: the return that follows a sequence's last step.
        backend: See `use_backend`.

    Returns:
        Returns, shaped as rewards; fp32, or fp64 if rewards or bootstrap are.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected; on CPU
            that includes the contents of `cu_seqlens`.
    """
    check_sequences(rewards, mask, mask_convention, cu_seqlens, terminated, gamma)
    if bootstrap is not None:
        sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        _checks.tensor("bootstrap", bootstrap, _checks.FLOATS)
        _checks.shape("bootstrap", bootstrap, (sequences,), "one per sequence")
        _checks.device("bootstrap", bootstrap, rewards, "as rewards")
    return _SCAN(
        backend,
        rewards,
        bootstrap=bootstrap,
        mask=mask,
        convention=mask_convention,
        cu_seqlens=cu_seqlens,
        terminated=terminated,
        gamma=gamma,
        lam=1.0,
    )[1]


_SCAN = Scan("discounted_returns", "returns")
