"""The losses in loops of plain Python, and what their tests call them with."""

import math

import pytest
import torch
from device import DEVICE, kernels, seeded

import ppo_kernels as pk
from ppo_kernels.testing import executors

NAMES = executors("clipped_loss", "value_loss", device=DEVICE)
EXECUTORS = pytest.mark.parametrize("name", NAMES)
KERNELS = pytest.mark.parametrize("backend", kernels("clipped_loss", "value_loss"))
BACKENDS = pytest.mark.parametrize("backend", ["torch", *kernels("clipped_loss", "value_loss")])
LOSSES = pytest.mark.parametrize("function", [pk.clipped_loss, pk.value_loss])
NORM = {"seq-sum-norm": 6.0}


def tokens(*shape, seed=0, dtype=torch.float64, spread=0.4):
    """Three token tensors, as either loss takes them."""
    g = seeded(seed)
    first = -torch.randn(shape, generator=g, dtype=torch.float64).abs()
    second = first + spread * torch.randn(shape, generator=g, dtype=torch.float64)
    third = torch.randn(shape, generator=g, dtype=torch.float64)
    return first.to(dtype), second.to(dtype), third.to(dtype)


def some_mask(*shape, seed=0):
    return torch.rand(shape, generator=seeded(seed)) < 0.7


def with_grad(function, live, *args, upstream=1.0, **kwargs):
    live = live.detach().clone().requires_grad_()
    loss, metrics = function(live, *args, **kwargs)
    (loss * upstream if upstream != 1.0 else loss).backward()
    return loss.detach(), live.grad, metrics


def bits(function, *args, **kwargs):
    loss, grad, m = with_grad(function, *args, **kwargs)
    return loss, grad, m.stats


# ---- loops in plain Python ---------------------------------------------------------------------


def plain_policy(x, a, low, high, dual, clamp):
    """Loss, d loss / d x and which bound cut it, for one token with log-ratio x."""
    flows = clamp is None or -clamp <= x <= clamp
    if clamp is not None:
        x = min(max(x, -clamp), clamp)
    r = math.exp(x)
    unclipped, clipped = -a * r, -a * min(max(r, 1 - low), 1 + high)
    loss, slope, cut = unclipped, unclipped, None
    if clipped > unclipped:
        loss, slope, cut = clipped, 0.0, "high" if a > 0 else "low"
    if dual is not None and a < 0 and -a * dual < loss:
        loss, slope, cut = -a * dual, 0.0, "dual"
    return loss, slope if flows else 0.0, cut, x, r


def plain_value(v, old, target, clip, delta):
    def h(e):
        far = delta is not None and abs(e) > delta
        return delta * (abs(e) - delta / 2) if far else e * e / 2

    def slope(e):
        return e if delta is None else min(max(e, -delta), delta)

    loss, gradient, cut = h(v - target), slope(v - target), False
    if clip is not None:
        other = h(old + min(max(v - old, -clip), clip) - target)
        if other > loss + 1e-12:
            loss, gradient, cut = other, 0.0, True
    return loss, gradient, cut


def plain_weights(rows, aggregation, denominator):
    """Weights of the live tokens of each row; rows hold booleans."""
    live = sum(map(sum, rows))
    sequences = sum(any(row) for row in rows)
    if denominator is None:
        denominator = {"token-mean": live, "token-sum": 1}.get(aggregation, sequences)
    denominator *= NORM.get(aggregation, 1)
    return [
        [
            m and 1 / (denominator * (sum(row) if aggregation == "seq-mean-token-mean" else 1))
            for m in row
        ]
        for row in rows
    ]


def split(flat, ends):
    starts = [0, *ends[:-1]]
    return [flat[a:b] for a, b in zip(starts, ends, strict=True)]
