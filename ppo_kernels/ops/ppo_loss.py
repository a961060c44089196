"""PPO's loss from logits or hidden states: log-probabilities, loss and gradient at once."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._op import Op, count, forbid_double_backward
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..metrics import POLICY_STATS, PolicyMetrics
from ..native import ppo_loss as native
from ..triton import kernel as triton
from . import _aggregation, _hidden, _objective, _policy, logprob, logprob_hidden
from ._objective import Objective


class PPOLoss(NamedTuple):
    """A fused loss and what was measured on the way; only `loss` is differentiable."""

    loss: Tensor
    metrics: PolicyMetrics
    logprobs: Tensor
    entropies: Tensor | None
    policy_loss: Tensor
    entropy: Tensor | None
    kl: Tensor | None


def ppo_loss_from_logits(
    logits: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    variant: str = "clip",
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    log_ratio_clamp: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    entropy: bool = False,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str | None = None,
    loss_scale: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    inplace: bool = False,
    backend: str | None = None,
) -> PPOLoss:
    r"""PPO's loss of the tokens that rows of logits predict; forward makes the gradient too.

    .. math::
        L = L_{policy}(\log p, \ldots)
            + \beta \sum_t w_t\, \mathrm{kl}(\log p_t, \log p^{ref}_t) - \alpha \sum_t w_t H_t

    with log p and H of `logprobs_from_logits`, L_policy and its weights w of `clipped_loss`, kl of
    `kl_penalty`, alpha = `entropy_coef` and beta = `kl_coef`. Nothing is kept for backward but the
    gradient, which may take the place of the logits.

    Equivalent to::

        logprobs, entropies = logprobs_from_logits(logits, tokens, mask=mask, entropy=True)
        loss, metrics = clipped_loss(logprobs, old_logprobs, advantages, mask)
        loss = loss + kl_coef * masked_mean(kl_penalty(logprobs, ref_logprobs, mask), mask)
        loss = loss - entropy_coef * masked_mean(entropies, mask)

    Args:
        logits: [B, T, V] or packed [N, V], fp32, bf16, fp16 or fp64, any strides.
        tokens: [B, T] or [N], int32 or int64 ids in [0, V). Positions equal to `ignore_index` are
            masked.
        old_logprobs: As tokens, of the policy that made the samples; a constant.
        advantages: As tokens, or one per sequence; a constant.
        mask: As tokens, nonzero = use. What lies under it is never looked at.
        clip_low: See `clipped_loss`.
        clip_high: See `clipped_loss`.
        dual_clip: See `clipped_loss`.
        variant: See `clipped_loss`; not clip-cov or kl-cov, which pick tokens by all of them.
        aggregation: See `clipped_loss`; of the entropy and the KL too.
        denominator: See `clipped_loss`; of the entropy and the KL too.
        norm_length: See `clipped_loss`.
        cu_seqlens: See `clipped_loss`.
        log_ratio_clamp: As in `clipped_loss`, and for the ratio to the reference too.
        tau_pos: See `clipped_loss`.
        tau_neg: See `clipped_loss`.
        entropy: Measure the entropy; implied by `entropy_coef`.
        entropy_coef: The weight of the entropy bonus, at least 0.
        ref_logprobs: As old_logprobs, of a reference policy; None for no KL.
        kl_coef: The weight of the KL, at least 0; with 0 it is measured only.
        kl_estimator: `estimator` of `kl_penalty`.
        kl_gradient: `gradient` of `kl_penalty`.
        loss_scale: A 0-d tensor that the loss is multiplied with before its gradient is rounded to
            half precision. Scaling the result instead would round twice, the first time perhaps to
            zero.
        temperature: See `logprobs_from_logits`.
        softcap: See `logprobs_from_logits`.
        logit_scale: See `logprobs_from_logits`.
        ignore_index: See `logprobs_from_logits`.
        inplace: Overwrite the logits with their gradient, in this call, saving a [tokens, vocab]
            tensor. Whoever needs their values in backward then raises. Under torch.compile a
            warning is given and the gradient is a new tensor.
        backend: See `use_backend`.

    Returns:
        ``PPOLoss(loss, metrics, logprobs, entropies, policy_loss, entropy, kl)``; all but `loss`
        are constant: `PolicyMetrics`, the log-probabilities and entropies of
        `logprobs_from_logits`, and the three terms of the loss without coefficients and scale, each
        aggregated by the same weights. Entropies and KL are None unless asked for. The gradient of
        the logits has their dtype. It is kept until backward, which multiplies it, in place, with
        the upstream gradient (another rounding unless that is 1 or, in range, a power of two); a
        second backward then raises.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected; on CPU
            that includes labels out of range at live positions.
    """
    logprob.check(logits, tokens)
    logprob.check_transform(tokens, mask, softcap, logit_scale, ignore_index)
    temperatures, scalar = logprob.split_temperature(temperature, tokens)
    policy = _policy.policy(
        variant, clip_low, clip_high, dual_clip, log_ratio_clamp, tau_pos, tau_neg
    )
    o = _objective.check(
        _checks.compute_dtype(logits), tokens, ignore_index,
        old_logprobs, advantages, mask, policy=policy,
        aggregation=aggregation, denominator=denominator, norm_length=norm_length,
        cu_seqlens=cu_seqlens, entropy=entropy, entropy_coef=entropy_coef,
        ref_logprobs=ref_logprobs, kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_gradient=kl_gradient, loss_scale=loss_scale,
    )  # fmt: skip
    served_by = _FROM_LOGITS.resolve(logits.device, backend)
    if served_by == "torch":
        count("ppo_loss_from_logits", "torch")
        logprobs, entropies = logprob.reference(
            logits, tokens, o.frame.mask, scalar if temperatures is None else temperatures,
            softcap, logit_scale, ignore_index, o.entropy,
        )  # fmt: skip
        return _result(o, *_objective.reference(logprobs, entropies, o), logprobs, entropies)
    needs_gradient = torch.is_grad_enabled() and logits.requires_grad
    result = _FROM_LOGITS(
        logits, tokens, temperatures, scalar, softcap or 0.0, float(logit_scale), inplace,
        *_objective.arguments(o)[:-1], needs_gradient, served_by,
    )  # fmt: skip
    return _result(o, *result[:5])


def ppo_loss_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
    variant: str = "clip",
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    log_ratio_clamp: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    entropy: bool = False,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_gradient: str | None = None,
    loss_scale: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> PPOLoss:
    r"""`ppo_loss_from_logits` of ``hidden @ weight.T + bias``, a few rows of logits at a time.

    The logits of a chunk of rows are made, turned into log-probabilities, loss and gradient,
    multiplied into the gradients of `hidden` and `weight`, and forgotten: 6 T H V floating-point
    operations, as many as with all logits in memory. Where a token's loss depends on its whole
    sequence the logits are made a second time, 8 T H V.

    Equivalent to::

        logits = F.linear(hidden.float(), weight.float(), bias)[..., :vocab_size]
        ppo_loss_from_logits(logits, tokens, old_logprobs, advantages, mask, ...)

    Args:
        hidden: See `logprobs_from_hidden`.
        weight: See `logprobs_from_hidden`.
        tokens: See `ppo_loss_from_logits`.
        old_logprobs: See `ppo_loss_from_logits`.
        advantages: See `ppo_loss_from_logits`.
        mask: See `ppo_loss_from_logits`.
        bias: See `logprobs_from_hidden`.
        clip_low: See `ppo_loss_from_logits`.
        clip_high: See `ppo_loss_from_logits`.
        dual_clip: See `ppo_loss_from_logits`.
        variant: See `ppo_loss_from_logits`.
        aggregation: See `ppo_loss_from_logits`.
        denominator: See `ppo_loss_from_logits`.
        norm_length: See `ppo_loss_from_logits`.
        cu_seqlens: See `ppo_loss_from_logits`.
        log_ratio_clamp: See `ppo_loss_from_logits`.
        tau_pos: See `ppo_loss_from_logits`.
        tau_neg: See `ppo_loss_from_logits`.
        entropy: See `ppo_loss_from_logits`.
        entropy_coef: See `ppo_loss_from_logits`.
        ref_logprobs: See `ppo_loss_from_logits`.
        kl_coef: See `ppo_loss_from_logits`.
        kl_estimator: See `ppo_loss_from_logits`.
        kl_gradient: See `ppo_loss_from_logits`.
        loss_scale: See `ppo_loss_from_logits`.
        temperature: See `ppo_loss_from_logits`.
        softcap: See `ppo_loss_from_logits`.
        logit_scale: See `ppo_loss_from_logits`.
        ignore_index: See `ppo_loss_from_logits`.
        vocab_size: See `logprobs_from_hidden`.
        chunk: See `logprobs_from_hidden`.
        backend: See `use_backend`.

    Returns:
        As `ppo_loss_from_logits`. The gradients of hidden, weight and bias have their dtypes; they
        are summed in fp32, and rounded once if the upstream gradient is 1.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected; on CPU
            that includes labels out of range at live positions.
    """
    hidden, weight = _hidden.autocast(hidden, weight)
    vocab = logprob_hidden.check(hidden, weight, tokens, bias, vocab_size, chunk)
    logprob.check_transform(tokens, mask, softcap, logit_scale, ignore_index)
    temperatures, scalar = logprob.split_temperature(temperature, tokens)
    policy = _policy.policy(
        variant, clip_low, clip_high, dual_clip, log_ratio_clamp, tau_pos, tau_neg
    )
    o = _objective.check(
        _checks.compute_dtype(hidden), tokens, ignore_index,
        old_logprobs, advantages, mask, policy=policy,
        aggregation=aggregation, denominator=denominator, norm_length=norm_length,
        cu_seqlens=cu_seqlens, entropy=entropy, entropy_coef=entropy_coef,
        ref_logprobs=ref_logprobs, kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_gradient=kl_gradient, loss_scale=loss_scale,
    )  # fmt: skip
    served_by = _FROM_HIDDEN.resolve(hidden.device, backend)
    if served_by == "torch":
        count("ppo_loss_from_hidden", "torch")
        logprobs, entropies = logprob_hidden.reference(
            hidden, weight[:vocab], bias if bias is None else bias[:vocab], tokens, o.frame.mask,
            scalar if temperatures is None else temperatures, softcap, logit_scale, ignore_index,
            o.entropy,
        )  # fmt: skip
        return _result(o, *_objective.reference(logprobs, entropies, o), logprobs, entropies)
    leaves = (hidden, weight, bias)
    recorded = torch.is_grad_enabled()
    needs = [recorded and t is not None and t.requires_grad for t in leaves]
    result = _FROM_HIDDEN(
        *leaves, tokens, temperatures, scalar, softcap or 0.0, float(logit_scale), vocab, chunk,
        needs, *_objective.arguments(o), served_by,
    )  # fmt: skip
    return _result(o, *result[:5])


def _result(
    o: Objective, loss: Tensor, stats: Tensor, terms: Tensor, logprobs: Tensor, entropies: Tensor
) -> PPOLoss:
    policy, entropy, divergence = terms.detach().unbind()
    return PPOLoss(
        loss,
        PolicyMetrics(stats),
        logprobs.detach(),
        entropies.detach() if o.entropy else None,
        policy,
        entropy if o.entropy else None,
        None if o.ref_logprobs is None else divergence,
    )


class _PPOLoss(torch.autograd.Function):
    """Forward has made the gradients of the first inputs: the results behind the first five."""

    @staticmethod
    def forward(ctx: Any, op: Op, *args: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # zeros as large as the logits
        loss, *rest = op.below(*args)
        gradients = rest[4:]
        if not gradients:  # written into the logits, which the schema says and the counter must
            torch.autograd.graph.increment_version(args[0])
            gradients = [args[0].detach()]
        ctx.save_for_backward(*gradients)
        ctx.function, ctx.backend, ctx.arguments = op.function, args[-1], len(args)
        ctx.mark_non_differentiable(*rest)
        return loss, *rest

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward(ctx.function)
        if upstream is None:
            return (None,) * (1 + ctx.arguments)
        gradients = ctx.saved_tensors
        if not _aggregation.is_one(upstream):
            gradients = [_scaled(g, upstream, ctx.backend) for g in gradients]
        needs = ctx.needs_input_grad[1:]
        gradients = [g if need else None for g, need in zip(gradients, needs, strict=False)]
        return (None, *gradients, *(None,) * (ctx.arguments - len(gradients)))


def _scaled(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    if not _is_plain(gradient):
        return _aggregation.scaled(gradient, upstream, gradient.dtype, backend)
    if not gradient.is_contiguous():
        return gradient.mul_(upstream)
    if gradient.numel():
        _aggregation.SCALE_INPLACE(gradient, upstream, backend)
        # A second backward finds that what was saved has changed.
        torch.autograd.graph.increment_version(gradient)
    return gradient


def _autograd_from_logits(*args: Any) -> tuple[Tensor, ...]:
    logits, inplace = args[0], args[6]
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return _FROM_LOGITS.below(*args)
    if not inplace:
        return _PPOLoss.apply(_FROM_LOGITS, *args)
    if not _is_plain(logits):
        warnings.warn(
            "ppo_loss_from_logits: inplace=True has no effect under torch.compile; the gradient is "
            "a new tensor",
            stacklevel=2,
        )
        return _PPOLoss.apply(_FROM_LOGITS, *args)
    if logits.is_leaf:
        raise ValueError(
            "inplace: expected logits computed from parameters, got a leaf tensor, which would "
            "lose its values"
        )
    return _PPOLoss.apply(_FROM_LOGITS_INPLACE, *args)


def _is_plain(t: Tensor) -> bool:
    """Not what stands for a tensor while a graph is traced."""
    return type(t) in (Tensor, torch.nn.Parameter)


def _autograd_from_hidden(*args: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:3]):
        return _PPOLoss.apply(_FROM_HIDDEN, *args)
    return _FROM_HIDDEN.below(*args)


def _fake(live: Tensor, tokens: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dtype, entropy = _checks.compute_dtype(live), Objective.of(args).entropy
    return (
        live.new_empty((), dtype=dtype),
        live.new_empty(len(POLICY_STATS), dtype=torch.float64),
        live.new_empty(3, dtype=dtype),
        live.new_empty(tokens.shape, dtype=dtype),
        live.new_empty(tokens.shape if entropy else (0,), dtype=dtype),
    )


def _fake_from_logits(logits: Tensor, tokens: Tensor, *args: Any) -> tuple[Tensor, ...]:
    shape = logits.shape if args[-1] else (0,)
    return *_fake(logits, tokens, *args), logits.new_empty(shape)


def _fake_from_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    gradients = _hidden.fake_gradients(hidden, weight, bias, args[6])
    return *_fake(hidden, tokens, *args), *gradients


_LOGITS_SCHEMA = (
    "(Tensor{} logits, Tensor tokens, Tensor? temperatures, float temperature, float softcap, "
    "float logit_scale, bool inplace, "
    + _objective.SCHEMA
    + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor{})"
)
_FROM_LOGITS = Op(
    "ppo_loss_from_logits",
    _LOGITS_SCHEMA.format("", ", Tensor"),
    function="ppo_loss_from_logits",
    fake=_fake_from_logits,
    autograd=_autograd_from_logits,
    cpu=cpu(native.ppo_loss_from_logits),
    cuda=cuda(native.ppo_loss_from_logits),
    triton=triton("ppo_loss", "ppo_loss_from_logits"),
)
_FROM_LOGITS_INPLACE = Op(
    "ppo_loss_from_logits_",
    _LOGITS_SCHEMA.format("(a!)", ""),
    function="ppo_loss_from_logits",
    fake=_fake,
    cpu=cpu(native.ppo_loss_from_logits_),
    cuda=cuda(native.ppo_loss_from_logits_),
    triton=triton("ppo_loss", "ppo_loss_from_logits_"),
)
_FROM_HIDDEN = Op(
    "ppo_loss_from_hidden",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? temperatures, "
    "float temperature, float softcap, float logit_scale, int vocab, int? chunk, bool[] needs, "
    + _objective.SCHEMA
    + ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    function="ppo_loss_from_hidden",
    fake=_fake_from_hidden,
    autograd=_autograd_from_hidden,
    cpu=cpu(native.ppo_loss_from_hidden),
    cuda=cuda(native.ppo_loss_from_hidden),
    triton=triton("ppo_loss", "ppo_loss_from_hidden"),
)
