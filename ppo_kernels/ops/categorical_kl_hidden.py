"""The divergence between two models' distributions, from their hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._op import Op, count, forbid_double_backward
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..native import categorical_kl_hidden as native
from ..triton import kernel as triton
from . import _hidden, categorical_kl


def categorical_kl_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    mask: Tensor | None = None,
    *,
    reverse: bool = False,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    vocab_size: int | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""`categorical_kl` of ``hidden @ weight.T + bias``, a few rows of logits at a time.

    .. math::
        p = \mathrm{softmax}(z / \tau), \quad z = \mathrm{softcap}(s\,x), \quad x = W h + b, \qquad
        \mathrm{KL}(p \| q) = \sum_j p_j (\log p_j - \log q_j)

    with q the same of the reference's hidden states and head, and with `reverse` KL(q || p).

    Memory beyond inputs and outputs: ``chunk * V`` logits of each model (with `softcap` those of
    the policy twice in backward), and ``V * H`` numbers for the gradient of the weight where it is
    asked for, all in fp32 (fp64 for fp64 inputs); backward makes both logits again.
    Half-precision factors are summed in fp32, and the logits are never rounded to half. Rows that
    are masked are not multiplied.

    Equivalent to::

        logits = F.linear(hidden.float(), weight.float(), bias)[..., :vocab_size]
        ref_logits = F.linear(ref_hidden.float(), ref_weight.float(), ref_bias)[..., :vocab_size]
        categorical_kl(logits, ref_logits, ...)  # after scale and softcap

    Args:
        hidden: The policy's states, [..., H], fp32, bf16, fp16 or fp64.
        weight: Of the policy's head, [V, H], in the dtype of hidden; under autocast both are cast
            to its dtype. Frozen, it costs nothing in backward.
        ref_hidden: The reference's states, [..., H'], of any width and of a dtype of its own.
        ref_weight: Of the reference's head, [V, H'], in the dtype of ref_hidden; may be the
            policy's, detached. The reference is a constant: nothing of it may require grad.
        mask: [...], nonzero = use. A masked position's states are never looked at. On a GPU the
            call waits until their number is known; while a CUDA graph is captured, masked rows are
            multiplied as zeros instead.
        reverse: KL(q || p) instead of KL(p || q).
        bias: Of the policy's head, [V], or None.
        ref_bias: Of the reference's head, [V], or None.
        temperature: Of both distributions; finite, above 0.
        softcap: Of both models, ``softcap * tanh(s * x / softcap)``; None for none.
        logit_scale: s above, of both models; above 0.
        vocab_size: The rows of both weights that are tokens, whose numbers may then differ; those
            behind are padding and get no probability and a zero gradient. None: all.
        chunk: Rows of logits at a time, a multiple of 256; None chooses 64 MiB of logits of each
            model on a CPU, 1 GiB on a GPU, and at least 256 rows.
        backend: See `use_backend`. The matrix products are torch's on every backend.

    Returns:
        As `categorical_kl`. On a CPU it has the same bits for every `chunk`, and is exactly 0 where
        both models have the same states and head. Gradients of hidden, weight and bias have their
        dtypes, each rounded once from a sum in fp32.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected.
    """
    hidden, weight = _hidden.autocast(hidden, weight)
    ref_hidden, ref_weight = _hidden.autocast(ref_hidden, ref_weight, "ref_")
    vocab = _check(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, vocab_size, chunk)
    if mask is not None:
        _checks.tensor("mask", mask, _checks.MASKS)
        _checks.shape("mask", mask, hidden.shape[:-1], "hidden without its last dimension")
        _checks.device("mask", mask, hidden, "as hidden")
    _checks.number("temperature", temperature, low=0, open_low=True)
    if softcap is not None:
        _checks.number("softcap", softcap, low=0, open_low=True)
    _checks.number("logit_scale", logit_scale, low=0, open_low=True)
    args = (
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, bool(reverse),
        float(temperature), softcap or 0.0, float(logit_scale), vocab,
    )  # fmt: skip
    served_by = _FORWARD.resolve(hidden.device, backend)
    if served_by == "torch":
        count("categorical_kl_from_hidden", "torch")
        return _reference(*args)
    result: Tensor = _FORWARD(*args, chunk, served_by)[0]
    return result


