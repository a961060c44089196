"""The clipped value loss, its metrics and its gradient."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._op import Op, count
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..metrics import VALUE_STATS, ValueMetrics
from ..native import losses as native
from ..triton import kernel as triton
from . import _aggregation
from ._aggregation import Batch, Frame


class ValueLoss(NamedTuple):
    """The value loss and what was measured on the way."""

    loss: Tensor
    metrics: ValueMetrics


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    mask: Tensor | None = None,
    *,
    clip: float | None = 0.2,
    huber_delta: float | None = None,
    aggregation: str = "token-mean",
    denominator: float | Tensor | None = None,
    norm_length: float | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> ValueLoss:
    r"""PPO's clipped value loss with its metrics; one pass also makes the gradient.

    .. math::
        v_t' &= v_t^{old} + \mathrm{clip}(v_t - v_t^{old}, -c, c) \\
        l_t &= \max\bigl(h(v_t - R_t), h(v_t' - R_t)\bigr) \\
        L &= \sum_t w_t\, l_t

    with h(e) = e^2 / 2, or with `huber_delta` d and |e| > d: d (|e| - d / 2). So the loss is half
    of the larger square. The weights w are those of `clipped_loss`.

    The clipping is that of OpenAI's baselines (ppo2), which the PPO paper does not mention; h is
    Huber's (1964).

    Equivalent to::

        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = 0.5 * torch.max((values - returns) ** 2, (near - returns) ** 2)[mask].mean()

    Args:
        values: [B, T] or packed [N], fp32, bf16, fp16 or fp64, any strides.
        old_values: As values, from when the samples were made; a constant. May be None if `clip` is
            None.
        returns: As values, the targets; a constant.
        mask: As values, any dtype, nonzero = use. What lies under it is never looked at.
        clip: c above, at least 0; None for none.
        huber_delta: d above, larger than 0; None for squares everywhere.
        aggregation: As in `clipped_loss`, like the next three.
        denominator: The global count that the loss is divided by.
        norm_length: For seq-sum-norm, and only there.
        cu_seqlens: [S + 1], the offsets of the sequences in packed tensors.
        backend: See `use_backend`.

    Returns:
        ``ValueLoss(loss, metrics)``: the 0-d loss, fp32 (fp64 if an input is), and `ValueMetrics`
        of 0-d tensors. The gradient has the dtype of values, rounded once. It is 0 where the
        clipped error is strictly the larger; at ties it flows. With no live token the loss is 0 and
        so is its gradient. A NaN in a live input gives NaN.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected.
    """
    _checks.tensor("values", values, _checks.FLOATS)
    frame = _aggregation.frame(
        "values", values, mask, cu_seqlens, aggregation, denominator, norm_length
    )
    if clip is not None:
        _checks.number("clip", clip, low=0)
    if huber_delta is not None:
        _checks.number("huber_delta", huber_delta, low=0, open_low=True)
    if old_values is not None or clip is not None:
        _check_constant("old_values", old_values, values)
    _check_constant("returns", returns, values)

    served_by = _LOSS.resolve(values.device, backend)
    args = (values, None if clip is None else old_values, returns, clip, huber_delta)
    if served_by == "torch":
        count("value_loss", "torch")
        loss, stats = _reference(*args, frame)
    else:
        loss, stats, _ = _LOSS(*args, *frame, served_by)
    return ValueLoss(loss, ValueMetrics(stats))


def _check_constant(name: str, value: Tensor | None, values: Tensor) -> None:
    _checks.tensor(name, value, _checks.FLOATS)
    assert value is not None
    _checks.shape(name, value, values.shape, "as values")
    _checks.device(name, value, values, "as values")
    _checks.constant(name, value)


def _reference(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    clip: float | None,
    huber_delta: float | None,
    frame: Frame,
) -> tuple[Tensor, Tensor]:
    batch = Batch(values, frame)
    dtype = _aggregation.result_dtype(values, old_values, returns)
    v, target = batch.select(values, dtype), batch.select(returns, dtype)
    error = v - target
    clipped = torch.zeros_like(batch.live)
    if clip is not None and old_values is not None:
        old = batch.select(old_values, dtype)
        moved = (v - old).detach()
        # A NaN among the old values must not be lost to a comparison.
        error = error + torch.where(moved.isnan(), moved, 0.0)
        near = old + moved.clamp(-clip, clip)
        near_error = torch.where(moved.abs() > clip, near - target, error.detach())
        clipped = near_error.abs() > error.detach().abs()
        error = torch.where(clipped, near_error, error)
    token_loss = 0.5 * error.square()
    if huber_delta is not None:
        far = error.abs() > huber_delta
        near = torch.where(far, 0.0, error)
        token_loss = torch.where(
            far, huber_delta * (error.abs() - 0.5 * huber_delta), 0.5 * near.square()
        )
    v, target = v.detach().double(), target.double()
    named = {
        "tokens": batch.live.sum(),
        "sequences": batch.live_sequences(),
        "loss": token_loss.detach().double().sum(),
        "clipped": clipped.sum(),
        "value": v.sum(),
        "return": target.sum(),
        "error": (v - target).sum(),
        "error_square": (v - target).square().sum(),
        "return_square": target.square().sum(),
    }
    stats = torch.stack([named[name].double() for name in VALUE_STATS])
    return batch.aggregate(token_loss, frame), stats


def _fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _aggregation.fake(len(VALUE_STATS), args[:3], args[-1])


_LOSS = Op(
    "value_loss",
    "(Tensor values, Tensor? old_values, Tensor returns, float? clip, float? huber_delta, "
    + _aggregation.SCHEMA,
    function="value_loss",
    fake=_fake,
    autograd=lambda *args: _aggregation.autograd("value_loss", *args),
    cpu=cpu(native.value_loss),
    cuda=cuda(native.value_loss),
    triton=triton("losses", "value_loss"),
)
