"""log p(token) and entropy from hidden states, without the logits of all rows."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import _checks, _kept
from .._kept import KeptSet
from .._op import Op, count, forbid_double_backward
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..native import logprob_hidden as native
from ..triton import kernel as triton
from . import _hidden, logprob
from . import kept as over_sets
from .logprob import LogProbs


@overload
def logprobs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    mask: Tensor | None = ...,
    kept: KeptSet | None = ...,
    vocab_size: int | None = ...,
    entropy: Literal[False] = ...,
    chunk: int | None = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def logprobs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    mask: Tensor | None = ...,
    kept: KeptSet | None = ...,
    vocab_size: int | None = ...,
    entropy: Literal[True],
    chunk: int | None = ...,
    backend: str | None = ...,
) -> LogProbs: ...
def logprobs_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    kept: KeptSet | None = None,
    vocab_size: int | None = None,
    entropy: bool = False,
    chunk: int | None = None,
    backend: str | None = None,
) -> Tensor | LogProbs:
    r"""`logprobs_from_logits` of ``hidden @ weight.T + bias``, a few rows of logits at a time.

    .. math::
        x = W h + b, \qquad z = \mathrm{softcap}(s\,x) / \tau, \qquad
        \log p(t) = z_t - \log \sum_j e^{z_j}, \qquad
        H = -\sum_j p_j \log p_j

    Memory beyond inputs and outputs: ``chunk * V`` logits, and ``V * H`` numbers for the gradient
    of the weight where it is asked for, both in fp32 (fp64 for fp64 inputs); backward makes the
    logits again (8 T H V floating-point operations in all instead of 6). Half-precision factors
    are summed in fp32, and the logits are never rounded to half. Rows that are masked are not
    multiplied.

    Equivalent to::

        logits = F.linear(hidden.float(), weight.float(), bias)[..., :vocab_size]
        logprobs_from_logits(logits, tokens, ...)

    Args:
        hidden: The states the head is applied to, [..., H], fp32, bf16, fp16 or fp64.
        weight: Of the head, [V, H], in the dtype of hidden; under autocast both are cast to its
            dtype. May be a tied embedding; frozen, it costs nothing in backward. A LoRA'd head is
            ``weight + scale * (B @ A)``.
        tokens: [...], int32 or int64 ids in [0, V). Positions equal to `ignore_index` are masked.
        bias: Of the head, [V], or None.
        temperature: A number, or a tensor that broadcasts to [...]; finite, above 0. Not
            differentiated.
        softcap: c above, None for none; logits are capped after they were scaled.
        logit_scale: s above; above 0.
        ignore_index: The label that marks a position as masked, in addition to `mask`.
        mask: [...], nonzero = use. A masked position's states, label and temperature are never
            looked at. On a GPU the call waits until their number is known; while a CUDA graph is
            captured, masked rows are multiplied as zeros instead.
        kept: As in `logprobs_from_logits`. The logits of the sets are kept for backward, which then
            makes no logits again.
        vocab_size: The rows of weight that are tokens; those behind are padding and get no
            probability and a zero gradient. None: all.
        entropy: Also return the entropy.
        chunk: Rows of logits at a time, a multiple of 256; None chooses 64 MiB of logits on a CPU,
            1 GiB on a GPU, and at least 256 rows.
        backend: See `use_backend`. The matrix products are torch's on every backend.

    Returns:
        As `logprobs_from_logits`. On a CPU the log-probabilities have the same bits for every
        `chunk`. Gradients of hidden, weight and bias have their dtypes, each rounded once from a
        sum in fp32.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected; on CPU
            that includes labels out of range at live positions.
    """
    hidden, weight = _hidden.autocast(hidden, weight)
    vocab = check(hidden, weight, tokens, bias, vocab_size, chunk)
    logprob.check_transform(tokens, mask, softcap, logit_scale, ignore_index)
    temperatures, scalar = logprob.split_temperature(temperature, tokens)
    if kept is not None:
        _kept.check(kept, tokens)
    forward, sets = (_FORWARD, ()) if kept is None else (over_sets.HIDDEN_FORWARD, kept)
    served_by = forward.resolve(hidden.device, backend)
    if served_by == "torch":
        count("logprobs_from_hidden", "torch")
        result: tuple[Tensor, ...] = reference(
            hidden, weight[:vocab], bias if bias is None else bias[:vocab], tokens, mask,
            scalar if temperatures is None else temperatures, softcap, logit_scale, ignore_index,
            entropy, kept,
        )  # fmt: skip
    else:
        result = forward(
            hidden, weight, bias, tokens, mask, temperatures, *sets, scalar, softcap or 0.0,
            float(logit_scale), ignore_index, vocab, chunk, entropy, served_by,
        )  # fmt: skip
    return LogProbs(result[0], result[1]) if entropy else result[0]


def check(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    bias: Tensor | None,
    vocab_size: int | None,
    chunk: int | None,
) -> int:
    """The size of the vocabulary."""
    _hidden.check_head(hidden, weight, bias)
    _checks.tensor("tokens", tokens, _checks.INDICES)
    _checks.shape("tokens", tokens, hidden.shape[:-1], "hidden without its last dimension")
    _checks.device("tokens", tokens, hidden, "as hidden")
    return _hidden.check_sizes(vocab_size, chunk, weight.shape[0])


def reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tokens: Tensor,
    mask: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    live = tokens != args[3]
    if mask is not None:
        live = live & (mask != 0)
    logits = _hidden.all_logits(hidden, weight, bias, live)
    return logprob.reference(logits, tokens, mask, *args)


class _HiddenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Any:
        tokens, mask, temperatures, *settings, entropy, backend = args
        ctx.set_materialize_grads(False)
        result = _FORWARD.below(hidden, weight, bias, *args)
        logprobs, _, state = result
        ctx.save_for_backward(hidden, weight, bias, tokens, mask, temperatures, logprobs, state)
        ctx.settings, ctx.entropy, ctx.backend = settings, entropy, backend
        ctx.mark_non_differentiable(state)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_double_backward("logprobs_from_hidden")
        grad_logprobs, grad_entropy, _ = grads
        if not ctx.entropy:  # compiled graphs give the empty output a gradient
            grad_entropy = None
        nothing = (None,) * 11
        if grad_logprobs is None and grad_entropy is None:
            return (None, None, None, *nothing)
        needs = list(ctx.needs_input_grad[:3])
        made = _BACKWARD(
            grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.settings, needs, ctx.backend
        )
        return (*(g if need else None for g, need in zip(made, needs, strict=True)), *nothing)


def _autograd(*args: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:3]):
        return _HiddenLogprob.apply(*args)
    return _FORWARD.below(*args)


def _fake_forward(hidden: Tensor, weight: Tensor, bias: Any, tokens: Tensor, *args: Any) -> Any:
    dtype = _checks.compute_dtype(hidden)
    return (
        hidden.new_empty(tokens.shape, dtype=dtype),
        hidden.new_empty(tokens.shape if args[-1] else (0,), dtype=dtype),
        hidden.new_empty((*tokens.shape, 3), dtype=dtype),
    )


_SETTINGS = (
    "float temperature, float softcap, float logit_scale, int ignore_index, int vocab, int? chunk"
)
_FORWARD = Op(
    "hidden_logprob_forward",
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor tokens, Tensor? mask, "
    f"Tensor? temperatures, {_SETTINGS}, bool entropy) -> (Tensor, Tensor, Tensor)",
    function="logprobs_from_hidden",
    fake=_fake_forward,
    autograd=_autograd,
    cpu=cpu(native.hidden_logprob_forward),
    cuda=cuda(native.hidden_logprob_forward),
    triton=triton("hidden", "hidden_logprob_forward"),
)
_BACKWARD = Op(
    "hidden_logprob_backward",
    "(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor hidden, Tensor weight, Tensor? bias, "
    "Tensor tokens, Tensor? mask, Tensor? temperatures, Tensor logprobs, Tensor state, "
    f"{_SETTINGS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    function="logprobs_from_hidden",
    fake=lambda g, h, hidden, weight, bias, *args: _hidden.fake_gradients(
        hidden, weight, bias, args[-1]
    ),
    cpu=cpu(native.hidden_logprob_backward),
    cuda=cuda(native.hidden_logprob_backward),
    triton=triton("hidden", "hidden_logprob_backward"),
)
