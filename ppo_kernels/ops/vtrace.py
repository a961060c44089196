"""V-trace: advantages and value targets of steps that another policy took."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._op import Op, count
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..native import scan as native
from ..triton import kernel as triton
from ._sequences import Steps, check_lambda, check_sequences, check_tokens, check_values


class VTrace(NamedTuple):
    """Advantages, and the returns that the values are trained on."""

    advantages: Tensor
    returns: Tensor


def vtrace(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    lam: float | Tensor = 1.0,
    rho_clip: float | None = 1.0,
    c_clip: float = 1.0,
    pg_rho_clip: float | None = 1.0,
    mask: Tensor | None = None,
    mask_convention: str | None = None,
    cu_seqlens: Tensor | None = None,
    terminated: Tensor | None = None,
    truncated: Tensor | None = None,
    next_values: Tensor | None = None,
    backend: str | None = None,
) -> VTrace:
    r"""V-trace (Espeholt et al. 2018, arXiv:1802.01561, section 4 and remark 2).

    .. math::
        w_t = e^{\mathrm{logprobs}_t - \mathrm{rollout\_logprobs}_t}, \qquad
        \delta_t = \min(\bar\rho, w_t) (r_t + \gamma v'_t - v_t)

        x_t = \delta_t + \gamma \lambda \min(\bar c, w_t) x_{t+1}, \qquad
        R_t = v_t + x_t, \qquad
        A_t = \min(\bar\rho_{pg}, w_t) (r_t + \gamma (v'_t + x_{t+1}) - v_t)

    per sequence, from its last step to its first: the returns R_t are the paper's v_t, and
    v'_t + x_{t+1} is the return that follows. v'_t is the value of the next step. At the edges:

    - a terminated step: the episode ended. v'_t = 0, and x_{t+1} does not enter.
    - a truncated (and not terminated) step: the episode was cut short, in a state that
      `next_values` rates; the next step belongs to another one. v'_t = next_values_t, and x_{t+1}
      does not enter.
    - the last step of the sequence: x_{t+1} = 0, and v'_t = 0 or the last column of `values`
      [B, T+1].

    Masks are as in `gae`, which says what "carry", "zero" and "truncate" do; a masked step that
    counts as zeros has the ratio w_t = 1. Nothing of a masked step is looked at, and its advantage
    and return are 0.

    Equivalent to, without mask and flags, in float64::

        ratio = (logprobs - rollout_logprobs).exp()
        x, next_value = 0, values[:, T] if values.shape[1] > T else 0
        for t in reversed(range(T)):
            td_error = rewards[:, t] + gamma * next_value - values[:, t]
            advantages[:, t] = ratio[:, t].clamp(max=pg_rho_clip) * (td_error + gamma * x)
            x = ratio[:, t].clamp(max=rho_clip) * td_error \
                + gamma * lam * ratio[:, t].clamp(max=c_clip) * x
            returns[:, t] = x + values[:, t]
            next_value = values[:, t]

    Where the policies agree and no threshold is below 1, the returns are those of `gae` with the
    same `lam`, and with lam = 1 so are the advantages.

    Precision and order of sums are those of `gae`, the ratio included: all in float64, rounded
    once.

    The results are constants, as in the paper: no gradient flows through them, whatever requires
    grad. In a loss, multiply the advantages by the log-probabilities of the policy.

    Args:
        logprobs: As rewards: log-probabilities of the actions under the policy that is trained.
        rollout_logprobs: As rewards: those under the policy that took the actions.
        rewards: [B, T], or packed [N] with `cu_seqlens`. fp32, bf16, fp16 or fp64, any strides, as
            all float tensors here.
        values: [B, T] or [N]; or [B, T+1], the last column being the value after step T-1.
        gamma: Discount, in [0, 1].
        lam: In [0, 1]: a number, or a tensor [B] or [S] with one per sequence, a constant.
        rho_clip: Threshold of the ratio in the temporal differences: it decides which policy the
            values belong to. None: not clipped.
        c_clip: Threshold of the ratio in the coefficient by which later steps enter.
        pg_rho_clip: Threshold of the ratio in the advantages. None: not clipped.
        mask: As rewards, nonzero = use. Needs `mask_convention`.
        mask_convention: "carry", "zero" or "truncate". Given if and only if `mask` is.
        cu_seqlens: [S+1], int32 or int64: sequence s holds the tokens from cu_seqlens[s] up to
            cu_seqlens[s+1]; it may be empty.
        terminated: As rewards, nonzero = the episode ended with this step.
        truncated: As rewards, nonzero = the episode was cut short after this step. Needs
            `next_values`.
        next_values: As rewards: the value of the state after a truncated step; not looked at
            anywhere else.
        backend: See `use_backend`.

    Returns:
        ``VTrace(advantages, returns)``, shaped as rewards; fp32, or fp64 if any of the numbers per
        step is.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected; on CPU
            that includes the contents of `cu_seqlens` and of a tensor `lam`.
    """
    check_sequences(rewards, mask, mask_convention, cu_seqlens, terminated, gamma)
    check_tokens("logprobs", logprobs, rewards)
    check_tokens("rollout_logprobs", rollout_logprobs, rewards)
    values, bootstrap = check_values(rewards, values, truncated, next_values)
    check_lambda("lam", lam, rewards, cu_seqlens)
    clips = (
        _threshold("rho_clip", rho_clip),
        _checked("c_clip", c_clip),
        _threshold("pg_rho_clip", pg_rho_clip),
    )
    lams = lam if isinstance(lam, Tensor) else None
    served_by = _OP.resolve(rewards.device, backend)
    with torch.no_grad():
        if served_by != "torch":
            result = _OP(
                logprobs, rollout_logprobs, rewards, values, next_values, bootstrap, mask,
                terminated, truncated, cu_seqlens, lams, float(gamma),
                0.0 if isinstance(lam, Tensor) else float(lam), *clips, mask_convention or "none",
                served_by,
            )  # fmt: skip
            return VTrace(*result)
        count("vtrace", "torch")
        if not torch.compiler.is_compiling() and rewards.device.type == "cpu":
            native.check_contents(rewards, cu_seqlens, lams, None)
        steps = Steps(
            rewards, values, next_values, bootstrap, mask, mask_convention, cu_seqlens, terminated,
            truncated, gamma,
        )  # fmt: skip
        dtype = _checks.compute_dtype(logprobs, rollout_logprobs, rewards, values, next_values)
        return _reference(steps, logprobs, rollout_logprobs, gamma, lam, *clips, dtype)


def _threshold(name: str, clip: float | None) -> float:
    return math.inf if clip is None else _checked(name, clip)


def _checked(name: str, clip: float) -> float:
    _checks.number(name, clip, low=0)
    return float(clip)


def _reference(
    steps: Steps,
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    gamma: float,
    lam: float | Tensor,
    rho_clip: float,
    c_clip: float,
    pg_rho_clip: float,
    dtype: torch.dtype,
) -> VTrace:
    """One step of all sequences at a time, in float64; traced, the loop over the steps unrolls."""
    ratio = (steps.numbers(logprobs) - steps.numbers(rollout_logprobs)).exp()
    trace = gamma * (lam.double()[:, None] if isinstance(lam, Tensor) else lam)
    coefficient = trace * ratio.clamp(max=c_clip)
    rho, pg_rho = ratio.clamp(max=rho_clip), ratio.clamp(max=pg_rho_clip)
    x = steps.nothing
    advantages: list[Tensor] = []
    corrections: list[Tensor] = []
    for t, td_error in steps.backwards:
        c, beyond = coefficient[:, t], torch.where(steps.cut[:, t], 0.0, x)
        advantages.append(pg_rho[:, t] * (td_error + gamma * beyond))
        new = rho[:, t] * td_error + torch.where(c == 0, 0.0, c * beyond)
        x = torch.where(steps.visited[:, t], new, x)
        corrections.append(x)
    return VTrace(
        steps.tokens(advantages, 0.0, dtype), steps.tokens(corrections, steps.values, dtype)
    )


def _fake(
    logprobs: Tensor, rollout_logprobs: Tensor, rewards: Tensor, values: Tensor,
    next_values: Tensor | None, *args: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dtype = _checks.compute_dtype(logprobs, rollout_logprobs, rewards, values, next_values)
    shape = rewards.shape
    return rewards.new_empty(shape, dtype=dtype), rewards.new_empty(shape, dtype=dtype)


_OP = Op(
    "vtrace",
    "(Tensor logprobs, Tensor rollout_logprobs, Tensor rewards, Tensor values, "
    "Tensor? next_values, Tensor? bootstrap, Tensor? mask, Tensor? terminated, Tensor? truncated, "
    "Tensor? cu_seqlens, Tensor? lams, float gamma, float lam, float rho_clip, float c_clip, "
    "float pg_rho_clip, str convention) -> (Tensor, Tensor)",
    function="vtrace",
    fake=_fake,
    cpu=cpu(native.vtrace),
    triton=triton("scan", "vtrace"),
    cuda=cuda(native.vtrace),
)
