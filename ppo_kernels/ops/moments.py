"""Masked sums, means and whitening."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _checks
from .._op import Op, count, forbid_double_backward
from ..cpu import kernel as cpu
from ..cuda import kernel as cuda
from ..native import moments as native
from ..triton import kernel as triton


def masked_sum(
    x: Tensor, mask: Tensor | None = None, dim: int | None = None, *, backend: str | None = None
) -> Tensor:
    """Sum of the live elements, of all of them or along one dimension.

    Summed in double over fixed blocks and rounded once: the same bits for every number of threads.

    Equivalent to::

        torch.where(mask != 0, x, 0).sum(dim, dtype=torch.float64).float()

    Args:
        x: Any shape and strides, fp32, bf16, fp16 or fp64. Differentiable, any number of times.
        mask: As x, nonzero = use. What lies under the mask has no effect, NaN included.
        dim: The dimension to sum over, negative from the end; None for all.
        backend: See `use_backend`.

    Returns:
        x's shape without `dim`, or a scalar, in fp32 (fp64 for fp64 x). Nothing live gives 0.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected.
    """
    return _reduce(_SUM, x, mask, dim, backend)


def masked_mean(
    x: Tensor, mask: Tensor | None = None, dim: int | None = None, *, backend: str | None = None
) -> Tensor:
    """Mean of the live elements, of all of them or along one dimension.

    As `masked_sum`, divided by the number of live elements before the one rounding. Where nothing
    is live the mean is 0, with a zero gradient.
    """
    return _reduce(_MEAN, x, mask, dim, backend)


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
    group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Live elements shifted to mean 0 and scaled to variance 1, as PPO does with advantages.

    .. math::
        y = (x - \mu) / \sqrt{\sigma^2 + \epsilon} \quad [\, + \mu \text{ if not shift\_mean} \,]

    Moments are merged in double from fixed blocks (Chan, Golub & LeVeque 1979), so a mean far
    larger than the spread costs no accuracy and the bits depend on no thread count. PPO whitens
    advantages (Andrychowicz et al. 2020, arXiv:2006.05990; Huang et al. 2022, "The 37
    Implementation Details of PPO") and, with `shift_mean=False`, may scale rewards while keeping
    their mean (Huang et al. 2024, arXiv:2403.17031). Here eps is inside the square root, as in most
    language-model code; much of classic control adds it to the standard deviation.

    Equivalent to::

        live = x[mask != 0]
        y = (x - live.mean()) * torch.rsqrt(live.var(unbiased=unbiased) + eps)
        y = torch.where(mask != 0, y if shift_mean else y + live.mean(), 0)

    Where all live elements are equal the result is exactly 0 (the mean, if not `shift_mean`). Where
    they are nearly equal, whitening blows their differences up to variance 1 whatever they mean,
    and by up to 1 / sqrt(eps): advantages of an almost converged policy are mostly noise. Choose
    `eps` of the order of the variance below which differences should stay small.

    Args:
        x: Any shape and strides, fp32, bf16, fp16 or fp64. Differentiable, unless a `group` is
            given: other ranks' elements depend on x too, so x must then not require grad.
        mask: As x, nonzero = use. What lies under the mask has no effect, NaN included.
        shift_mean: False keeps the mean and only scales around it.
        unbiased: Divide by count - 1 (a single live element has variance 0), else by count.
        eps: Added to the variance, inside the square root; at least 0. With 0, equal elements
            give NaN, as 0 / 0 does.
        group: A torch.distributed process group over whose ranks the moments are taken, merged in
            the order of ranks, to the same bits on every rank. All ranks must call; each may have
            any number of elements. One all_gather of three doubles, no host synchronisation.
        backend: See `use_backend`.

    Returns:
        y in x's shape, fp32 (fp64 for fp64 x); masked elements give 0. If no element is live, or
        x is empty, all are 0. A NaN or infinity in a live element makes every live result NaN.

    Raises:
        TypeError, ValueError: Naming the argument, what was given and what was expected.
    """
    _checks.tensor("x", x, _checks.FLOATS)
    _checks.mask(mask, x, "x")
    _checks.number("eps", eps, low=0)
    settings = (bool(shift_mean), bool(unbiased), float(eps))
    served_by = _WHITEN.resolve(x.device, backend)
    if served_by == "torch":
        count("whiten", "torch")
    if group is None:
        if served_by == "torch":
            z = x.double()
            y = _apply_reference(z, mask, _moments_reference(z, mask), *settings)
            return y.to(_checks.compute_dtype(x))
        whitened: Tensor = _WHITEN(x, mask, *settings, served_by)[0]
        return whitened

    if not isinstance(group, getattr(dist, "ProcessGroup", ())):
        raise TypeError(
            f"group: expected a torch.distributed process group, got {type(group).__name__}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x: whiten over a group is not differentiable; pass x.detach()")
    if served_by == "torch":
        z = x.double()
        moments = _over_ranks(_moments_reference(z, mask), group)
        return _apply_reference(z, mask, moments, *settings).to(_checks.compute_dtype(x))
    moments = _over_ranks(_MOMENTS(x, mask, served_by), group)
    applied: Tensor = _APPLY(x, mask, moments, *settings, served_by)
    return applied


