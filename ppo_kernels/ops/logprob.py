"""log p(token) and entropy of every row of logits."""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _kept
from .._kept import KeptSet
from .._op import Op, count, forbid_double_backward
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..native import logprob as native
from ..triton import kernel as triton
from . import kept as over_sets


class LogProbs(NamedTuple):
    """Log-probabilities of the tokens and entropies (nats) of their distributions."""

    logprobs: Tensor
    entropy: Tensor


@overload
def logprobs_from_logits(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    mask: Tensor | None = ...,
    kept: KeptSet | None = ...,
    entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def logprobs_from_logits(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    ignore_index: int = ...,
    mask: Tensor | None = ...,
    kept: KeptSet | None = ...,
    entropy: Literal[True],
    inplace_backward: bool = ...,
    backend: str | None = ...,
) -> LogProbs: ...
def logprobs_from_logits(
    logits: Tensor,
    tokens: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    kept: KeptSet | None = None,
    entropy: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | LogProbs:
    r"""Log-probability of one token per row of logits, and on request the row's entropy, in nats.

    .. math::
        z = \mathrm{softcap}(s\,x) / \tau, \qquad
        \log p(t) = z_t - \log \sum_j e^{z_j}, \qquad
        H = -\sum_j p_j \log p_j

    with softcap(y) = c tanh(y / c). The logits are read once forward; backward reads them once and
    writes their gradient once. No [tokens, vocab] tensor is made in fp32. Near p = 1 the
    log-probability keeps its relative accuracy (log-sum-exp over the *other* tokens), and so does
    the gradient of the target (by expm1).

    Equivalent to::

        z = logits.float() / temperature
        logprobs = z.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        entropy = torch.distributions.Categorical(logits=z).entropy()

    Args:
        logits: [..., V], fp32, bf16, fp16 or fp64, any strides: ``logits[:, :-1]`` is not copied.
        tokens: [...], int32 or int64 ids in [0, V), any strides. Positions equal to `ignore_index`
            are masked.
        temperature: A number, or a tensor that broadcasts to [...]; finite, above 0. Not
            differentiated.
        softcap: c above, as in Gemma 2 (arXiv:2408.00118); None for none.
        logit_scale: s above, as in Cohere's models; above 0.
        ignore_index: The label that marks a position as masked, in addition to `mask`.
        mask: [...], nonzero = use. A masked position's logits, label, temperature and kept set are
            never looked at.
        kept: For each position the only tokens that have probability, as a sampler's top-k or top-p
            left them (`kept_set` makes such sets): as if all other logits were -inf. Of each row
            only these are read, and all others get a zero gradient. A token that is not in its set
            gives -inf, whatever the logits, and no gradient; an empty set gives NaN. A repeated id
            is an error on a CPU, and counted as often as it is there on a GPU.
        entropy: Also return the entropy.
        inplace_backward: Overwrite the logits with their gradient in backward, saving a [tokens,
            vocab] tensor. A second use of these logits in backward, or a second backward, then
            raises. Under torch.compile a warning is given and backward is out of place. Not with
            `kept`.
        backend: See `use_backend`.

    Returns:
        Log-probabilities [...], or ``LogProbs(logprobs, entropy)``, in fp32 (fp64 for fp64 logits);
        masked positions give 0 and a zero gradient. A forbidden token (-inf logit) gives -inf; a
        row with +inf or NaN, or all -inf, gives NaN. The gradient of the logits has their dtype,
        rounded once from fp32. Rows whose upstream gradient is exactly 0 get a zero gradient and
        are not read.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected; on CPU
            that includes labels out of range at live positions.
    """
    check(logits, tokens)
    check_transform(tokens, mask, softcap, logit_scale, ignore_index)
    temperatures, scalar = split_temperature(temperature, tokens)
    if kept is not None:
        _kept.check(kept, tokens)
        if inplace_backward:
            raise ValueError("inplace_backward: expected False with kept, got True")
    served_by = (_FORWARD if kept is None else over_sets.FORWARD).resolve(logits.device, backend)
    if served_by == "torch":
        count("logprobs_from_logits", "torch")
        result = reference(
            logits, tokens, mask, scalar if temperatures is None else temperatures,
            softcap, logit_scale, ignore_index, entropy, kept,
        )  # fmt: skip
    elif kept is None:
        result = _FORWARD(
            logits, tokens, mask, temperatures, scalar, softcap or 0.0, float(logit_scale),
            ignore_index, entropy, inplace_backward, served_by,
        )  # fmt: skip
    else:
        result = over_sets.FORWARD(
            logits, tokens, mask, temperatures, *kept, scalar, softcap or 0.0, float(logit_scale),
            ignore_index, entropy, served_by,
        )  # fmt: skip
    return LogProbs(result[0], result[1]) if entropy else result[0]


def check(logits: Tensor, tokens: Tensor) -> None:
    _checks.tensor("logits", logits, _checks.FLOATS)
    _checks.tensor("tokens", tokens, _checks.INDICES)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [..., V] with V > 0, got {list(logits.shape)}")
    _checks.shape("tokens", tokens, logits.shape[:-1], "logits without the vocabulary")
    _checks.device("tokens", tokens, logits, "as logits")


def check_transform(
    tokens: Tensor,
    mask: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> None:
    _checks.mask(mask, tokens, "tokens")
    if softcap is not None:
        _checks.number("softcap", softcap, low=0, open_low=True)
    _checks.number("logit_scale", logit_scale, low=0, open_low=True)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")


def split_temperature(temperature: float | Tensor, tokens: Tensor) -> tuple[Tensor | None, float]:
    """One per token, or one for all."""
    if not isinstance(temperature, Tensor):
        _checks.number("temperature", temperature, low=0, open_low=True)
        return None, float(temperature)
    _checks.tensor("temperature", temperature, _checks.FLOATS)
    _checks.device("temperature", temperature, tokens, "as tokens")
    _checks.constant("temperature", temperature)
    try:
        return temperature.expand(tokens.shape), 1.0
    except RuntimeError:
        raise ValueError(
            f"temperature: expected a number or a shape that broadcasts to {list(tokens.shape)} "
            f"(tokens), got {list(temperature.shape)}"
        ) from None


def reference(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
    entropy: bool,
    kept: KeptSet | None = None,
) -> tuple[Tensor, Tensor]:
    live = tokens != ignore_index
    if mask is not None:
        live = live & (mask != 0)
    if not torch.compiler.is_compiling() and logits.device.type != "meta":
        temperatures = temperature if isinstance(temperature, Tensor) else None
        _checks.row_contents(tokens, live, temperatures, logits.shape[-1])
        if kept is not None:
            _kept.contents(live.flatten(), logits.shape[-1], *_kept.sets_of(*kept))
    z = logits if logits.dtype == torch.float64 else logits.float()
    # Selected away before any arithmetic: a NaN under the mask must not reach a product, forward or
    # backward.
    allowed = None if kept is None else _kept.allowed(kept, live, logits.shape[-1])
    z = torch.where(live[..., None] if allowed is None else live[..., None] & allowed, z, 0.0)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if allowed is not None:
        z = z.masked_fill(~allowed, -torch.inf)
    if isinstance(temperature, Tensor):
        temperature = torch.where(live, temperature, 1.0).to(z.dtype)[..., None]
    highest, where_highest = z.max(-1, keepdim=True)
    # Differences from the maximum, first of all: one fp32 log-sum-exp near 1000 would cost 3e-5.
    gap = (z - highest) / temperature

    index = torch.where(live, tokens, 0).long()[..., None]
    target = gap.gather(-1, index)[..., 0]
    others = gap.scatter(-1, index, -torch.inf)
    logprobs = F.logsigmoid(target - _logsumexp(others))
    if allowed is not None:  # elsewhere it is -inf whatever the logits
        logprobs = torch.where(allowed.gather(-1, index)[..., 0], logprobs, logprobs.detach())
    logprobs = torch.where(live, logprobs, 0.0)
    if not entropy:
        return logprobs, logprobs
    # One maximum is taken out of the sum, so that log(sum) = log1p(rest) keeps a rest far below 1.
    weight = gap.exp()
    rest = weight.scatter(-1, where_highest, 0.0).sum(-1)
    gap = torch.where(gap == -torch.inf, 0.0, gap)
    entropies = rest.log1p() - (weight * gap).sum(-1) / (1 + rest)
    return logprobs, torch.where(live, entropies, 0.0)


def _logsumexp(z: Tensor) -> Tensor:
    """The logsumexp over the last dimension, with a zero gradient where all is -inf (V = 1)."""
    empty = (z == -torch.inf).all(-1)
    return torch.where(empty, -torch.inf, torch.where(empty[..., None], 0.0, z).logsumexp(-1))


class _Logprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, *args: Any) -> tuple[Tensor, ...]:
        mask, temperatures, temperature, softcap, scale, ignore_index, *flags, backend = args
        ctx.set_materialize_grads(False)
        result = _FORWARD.below(logits, tokens, *args)
        logprobs, _, state = result
        ctx.save_for_backward(logits, tokens, mask, temperatures, logprobs, state)
        ctx.settings = (temperature, softcap, scale, ignore_index)
        (ctx.entropy, ctx.inplace), ctx.backend = flags, backend
        ctx.mark_non_differentiable(state)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        forbid_double_backward("logprobs_from_logits")
        grad_logprobs, grad_entropy, _ = grads
        if not ctx.entropy:  # compiled graphs give the empty output a gradient
            grad_entropy = None
        nothing = (None,) * 10
        if grad_logprobs is None and grad_entropy is None:
            return (None, *nothing)
        logits = ctx.saved_tensors[0]
        args = (grad_logprobs, grad_entropy, *ctx.saved_tensors, *ctx.settings, ctx.backend)
        if not ctx.inplace:
            return (_BACKWARD(*args), *nothing)
        _BACKWARD_INPLACE(*args)
        # The schema says that the logits are written; the version counter must say so too.
        torch.autograd.graph.increment_version(logits)
        return (logits.detach(), *nothing)


def _autograd(*args: Any) -> tuple[Tensor, ...]:
    logits, inplace = args[0], args[-2]
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return _FORWARD.below(*args)
    if inplace:
        if type(logits) not in (Tensor, torch.nn.Parameter):
            warnings.warn(
                "logprobs_from_logits: inplace_backward=True has no effect under torch.compile; "
                "backward makes a new tensor",
                stacklevel=2,
            )
            args = (*args[:-2], False, args[-1])
        elif logits.is_leaf:
            raise ValueError(
                "inplace_backward: expected logits computed from parameters, got a leaf tensor, "
                "which would lose its values"
            )
    return _Logprob.apply(*args)


def _fake_forward(logits: Tensor, tokens: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    entropy = args[-2]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = tokens.shape
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape if entropy else (0,), dtype=dtype),
        logits.new_empty((*shape, 3), dtype=dtype),
    )


def _fake_backward(g: Tensor | None, h: Tensor | None, logits: Tensor, *args: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_FORWARD = Op(
    "logprob_forward",
    "(Tensor logits, Tensor tokens, Tensor? mask, Tensor? temperatures, float temperature, "
    "float softcap, float logit_scale, int ignore_index, bool entropy, bool inplace_backward) "
    "-> (Tensor, Tensor, Tensor)",
    function="logprobs_from_logits",
    fake=_fake_forward,
    autograd=_autograd,
    cpu=cpu(native.logprob_forward),
    cuda=cuda(native.logprob_forward),
    triton=triton("logprob", "logprob_forward"),
)
_BACKWARD_SCHEMA = (
    "(Tensor? grad_logprobs, Tensor? grad_entropy, Tensor{} logits, Tensor tokens, Tensor? mask, "
    "Tensor? temperatures, Tensor logprobs, Tensor state, float temperature, float softcap, "
    "float logit_scale, int ignore_index) -> {}"
)
_BACKWARD = Op(
    "logprob_backward",
    _BACKWARD_SCHEMA.format("", "Tensor"),
    function="logprobs_from_logits",
    fake=_fake_backward,
    cpu=cpu(native.logprob_backward),
    cuda=cuda(native.logprob_backward),
    triton=triton("logprob", "logprob_backward"),
)
_BACKWARD_INPLACE = Op(
    "logprob_backward_",
    _BACKWARD_SCHEMA.format("(a!)", "()"),
    function="logprobs_from_logits",
    fake=lambda *args: None,
    cpu=cpu(native.logprob_backward_),
    cuda=cuda(native.logprob_backward_),
    triton=triton("logprob", "logprob_backward_"),
)
