"""Per-token rewards from sequence scores and a KL penalty."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._op import Op, count, forbid_double_backward
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..native import kl as native
from ..triton import kernel as triton
from . import kl


class ShapedRewards(NamedTuple):
    """Rewards of the tokens, and the KL estimates they were made with."""

    rewards: Tensor
    kl: Tensor


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    kl_coef: float | Tensor,
    estimator: str = "k1",
    log_ratio_clamp: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> ShapedRewards:
    r"""A KL penalty on every token and each sequence's score on its last live token.

    .. math::
        r_t = -\beta\, \mathrm{KL}_t + [\, t \text{ is the last live token of } b \,]\; s_b

    The reward of RLHF: Ziegler et al. 2019, arXiv:1909.08593, section 2; Ouyang et al. 2022,
    arXiv:2203.02155. As a reward, k1 is the estimator whose policy gradient is that of the KL (see
    `kl_penalty`, which also states the other estimators).

    Equivalent to, for padded inputs::

        kl = kl_penalty(logprobs, ref_logprobs, mask, estimator=estimator)
        rewards = -kl_coef * kl
        last = torch.where(mask != 0, torch.arange(T), -1).amax(1)
        for b in range(B):
            if last[b] >= 0:
                rewards[b, last[b]] += scores[b]

    Args:
        scores: [B], or [S] with `cu_seqlens`, fp32, bf16, fp16 or fp64. Differentiable.
        logprobs: [B, T], or packed [N] with `cu_seqlens`, any strides, fp32, bf16, fp16 or fp64: of
            the sampled tokens under the policy that sampled them. Differentiable.
        ref_logprobs: As logprobs, of any of these dtypes; a constant.
        mask: As logprobs, nonzero = use. What lies under the mask has no effect, NaN included.
        kl_coef: beta, finite and at least 0: a number, or a scalar tensor (an adaptive controller's
            state); a constant.
        estimator: k1, k2, k3 or abs; see `kl_penalty`.
        log_ratio_clamp: As in `kl_penalty`.
        cu_seqlens: int32 or int64 [S + 1], the offsets of packed sequences: from 0, not decreasing,
            to N.
        backend: See `use_backend`.

    Returns:
        ``ShapedRewards(rewards, kl)``, each in logprobs' shape, fp32 (fp64 if an input is); masked
        tokens give 0 in both. A sequence without a live token (or of length 0) has nowhere to put
        its score: it is dropped, with a zero gradient.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected; on CPU
            that includes the contents of `cu_seqlens` and of a `kl_coef` tensor.
    """
    kl.check_inputs(logprobs, ref_logprobs, mask, estimator, log_ratio_clamp)
    if cu_seqlens is not None:
        _checks.cu_seqlens(cu_seqlens, logprobs, "logprobs")
        sequences, like = cu_seqlens.shape[0] - 1, "one per packed sequence"
    elif logprobs.dim() == 2:
        sequences, like = logprobs.shape[0], "one per row of logprobs"
    else:
        raise ValueError(
            f"logprobs: expected shape [B, T], or [N] with cu_seqlens, got {list(logprobs.shape)}"
        )
    _checks.tensor("scores", scores, _checks.FLOATS)
    _checks.shape("scores", scores, (sequences,), like)
    _checks.device("scores", scores, logprobs, "as logprobs")
    if isinstance(kl_coef, Tensor):
        _checks.tensor("kl_coef", kl_coef, _checks.FLOATS)
        _checks.shape("kl_coef", kl_coef, (), "a number or a scalar tensor")
        _checks.constant("kl_coef", kl_coef)
    else:
        _checks.number("kl_coef", kl_coef, low=0)
    clamp = math.inf if log_ratio_clamp is None else float(log_ratio_clamp)

    served_by = _FORWARD.resolve(logprobs.device, backend)
    if served_by == "torch":
        count("shape_rewards", "torch")
        return _reference(
            scores, logprobs, ref_logprobs, mask, cu_seqlens, kl_coef, estimator, clamp
        )
    in_tensor = isinstance(kl_coef, Tensor)
    rewards, estimates, _ = _FORWARD(
        scores, logprobs, ref_logprobs, mask, cu_seqlens, kl_coef if in_tensor else None,
        0.0 if in_tensor else float(kl_coef), estimator, clamp, served_by,
    )  # fmt: skip
    return ShapedRewards(rewards, estimates)


def _reference(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coef: float | Tensor,
    estimator: str,
    clamp: float,
) -> ShapedRewards:
    if not torch.compiler.is_compiling() and logprobs.device.type != "meta":
        if isinstance(kl_coef, Tensor):
            _checks.number("kl_coef", kl_coef.item(), low=0)
        if cu_seqlens is not None:
            _checks.cu_seqlens_contents(cu_seqlens, logprobs.shape[0])
    dtype = _checks.compute_dtype(scores, logprobs, ref_logprobs)
    estimates = kl.reference(logprobs.to(dtype), ref_logprobs, mask, estimator, estimator, clamp)
    # One slot more than there are tokens takes the scores that have nowhere to go.
    rewards = torch.cat([(-kl_coef * estimates).flatten(), estimates.new_zeros(1)])
    last = _last_live(logprobs, mask, cu_seqlens)
    slot = torch.where(last < 0, logprobs.numel(), last)
    rewards = rewards.index_add(0, slot, scores.to(dtype))[:-1].view(logprobs.shape)
    return ShapedRewards(rewards, estimates)


def _last_live(logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Flat position of each sequence's last live token, or -1."""
    position = torch.arange(logprobs.numel(), device=logprobs.device)
    if cu_seqlens is None:
        row = torch.arange(logprobs.shape[0], device=logprobs.device)
        sequence, sequences = row[:, None].expand(logprobs.shape).flatten(), logprobs.shape[0]
    else:
        sequence = torch.searchsorted(cu_seqlens.long(), position, right=True) - 1
        sequences = cu_seqlens.shape[0] - 1
    if mask is not None:
        position = torch.where(mask.flatten() != 0, position, -1)
    last = torch.full((sequences,), -1, device=logprobs.device)
    return last.scatter_reduce(0, sequence, position, "amax")