def _over_ranks(moments: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Count, mean and sum of squared deviations of the union of all ranks' elements."""
    ranks = [torch.empty_like(moments) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, moments, group)
    counts, means, m2s = torch.stack(ranks).unbind(1)
    # Distances from one rank's mean: equal means give exactly that mean.
    pivot = means[(counts > 0).int().argmax()]
    total = counts.sum()
    mean = pivot + (counts * (means - pivot)).sum() / total.clamp(min=1)
    return torch.stack([total, mean, (m2s + counts * (means - mean).square()).sum()])


def _reduce(op: Op, x: Tensor, mask: Tensor | None, dim: int | None, backend: str | None) -> Tensor:
    _checks.tensor("x", x, _checks.FLOATS)
    _checks.mask(mask, x, "x")
    if dim is not None:
        rank = max(x.dim(), 1)
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim: expected an int or None, got {type(dim).__name__}")
        if not -rank <= dim < rank:
            raise ValueError(f"dim: expected a dimension in [{-rank}, {rank - 1}], got {dim}")
        dim %= rank
    served_by = op.resolve(x.device, backend)
    if served_by == "torch":
        count(op.function, "torch")
        return _reduce_reference(x, mask, dim, op is _MEAN)
    result: Tensor = op(x, mask, dim, served_by)[0]
    return result


# ---- references --------------------------------------------------------------------------------


def _nonzero(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != 0


def _live(x: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(x, dtype=torch.bool) if mask is None else _nonzero(mask)


def _reduce_reference(x: Tensor, mask: Tensor | None, dim: int | None, mean: bool) -> Tensor:
    live = _live(x, mask)
    total = torch.where(live, x, 0.0).sum(dim, dtype=torch.float64)
    if mean:
        total = total / live.sum(dim).clamp(min=1)
    return total.to(_checks.compute_dtype(x))


def _moments_reference(z: Tensor, mask: Tensor | None) -> Tensor:
    if z.numel() == 0:
        return z.new_zeros(3)
    live = _live(z, mask)
    count = live.sum(dtype=torch.float64)
    # Sums of distances to one of the elements: equal elements give exactly that mean.
    pivot = torch.where(live, z.detach(), -torch.inf).amax()
    pivot = torch.where(count > 0, pivot, 0.0)
    mean = pivot + torch.where(live, z - pivot, 0.0).sum() / count.clamp(min=1)
    return torch.stack([count, mean, torch.where(live, z - mean, 0.0).square().sum()])


def _apply_reference(
    z: Tensor, mask: Tensor | None, moments: Tensor, shift_mean: bool, unbiased: bool, eps: float
) -> Tensor:
    live = _live(z, mask)
    n, mean, m2 = moments.unbind()
    variance = m2 / (n - int(unbiased)).clamp(min=1)
    y = (torch.where(live, z, 0.0) - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        y = y + mean
    return torch.where(live, y, 0.0)


# ---- autograd and ops --------------------------------------------------------------------------


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, op: Op, x: Tensor, mask: Tensor | None, dim: int | None, backend: str
    ) -> tuple[Tensor, Tensor]:
        total, live = op.below(x, mask, dim, backend)
        ctx.save_for_backward(mask, live if op is _MEAN else None)
        ctx.shape, ctx.dtype, ctx.dim = x.shape, x.dtype, dim
        ctx.mark_non_differentiable(live)
        return total, live

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # Linear: torch's own operations, so that torch differentiates this again.
        mask, live = ctx.saved_tensors
        if live is not None:
            grad = grad.double() / live.clamp(min=1)
        if ctx.dim is not None and ctx.shape:
            grad = grad.unsqueeze(ctx.dim)
        grad = grad.to(ctx.dtype).expand(ctx.shape)
        grad = grad if mask is None else torch.where(_nonzero(mask), grad, 0.0)
        return None, grad, None, None, None


class _Whiten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
        y, moments = _WHITEN.below(x, mask, *settings)
        ctx.save_for_backward(x, mask, moments)
        ctx.settings = settings
        ctx.mark_non_differentiable(moments)
        return y, moments

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        forbid_double_backward("whiten")
        return (_WHITEN_BACKWARD(grad, *ctx.saved_tensors, *ctx.settings), *(None,) * 5)


def _autograd_reduce(op: Op, x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Reduce.apply(op, x, *args)
    return op.below(x, *args)


def _autograd_whiten(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and x.requires_grad:
        return _Whiten.apply(x, *args)
    return _WHITEN.below(x, *args)


def _fake_reduce(x: Tensor, mask: Tensor | None, dim: int | None) -> tuple[Tensor, Tensor]:
    shape = () if dim is None else (*x.shape[:dim], *x.shape[dim + 1 :])
    return (
        x.new_empty(shape, dtype=_checks.compute_dtype(x)),
        x.new_empty(shape, dtype=torch.float64),
    )


def _fake_moments(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)


def _fake_apply(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=_checks.compute_dtype(x))


_REDUCE_SCHEMA = "(Tensor x, Tensor? mask, int? dim) -> (Tensor, Tensor)"
_SUM: Op = Op(
    "masked_sum",
    _REDUCE_SCHEMA,
    function="masked_sum",
    fake=_fake_reduce,
    autograd=lambda *args: _autograd_reduce(_SUM, *args),
    cpu=cpu(partial(native.masked_reduce, mean=False)),
    cuda=cuda(partial(native.masked_reduce, mean=False)),
    triton=triton("moments", "masked_sum"),
)
_MEAN: Op = Op(
    "masked_mean",
    _REDUCE_SCHEMA,
    function="masked_mean",
    fake=_fake_reduce,
    autograd=lambda *args: _autograd_reduce(_MEAN, *args),
    cpu=cpu(partial(native.masked_reduce, mean=True)),
    cuda=cuda(partial(native.masked_reduce, mean=True)),
    triton=triton("moments", "masked_mean"),
)
_MOMENTS = Op(
    "moments",
    "(Tensor x, Tensor? mask) -> Tensor",
    function="whiten",
    fake=_fake_moments,
    cpu=cpu(native.moments),
    cuda=cuda(native.moments),
    triton=triton("moments", "moments"),
)
_WHITEN = Op(
    "whiten_forward",
    "(Tensor x, Tensor? mask, bool shift_mean, bool unbiased, float eps) -> (Tensor, Tensor)",
    function="whiten",
    fake=lambda x, *args: (_fake_apply(x), _fake_moments(x)),
    autograd=_autograd_whiten,
    cpu=cpu(native.whiten_forward),
    cuda=cuda(native.whiten_forward),
    triton=triton("moments", "whiten_forward"),
)
_APPLY = Op(
    "whiten_apply",
    "(Tensor x, Tensor? mask, Tensor moments, bool shift_mean, bool unbiased, float eps) -> Tensor",
    function="whiten",
    fake=_fake_apply,
    cpu=cpu(native.whiten_apply),
    cuda=cuda(native.whiten_apply),
    triton=triton("moments", "whiten_apply"),
)
_WHITEN_BACKWARD = Op(
    "whiten_backward",
    "(Tensor grad, Tensor x, Tensor? mask, Tensor moments, bool shift_mean, bool unbiased, "
    "float eps) -> Tensor",
    function="whiten",
    fake=lambda grad, x, *args: x.new_empty(x.shape),
    cpu=cpu(native.whiten_backward),
    cuda=cuda(native.whiten_backward),
    triton=triton("moments", "whiten_backward"),
)
