"""Log-probabilities over kept sets: the sets of a sampler's settings, and the ops.

The public functions and the reference are those of `logprob` and `logprob_hidden`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._kept import KeptSet
from .._op import Op, forbid_double_backward
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..native import kept as native
from ..triton import kernel as triton
from . import _hidden

_ROWS = 256  # that are sorted at a time


def kept_set(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> KeptSet:
    r"""The tokens that top-k, then top-p, then min-p leave of each row of logits.

    The settings mean what they mean to the samplers of transformers and vLLM:

    - top-k keeps the k largest logits, and all that equal the k-th.
    - top-p keeps, of the distribution that top-k left, the fewest most likely tokens whose mass
      reaches p: the token that crosses p is kept. Of equal ones at the edge those of lower id.
    - min-p keeps what is at least `min_p` times as likely as the most likely token.

    Masses are added in fp32 (fp64 for fp64 logits), as samplers do: a token at the very edge of p
    may fall on either side. Where the sampler tells which tokens it kept, take those.

    Args:
        logits: [..., V] as the sampler saw them: transformed, and divided by the temperature.
        top_k: At least 1; None for all.
        top_p: In [0, 1]; the most likely token is always kept.
        min_p: In [0, 1].

    Returns:
        Sets for ``kept=`` of `logprobs_from_logits`, ids in ascending order. -inf logits are in no
        set; a row with NaN has an empty one. On a GPU the call waits for their number.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected.
    """
    _checks.tensor("logits", logits, _checks.FLOATS)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [..., V] with V > 0, got {list(logits.shape)}")
    if top_k is not None:
        if isinstance(top_k, bool) or not isinstance(top_k, int):
            raise TypeError(f"top_k: expected an int, got {type(top_k).__name__}")
        _checks.number("top_k", top_k, low=1)
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None:
            _checks.number(name, value, low=0, high=1)
    parts = logits.detach().reshape(-1, logits.shape[-1]).split(_ROWS)
    kept = [_kept(part, top_k, top_p, min_p) for part in parts]
    sizes = torch.cat([k.sum(-1) for k in kept])
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    return KeptSet(offsets, torch.cat([k.nonzero()[:, 1].int() for k in kept]))


def _kept(logits: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    """[rows, V], which tokens."""
    logits = logits.to(_checks.compute_dtype(logits))
    kept = (logits > -torch.inf) & ~logits.isnan().any(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        kept &= logits >= logits.topk(top_k).values[:, -1:]
    if top_p is not None and top_p < 1:
        # From the least likely on, where the sums are small and exact.
        left = logits.masked_fill(~kept, -torch.inf).flip(-1).sort(stable=True)
        above = left.values.softmax(-1).cumsum(-1) > 1 - top_p
        above[:, -1] = True
        kept &= torch.zeros_like(kept).scatter(-1, left.indices, above).flip(-1)
    if min_p is not None and min_p > 0:
        kept &= logits >= logits.amax(-1, keepdim=True) + math.log(min_p)
    return kept


# ---- from logits ---------------------------------------------------------------------------------


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
        tokens, mask, temperatures, offsets, ids, *settings, entropy, backend = args
        ctx.set_materialize_grads(False)
        result = FORWARD.below(logits, *args)
        logprobs, _, state = result
        ctx.save_for_backward(logits, tokens, mask, temperatures, offsets, ids, logprobs, state)
        ctx.settings, ctx.entropy, ctx.backend = settings, entropy, backend
        ctx.mark_non_differentiable(state)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_double_backward("logprobs_from_logits")
        grad_logprobs, grad_entropy, _ = grads
        if not ctx.entropy:  # compiled graphs give the empty output a gradient
            grad_entropy = None
        nothing = (None,) * 11
        if grad_logprobs is None and grad_entropy is None:
            return (None, *nothing)
        args = (grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.settings, ctx.backend)
        return (_BACKWARD(*args), *nothing)


def _autograd(*args: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and args[0].requires_grad:
        return _Kept.apply(*args)
    return FORWARD.below(*args)


def _fake_forward(logits: Tensor, tokens: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, shape = _checks.compute_dtype(logits), tokens.shape
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape if args[-1] else (0,), dtype=dtype),
        logits.new_empty((*shape, 3), dtype=dtype),
    )


def _fake_backward(g: Tensor | None, h: Tensor | None, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_POSITIONS = "Tensor tokens, Tensor? mask, Tensor? temperatures, Tensor offsets, Tensor ids"
_SETTINGS = "float temperature, float softcap, float logit_scale, int ignore_index"
FORWARD = Op(
    "kept_logprob_forward",
    f"(Tensor logits, {_POSITIONS}, {_SETTINGS}, bool entropy) -> (Tensor, Tensor, Tensor)",
    function="logprobs_from_logits",
    fake=_fake_forward,
    autograd=_autograd,
    cpu=cpu(native.kept_logprob_forward),
    cuda=cuda(native.kept_logprob_forward),
    triton=triton("logprob_kept", "kept_logprob_forward"),
)
_BACKWARD = Op(
    "kept_logprob_backward",
    f"(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor logits, {_POSITIONS}, Tensor logprobs, "
    f"Tensor state, {_SETTINGS}) -> Tensor",
    function="logprobs_from_logits",
    fake=_fake_backward,
    cpu=cpu(native.kept_logprob_backward),
    cuda=cuda(native.kept_logprob_backward),
    triton=triton("logprob_kept", "kept_logprob_backward"),
)


# ---- from hidden states --------------------------------------------------------------------------


class _HiddenKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Any:
        tokens, mask, temperatures, offsets, ids, *settings, entropy, backend = args
        ctx.set_materialize_grads(False)
        result = HIDDEN_FORWARD.below(hidden, weight, bias, *args)
        logprobs, _, state, values = result
        ctx.save_for_backward(
            hidden, weight, bias, tokens, mask, temperatures, offsets, ids, logprobs, state, values
        )
        ctx.settings, ctx.entropy, ctx.backend = settings, entropy, backend
        ctx.mark_non_differentiable(state, values)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_double_backward("logprobs_from_hidden")
        grad_logprobs, grad_entropy, *_ = grads
        if not ctx.entropy:  # compiled graphs give the empty output a gradient
            grad_entropy = None
        nothing = (None,) * 13
        if grad_logprobs is None and grad_entropy is None:
            return (None, None, None, *nothing)
        needs = list(ctx.needs_input_grad[:3])
        made = _HIDDEN_BACKWARD(
            grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.settings, needs, ctx.backend
        )
        return (*(g if need else None for g, need in zip(made, needs, strict=True)), *nothing)


def _hidden_autograd(*args: Any) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:3]):
        return _HiddenKept.apply(*args)
    return HIDDEN_FORWARD.below(*args)


def _fake_hidden_forward(
    hidden: Tensor, weight: Tensor, bias: Any, tokens: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    values = hidden.new_empty(args[3].shape, dtype=_checks.compute_dtype(hidden))
    return *_fake_forward(hidden, tokens, args[-1]), values


def _fake_hidden_backward(
    g: Any, h: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _hidden.fake_gradients(hidden, weight, bias, args[-1])


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias"
HIDDEN_FORWARD = Op(
    "hidden_kept_forward",
    f"({_HEAD}, {_POSITIONS}, {_SETTINGS}, int vocab, int? chunk, bool entropy) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    function="logprobs_from_hidden",
    fake=_fake_hidden_forward,
    autograd=_hidden_autograd,
    cpu=cpu(native.hidden_kept_forward),
    cuda=cuda(native.hidden_kept_forward),
    triton=triton("logprob_kept", "hidden_kept_forward"),
)
_HIDDEN_BACKWARD = Op(
    "hidden_kept_backward",
    f"(Tensor? grad_logprobs, Tensor? grad_entropy, {_HEAD}, {_POSITIONS}, Tensor logprobs, "
    f"Tensor state, Tensor values, {_SETTINGS}, int vocab, int? chunk, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    function="logprobs_from_hidden",
    fake=_fake_hidden_backward,
    cpu=cpu(native.hidden_kept_backward),
    cuda=cuda(native.hidden_kept_backward),
    triton=triton("logprob_kept", "hidden_kept_backward"),
)
