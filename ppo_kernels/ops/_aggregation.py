"""How per-token losses become one number: what all losses share.

The choices, their checks, their reference, and backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._op import OPS, Op, forbid_double_backward
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..native import losses as native
from ..triton import kernel as triton

# In the order of enum Aggregation in csrc/kernels.h.
AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-sum-norm",
)
FRAME: str = (
    "Tensor? mask, Tensor? cu_seqlens, int aggregation, Tensor? denominator, float? divisor, "
    "float? norm_length, bool needs_gradient"
)
# The last arguments of every loss op of tokens, and its results.
SCHEMA: str = FRAME + ") -> (Tensor, Tensor, Tensor)"


class Frame(NamedTuple):
    """The arguments of `FRAME`."""

    mask: Tensor | None
    cu_seqlens: Tensor | None
    aggregation: int
    denominator: Tensor | None
    divisor: float | None
    norm_length: float | None
    needs_gradient: bool


def frame(
    live_name: str,
    live: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    aggregation: str,
    denominator: float | Tensor | None,
    norm_length: float | None,
) -> Frame:
    """Checks what all losses share; `live` was checked to be a float tensor."""
    if live.dim() not in (1, 2):
        raise ValueError(
            f"{live_name}: expected shape [B, T] or packed [N], got {list(live.shape)}"
        )
    _checks.mask(mask, live, live_name)
    if cu_seqlens is not None:
        _checks.cu_seqlens(cu_seqlens, live, live_name)
    if aggregation not in AGGREGATIONS:
        _checks.choice("aggregation", aggregation, AGGREGATIONS)
    by_sequence = aggregation.startswith("seq-")
    if by_sequence and live.dim() == 1 and cu_seqlens is None:
        raise ValueError(
            f"cu_seqlens: expected offsets, as aggregation {aggregation!r} needs the sequences of "
            f"packed {live_name}, got None"
        )
    if aggregation == "seq-sum-norm":
        if norm_length is None:
            raise ValueError("norm_length: expected a number, as 'seq-sum-norm' needs, got None")
        _checks.number("norm_length", norm_length, low=0, open_low=True)
    elif norm_length is not None:
        raise ValueError(
            f"norm_length: expected None, as only 'seq-sum-norm' uses it, got {norm_length}"
        )
    divisor = None
    if isinstance(denominator, Tensor):
        _checks.tensor("denominator", denominator, (*_checks.FLOATS, *_checks.INDICES))
        _checks.shape("denominator", denominator, (), "one number")
        _checks.device("denominator", denominator, live, f"as {live_name}")
        _checks.constant("denominator", denominator)
    elif denominator is not None:
        _checks.number("denominator", denominator, low=0)
        divisor, denominator = float(denominator), None
    return Frame(
        mask, cu_seqlens, AGGREGATIONS.index(aggregation), denominator, divisor,
        None if norm_length is None else float(norm_length),
        live.requires_grad and torch.is_grad_enabled(),
    )  # fmt: skip


class Batch:
    """Live tokens and sequences of one call, for the references."""

    def __init__(self, tokens: Tensor, frame: Frame) -> None:
        mask, cu_seqlens = frame.mask, frame.cu_seqlens
        self.live = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask != 0
        self.index: Tensor | None = None
        self.count = 0 if tokens.dim() == 1 else tokens.shape[0]
        if cu_seqlens is not None:
            if not torch.compiler.is_compiling() and tokens.device.type == "cpu":
                _checks.cu_seqlens_contents(cu_seqlens, tokens.shape[0])
            position = torch.arange(tokens.shape[0]).to(cu_seqlens)
            self.index = torch.searchsorted(cu_seqlens[1:].contiguous(), position, right=True)
            self.count = cu_seqlens.shape[0] - 1

    def select(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros at masked positions, before any arithmetic; spreads one value per sequence."""
        if x.shape != self.live.shape:
            x = self.spread(x)
        return torch.where(self.live, x.to(dtype), 0.0)

    def spread(self, x: Tensor) -> Tensor:
        """One value per sequence, in a shape that broadcasts to the tokens."""
        return x[:, None] if self.index is None else x[self.index]

    def sequence_sums(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x.sum(-1)
        if self.index is None:
            return x.new_zeros(0)
        return x.new_zeros(self.count).index_add(0, self.index, x)

    def sequence_means(self, x: Tensor) -> Tensor:
        """The mean over the live tokens of its sequence at each token; masked tokens of x are 0."""
        lengths = self.sequence_sums(self.live.to(x.dtype)).clamp(min=1)
        return torch.where(self.live, self.spread(self.sequence_sums(x) / lengths), 0.0)

    def live_sequences(self) -> Tensor:
        return (self.sequence_sums(self.live.long()) > 0).sum()

    def weights(self, frame: Frame, dtype: torch.dtype) -> Tensor:
        """What a live token counts, in a shape that broadcasts to the tokens."""
        name = AGGREGATIONS[frame.aggregation]
        if frame.denominator is not None:
            divisor = frame.denominator.double()
        elif frame.divisor is not None:
            divisor = self.live.new_full((), frame.divisor, dtype=torch.float64)
        elif name == "token-mean":
            divisor = self.live.sum().double()
        elif name == "token-sum":
            divisor = self.live.new_ones((), dtype=torch.float64)
        else:
            divisor = self.live_sequences().double()
        if frame.norm_length is not None:
            divisor = divisor * frame.norm_length
        empty = divisor == 0
        weight = torch.where(empty, 0.0, 1 / torch.where(empty, 1.0, divisor))
        if name == "seq-mean-token-mean":
            lengths = self.sequence_sums(self.live.long())
            weight = self.spread(weight / lengths.clamp(min=1))
        return weight.to(dtype)

    def aggregate(self, token_loss: Tensor, frame: Frame) -> Tensor:
        weights = self.weights(frame, token_loss.dtype)
        return torch.where(weights == 0, 0.0, token_loss * weights).sum()


class Loss(torch.autograd.Function):
    """A loss op: its forward pass has already made the final gradient of the first argument."""

    @staticmethod
    def forward(ctx: Any, op: Op, public_name: str, live: Tensor, *args: Any) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # for the gradient itself, which has none
        loss, stats, gradient = op.below(live, *args)
        ctx.save_for_backward(gradient)
        ctx.public_name, ctx.dtype, ctx.backend, ctx.constants = (
            public_name, live.dtype, args[-1], len(args),
        )  # fmt: skip
        ctx.mark_non_differentiable(stats, gradient)
        return loss, stats, gradient

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward(ctx.public_name)
        if upstream is None:
            return (None,) * (3 + ctx.constants)
        (gradient,) = ctx.saved_tensors
        gradient = scaled(gradient, upstream, ctx.dtype, ctx.backend)
        return (None, None, gradient, *(None,) * ctx.constants)


def scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """A gradient that forward has made, times what comes from above; itself if that is 1."""
    if gradient.dtype == dtype and is_one(upstream):
        return gradient
    return _SCALE(gradient, upstream, dtype, backend)


def is_one(upstream: Tensor) -> bool:
    """Whether it is known to be 1: on the CPU, outside traced graphs, where reading is free."""
    return type(upstream) is Tensor and upstream.device.type == "cpu" and upstream.item() == 1


def autograd(op_name: str, *args: Any) -> tuple[Tensor, ...]:
    """What a loss op runs at the Autograd key; the last arguments: needs_gradient, backend."""
    op, live = OPS[op_name], args[0]
    if not (torch.is_grad_enabled() and live.requires_grad):
        return op.below(*args)
    if not args[-2]:
        raise RuntimeError(f"ppo_kernels::{op_name}: an input requires grad, pass needs_gradient")
    return Loss.apply(op, op_name, *args)


def result_dtype(*tokens: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tokens)
    return torch.float64 if wide else torch.float32


def fake(
    stats_size: int, tokens: tuple[Tensor | None, ...], needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    live, dtype = tokens[0], result_dtype(*tokens)
    assert live is not None
    return (
        live.new_empty((), dtype=dtype),
        live.new_empty(stats_size, dtype=torch.float64),
        live.new_empty(live.shape if needs_gradient else (0,), dtype=dtype),
    )


_SCALE = Op(
    "scale_gradient",
    "(Tensor gradient, Tensor upstream, ScalarType dtype) -> Tensor",
    function="clipped_loss",
    fake=lambda gradient, upstream, dtype: gradient.new_empty(gradient.shape, dtype=dtype),
    cpu=cpu(native.scale_gradient),
    cuda=cuda(native.scale_gradient),
    triton=triton("losses", "scale_gradient"),
)
SCALE_INPLACE = Op(
    "scale_gradient_",
    "(Tensor(a!) gradient, Tensor upstream) -> ()",
    function="clipped_loss",
    fake=lambda gradient, upstream: None,
    cpu=cpu(native.scale_gradient_),
    cuda=cuda(native.scale_gradient_),
    triton=triton("losses", "scale_gradient_"),
)
