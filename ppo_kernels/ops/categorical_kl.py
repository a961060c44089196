"""The divergence between the distributions of two rows of logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._op import Op, count, forbid_double_backward
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..native import categorical_kl as native
from ..triton import kernel as triton


def categorical_kl(
    logits: Tensor,
    ref_logits: Tensor,
    *,
    reverse: bool = False,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""KL divergence per row between policy and reference, over the whole vocabulary, in nats.

    .. math::
        p = \mathrm{softmax}(x / \tau), \quad q = \mathrm{softmax}(x_\mathrm{ref} / \tau), \qquad
        \mathrm{KL}(p \| q) = \sum_j p_j (\log p_j - \log q_j)

    and with `reverse` KL(q || p). This is the exact quantity that `kl_penalty` estimates from one
    token. KL(p || q), p the policy, is the penalty of KL-regularised reinforcement learning
    (Jaques et al. 2017, arXiv:1611.02796); its other direction is that of distillation from q
    (Hinton et al. 2015, arXiv:1503.02531).

    Equivalent to::

        logp = (logits.float() / temperature).log_softmax(-1)
        logq = (ref_logits.float() / temperature).log_softmax(-1)
        kl = (logp.exp() * (logp - logq)).sum(-1)  # with reverse: logp and logq exchanged

    Both logits are read once forward; backward reads them once and writes the gradient once.

    Args:
        logits: The policy's, [..., V], fp32, bf16, fp16 or fp64, any strides.
        ref_logits: The reference's, as logits; a constant, must not require grad.
        reverse: KL(q || p) instead of KL(p || q).
        temperature: Of both distributions; finite, above 0.
        mask: [...], nonzero = use. A masked position's logits have no effect, NaN included.
        backend: See `use_backend`.

    Returns:
        The divergence [...], in fp32 (fp64 if an input is fp64); masked positions give 0 and a zero
        gradient. Identical rows give exactly 0. A token with logit -inf in the first distribution
        (p; q with `reverse`) adds nothing; one with -inf in the second alone makes the divergence
        infinite, and its gradient NaN. A row with +inf or NaN, or all -inf, gives NaN. The gradient
        has the dtype of the logits, rounded once. Rows whose upstream gradient is exactly 0 get a
        zero gradient and are not read.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected.
    """
    _checks.tensor("logits", logits, _checks.FLOATS)
    _checks.tensor("ref_logits", ref_logits, _checks.FLOATS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [..., V] with V > 0, got {list(logits.shape)}")
    _checks.shape("ref_logits", ref_logits, logits.shape, "as logits")
    _checks.device("ref_logits", ref_logits, logits, "as logits")
    _checks.constant("ref_logits", ref_logits)
    _checks.number("temperature", temperature, low=0, open_low=True)
    if mask is not None:
        _checks.tensor("mask", mask, _checks.MASKS)
        _checks.shape("mask", mask, logits.shape[:-1], "logits without the vocabulary")
        _checks.device("mask", mask, logits, "as logits")
    served_by = _FORWARD.resolve(logits.device, backend)
    if served_by == "torch":
        count("categorical_kl", "torch")
        return reference(logits, ref_logits, mask, bool(reverse), float(temperature))
    result: Tensor = _FORWARD(
        logits, ref_logits, mask, bool(reverse), float(temperature), served_by
    )[0]
    return result


def reference(
    logits: Tensor, ref_logits: Tensor, mask: Tensor | None, reverse: bool, temperature: float
) -> Tensor:
    dtype = _checks.compute_dtype(logits, ref_logits)

    def log_softmax(x: Tensor) -> Tensor:
        x = x.to(dtype)
        if mask is not None:  # selected away before any arithmetic
            x = torch.where(mask[..., None] != 0, x, 0.0)
        highest, where = x.detach().max(-1, keepdim=True)
        gap = (x - highest) / temperature  # before it is scaled: logits may be large
        # The maximum is taken out of the sum, so that log1p keeps a rest far below 1.
        rest = gap.exp().scatter(-1, where, gap.gather(-1, where).expm1()).sum(-1, keepdim=True)
        return gap - rest.log1p()

    policy, ref = log_softmax(logits), log_softmax(ref_logits)
    first, second = (ref, policy) if reverse else (policy, ref)
    forbidden = (first > -torch.inf) & (second == -torch.inf)
    gap = torch.where((first == -torch.inf) | forbidden, 0.0, first - second)
    # A forbidden token adds p * inf, whose gradient is NaN.
    infinite = torch.where(forbidden.any(-1), torch.inf, 0.0)
    kl = (first.exp() * gap).sum(-1) + infinite * policy.exp().sum(-1)
    return kl if mask is None else torch.where(mask != 0, kl, 0.0)


class _CategoricalKl(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor, mask: Tensor | None, *args: Any
    ) -> tuple[Tensor, Tensor]:
        kl, state = _FORWARD.below(logits, ref_logits, mask, *args)
        ctx.save_for_backward(logits, ref_logits, mask, kl, state)
        ctx.settings = args
        ctx.mark_non_differentiable(state)
        return kl, state

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("categorical_kl")
        return (_BACKWARD(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 5)


def _autograd(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and logits.requires_grad:
        return _CategoricalKl.apply(logits, *args)
    return _FORWARD.below(logits, *args)


def _fake_forward(logits: Tensor, ref_logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    dtype = _checks.compute_dtype(logits, ref_logits)
    shape = logits.shape[:-1]
    return logits.new_empty(shape, dtype=dtype), logits.new_empty((*shape, 4), dtype=dtype)


_SETTINGS = "bool reverse, float temperature"
_FORWARD = Op(
    "categorical_kl_forward",
    f"(Tensor logits, Tensor ref_logits, Tensor? mask, {_SETTINGS}) -> (Tensor, Tensor)",
    function="categorical_kl",
    fake=_fake_forward,
    autograd=_autograd,
    cpu=cpu(native.categorical_kl_forward),
    cuda=cuda(native.categorical_kl_forward),
    triton=triton("categorical_kl", "categorical_kl_forward"),
)
_BACKWARD = Op(
    "categorical_kl_backward",
    "(Tensor grad_kl, Tensor logits, Tensor ref_logits, Tensor? mask, Tensor kl, Tensor state, "
    f"{_SETTINGS}) -> Tensor",
    function="categorical_kl",
    fake=lambda grad_kl, logits, *args: logits.new_empty(logits.shape),
    cpu=cpu(native.categorical_kl_backward),
    cuda=cuda(native.categorical_kl_backward),
    triton=triton("categorical_kl", "categorical_kl_backward"),
)