def _check(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    bias: Tensor | None,
    ref_bias: Tensor | None,
    vocab_size: int | None,
    chunk: int | None,
) -> int:
    """The size of the vocabulary."""
    _hidden.check_head(hidden, weight, bias)
    _hidden.check_head(ref_hidden, ref_weight, ref_bias, "ref_")
    expected = (*hidden.shape[:-1], ref_hidden.shape[-1])
    _checks.shape("ref_hidden", ref_hidden, expected, "as hidden, but for the last dimension")
    _checks.device("ref_hidden", ref_hidden, hidden, "as hidden")
    if vocab_size is None:
        expected = (weight.shape[0], ref_weight.shape[1])
        _checks.shape("ref_weight", ref_weight, expected, "V of weight, without a vocab_size")
    for name, t in (
        ("ref_hidden", ref_hidden),
        ("ref_weight", ref_weight),
        ("ref_bias", ref_bias),
    ):
        _checks.constant(name, t)
    return _hidden.check_sizes(vocab_size, chunk, min(weight.shape[0], ref_weight.shape[0]))


def _reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    reverse: bool,
    temperature: float,
    softcap: float,
    logit_scale: float,
    vocab: int,
) -> Tensor:
    live = mask if mask is None else mask != 0

    def logits(states: Tensor, head: Tensor, offset: Tensor | None) -> Tensor:
        offset = offset if offset is None else offset[:vocab]
        z = _hidden.all_logits(states, head[:vocab], offset, live) * logit_scale
        return softcap * torch.tanh(z / softcap) if softcap else z

    policy, ref = logits(hidden, weight, bias), logits(ref_hidden, ref_weight, ref_bias)
    return categorical_kl.reference(policy, ref, mask, reverse, temperature)


class _HiddenKl(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        tensors, ctx.settings = args[:7], args[7:]
        kl, state = _FORWARD.below(*args)
        ctx.save_for_backward(*tensors, kl, state)
        ctx.mark_non_differentiable(state)
        return kl, state

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("categorical_kl_from_hidden")
        needs = list(ctx.needs_input_grad[:3])
        *settings, backend = ctx.settings
        made = _BACKWARD(grad, *ctx.saved_tensors, *settings, needs, backend)
        grads = (g if need else None for g, need in zip(made, needs, strict=True))
        return (*grads, *(None,) * 11)


def _autograd(*args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:3]):
        return _HiddenKl.apply(*args)
    return _FORWARD.below(*args)


def _fake_forward(
    hidden: Tensor, weight: Tensor, bias: Any, ref_hidden: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    dtype = _checks.compute_dtype(hidden, ref_hidden)
    shape = hidden.shape[:-1]
    return hidden.new_empty(shape, dtype=dtype), hidden.new_empty((*shape, 4), dtype=dtype)


_TENSORS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor ref_hidden, Tensor ref_weight, "
    "Tensor? ref_bias, Tensor? mask"
)
_SETTINGS = (
    "bool reverse, float temperature, float softcap, float logit_scale, int vocab, int? chunk"
)
_FORWARD = Op(
    "hidden_kl_forward",
    f"({_TENSORS}, {_SETTINGS}) -> (Tensor, Tensor)",
    function="categorical_kl_from_hidden",
    fake=_fake_forward,
    autograd=_autograd,
    cpu=cpu(native.hidden_kl_forward),
    cuda=cuda(native.hidden_kl_forward),
    triton=triton("hidden", "hidden_kl_forward"),
)
_BACKWARD = Op(
    "hidden_kl_backward",
    f"(Tensor grad_kl, {_TENSORS}, Tensor kl, Tensor state, {_SETTINGS}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    function="categorical_kl_from_hidden",
    fake=lambda grad_kl, hidden, weight, bias, *args: _hidden.fake_gradients(
        hidden, weight, bias, args[-1]
    ),
    cpu=cpu(native.hidden_kl_backward),
    cuda=cuda(native.hidden_kl_backward),
    triton=triton("hidden", "hidden_kl_backward"),
)