class _ShapeRewards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        scores, logprobs, ref_logprobs, mask, _, kl_coefs, ctx.kl_coef, *ctx.settings = args
        ctx.set_materialize_grads(False)
        rewards, estimates, last = _FORWARD.below(*args)
        ctx.save_for_backward(logprobs, ref_logprobs, mask, kl_coefs, last)
        ctx.scores_dtype = scores.dtype
        ctx.mark_non_differentiable(last)
        return rewards, estimates, last

    @staticmethod
    def backward(
        ctx: Any, grad_rewards: Tensor | None, grad_kl: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        forbid_double_backward("shape_rewards")
        logprobs, ref_logprobs, mask, kl_coefs, last = ctx.saved_tensors
        grad_scores = grad_logprobs = upstream = None
        if grad_rewards is not None:
            upstream = grad_rewards * -(ctx.kl_coef if kl_coefs is None else kl_coefs)
            if ctx.needs_input_grad[0]:
                grad_scores = _gather(grad_rewards, last).to(ctx.scores_dtype)
        if grad_kl is not None:
            upstream = grad_kl if upstream is None else upstream + grad_kl
        if upstream is not None and ctx.needs_input_grad[1]:
            grad_logprobs = kl.BACKWARD(upstream, logprobs, ref_logprobs, mask, *ctx.settings)
        return (grad_scores, grad_logprobs, *(None,) * 8)


def _gather(grad: Tensor, last: Tensor) -> Tensor:
    """The gradient at each sequence's last live token, 0 where there is none."""
    if grad.numel() == 0:
        return grad.new_zeros(last.shape)
    return torch.where(last < 0, 0.0, grad.flatten()[last])


def _autograd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and (args[0].requires_grad or args[1].requires_grad):
        return _ShapeRewards.apply(*args)
    return _FORWARD.below(*args)


def _fake(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _checks.compute_dtype(scores, logprobs, ref_logprobs)
    return (
        logprobs.new_empty(logprobs.shape, dtype=dtype),
        logprobs.new_empty(logprobs.shape, dtype=dtype),
        scores.new_empty(scores.shape, dtype=torch.int64),
    )


_FORWARD = Op(
    "shape_rewards",
    "(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor? mask, Tensor? cu_seqlens, "
    "Tensor? kl_coefs, float kl_coef, str estimator, float log_ratio_clamp) "
    "-> (Tensor, Tensor, Tensor)",
    function="shape_rewards",
    fake=_fake,
    autograd=_autograd,
    cpu=cpu(native.shape_rewards),
    cuda=cuda(native.shape_rewards),
    triton=triton("kl", "shape_rewards"),
)
