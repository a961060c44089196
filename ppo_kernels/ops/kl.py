"""Per-token estimates of the KL divergence from a reference policy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._op import Op, count, forbid_double_backward
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..native import kl as native
from ..triton import kernel as triton

ESTIMATORS = native.ESTIMATORS


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    estimator: str = "k1",
    gradient: str | None = None,
    log_ratio_clamp: float | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""KL(policy || reference) of each token, estimated from the sampled token alone.

    With d = log p - log p_ref of a token sampled from p (Schulman 2020, "Approximating KL
    Divergence", http://joschu.net/blog/kl-approx.html):

    ======  ===================  ==========================  ===========================
    name    value                as an estimate of the KL    expected gradient as a loss
    ======  ===================  ==========================  ===========================
    k1      d                    unbiased, may be negative   0: no effect but noise
    k2      d^2 / 2              biased, low variance        that of KL(p || p_ref)
    k3      exp(-d) - 1 + d      unbiased, never negative    that of KL(p_ref || p)
    abs     abs(d)               biased, above k1            that of sum abs(p - p_ref)
    ======  ===================  ==========================  ===========================

    The last column holds on policy and per token: an unbiased value has, in general, no unbiased
    gradient (Tang & Munos 2025, arXiv:2506.09477; Liu et al. 2025, arXiv:2510.01555). Hence
    `gradient`: backward differentiates the estimator it names while forward reports `estimator`.
    k3 with the gradient of k2 reports an unbiased estimate and descends the KL that is meant.

    Equivalent to::

        d = (logprobs - ref_logprobs).clamp(-log_ratio_clamp, log_ratio_clamp)
        kl = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d, "abs": d.abs()}[estimator]
        kl = torch.where(mask != 0, kl, 0)

    but k3 keeps its relative accuracy where d is near 0 and the terms above cancel.

    Args:
        logprobs: Any shape and strides, fp32, bf16, fp16 or fp64. Differentiable.
        ref_logprobs: As logprobs, of any of these dtypes; a constant.
        mask: As logprobs, nonzero = use. What lies under the mask has no effect, NaN included.
        estimator: k1, k2, k3 or abs.
        gradient: The estimator that backward differentiates; None for `estimator` itself, "none"
            for a result without gradient.
        log_ratio_clamp: d is clamped to plus and minus this, above 0, before anything else; beyond
            it the gradient is 0. None for no clamp: k3 of a token 89 nats below its reference
            then overflows to infinity in fp32.
        backend: See `use_backend`.

    Returns:
        The estimates in logprobs' shape, fp32 (fp64 if either input is); masked tokens give 0.
        NaN and infinities of live tokens go through the formula as in torch.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected.
    """
    check_inputs(logprobs, ref_logprobs, mask, estimator, log_ratio_clamp)
    gradient = estimator if gradient is None else gradient
    _checks.choice("gradient", gradient, (*ESTIMATORS, "none"))
    if gradient == "none":
        logprobs, gradient = logprobs.detach(), estimator
    clamp = math.inf if log_ratio_clamp is None else float(log_ratio_clamp)
    served_by = _FORWARD.resolve(logprobs.device, backend)
    if served_by == "torch":
        count("kl_penalty", "torch")
        return reference(logprobs, ref_logprobs, mask, estimator, gradient, clamp)
    kl: Tensor = _FORWARD(logprobs, ref_logprobs, mask, estimator, gradient, clamp, served_by)
    return kl


def check_inputs(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    estimator: str,
    log_ratio_clamp: float | None,
) -> None:
    _checks.tensor("logprobs", logprobs, _checks.FLOATS)
    _checks.tensor("ref_logprobs", ref_logprobs, _checks.FLOATS)
    _checks.shape("ref_logprobs", ref_logprobs, logprobs.shape, "as logprobs")
    _checks.device("ref_logprobs", ref_logprobs, logprobs, "as logprobs")
    _checks.constant("ref_logprobs", ref_logprobs)
    _checks.mask(mask, logprobs, "logprobs")
    _checks.choice("estimator", estimator, ESTIMATORS)
    if log_ratio_clamp is not None:
        _checks.number("log_ratio_clamp", log_ratio_clamp, low=0, open_low=True)


def reference(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    estimator: str,
    gradient: str,
    clamp: float,
) -> Tensor:
    dtype = _checks.compute_dtype(logprobs, ref_logprobs)
    if mask is not None:
        # Selected away before any arithmetic; every estimator of d = 0 is 0.
        logprobs, ref_logprobs = (torch.where(mask != 0, t, 0.0) for t in (logprobs, ref_logprobs))
    d = logprobs.to(dtype) - ref_logprobs.to(dtype)
    # Not torch.clamp, which gives a NaN the gradient 0.
    d = torch.where(d > clamp, clamp, torch.where(d < -clamp, -clamp, d))
    value = _estimate(d, estimator)
    return value if gradient == estimator else _WithGradientOf.apply(value, _estimate(d, gradient))


def _estimate(d: Tensor, estimator: str) -> Tensor:
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "abs":
        return d.abs()
    # e^t - 1 - t, t = -d; near 0, where that cancels, by its series t^2/2 (1 + t/3 (1 + t/4 ...)).
    near = d.abs() < 1
    t = torch.where(near, -d, 0.0)
    series = torch.ones_like(t)
    for n in range(18, 2, -1):
        series = 1 + t / n * series
    far = torch.where(near, 0.0, -d)
    return torch.where(near, t.square() / 2 * series, far.exp() - 1 - far)


class _WithGradientOf(torch.autograd.Function):
    """The first tensor, differentiated as if it were the second.

    Not ``value + (surrogate - surrogate.detach())``: that is NaN where the surrogate is infinite.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class _Kl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        logprobs, ref_logprobs, mask, _, *ctx.settings = args
        ctx.save_for_backward(logprobs, ref_logprobs, mask)
        kl: Tensor = _FORWARD.below(*args)
        return kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("kl_penalty")
        return (BACKWARD(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 6)


def _autograd(logprobs: Tensor, *args: Any) -> Tensor:
    recorded = torch.is_grad_enabled() and logprobs.requires_grad
    kl: Tensor = (_Kl.apply if recorded else _FORWARD.below)(logprobs, *args)
    return kl


def _fake_forward(logprobs: Tensor, ref_logprobs: Tensor, *args: Any) -> Tensor:
    return logprobs.new_empty(logprobs.shape, dtype=_checks.compute_dtype(logprobs, ref_logprobs))


_FORWARD = Op(
    "kl_forward",
    "(Tensor logprobs, Tensor ref_logprobs, Tensor? mask, str estimator, str gradient, "
    "float log_ratio_clamp) -> Tensor",
    function="kl_penalty",
    fake=_fake_forward,
    autograd=_autograd,
    cpu=cpu(native.kl_forward),
    cuda=cuda(native.kl_forward),
    triton=triton("kl", "kl_forward"),
)
BACKWARD = Op(
    "kl_backward",
    "(Tensor grad, Tensor logprobs, Tensor ref_logprobs, Tensor? mask, str gradient, "
    "float log_ratio_clamp) -> Tensor",
    function="kl_penalty",
    fake=lambda grad, logprobs, *args: logprobs.new_empty(logprobs.shape),
    cpu=cpu(native.kl_backward),
    cuda=cuda(native.kl_backward),
    triton=triton("kl", "kl_backward"),
)
