"""The losses in loops of plain Python, and what their tests call them with."""

import math
from itertools import pairwise

import pytest
import torch
from device import DEVICE, kernels, seeded
from hypothesis import strategies as st
from torch.testing import assert_close

import ppo_kernels as pk
from ppo_kernels.testing import executor, executors

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


def plain_variant(variant, row, low, high, *, dual=None, clamp=None, tau_pos=1.0, tau_neg=1.05):
    """As `plain_policy` for each (log p, log p_old, advantage) of the live tokens of a sequence."""
    moved = [p - q for p, q, _ in row]
    xs = moved if clamp is None else [min(max(x, -clamp), clamp) for x in moved]
    made = []
    if variant == "gmpo":
        cuts = [
            (a > 0 and x > high) or (a < 0 and x < -low) for x, (*_, a) in zip(xs, row, strict=True)
        ]
        kept = [max(min(x, high), -low) if cut else x for x, cut in zip(xs, cuts, strict=True)]
        mean_a = sum(a for *_, a in row) / max(len(row), 1)
        loss = -mean_a * math.prod(map(math.exp, kept)) ** (1 / max(len(row), 1))
    for i, (x, (logp, _, a)) in enumerate(zip(xs, row, strict=True)):
        r, flows = math.exp(x), moved[i] == x
        side = "high" if a > 0 else "low"
        if variant == "gspo":
            mean = math.prod(map(math.exp, xs)) ** (1 / len(xs))
            token = plain_policy(math.log(mean), a, low, high, dual, None)[:3]
        elif variant == "gmpo":
            token = loss, 0.0 if cuts[i] else loss, side if cuts[i] else None
        elif variant == "cispo":
            w = min(max(r, 1 - low), 1 + high)
            token = -w * a * logp, -w * a, "high" if r > w else "low" if r < w else None
            flows = True
        elif variant == "sapo":
            tau = tau_pos if a > 0 else tau_neg
            gate = (1 + math.tanh(tau * (r - 1) / 2)) / 2
            token = -a * 4 * gate / tau, -a * r / math.cosh(tau * (r - 1) / 2) ** 2, None
        elif variant == "gpg":
            token, flows = (-a * logp, -a, None), True
        else:
            token = plain_policy(x, a, low, high, dual, None)[:3]
        made.append((token[0], token[1] if flows else 0.0, token[2]))
    return made


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


# ---- parts of a batch --------------------------------------------------------------------------


@st.composite
def batches(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    cuts = draw(st.lists(st.integers(0, len(lengths)), max_size=3))
    return lengths, sorted({0, len(lengths), *cuts}), draw(st.integers(0, 2**16))


def denominators(aggregation, rows):
    live = sum(int(r.sum()) for r in rows)
    sequences = sum(bool(r.any()) for r in rows)
    return {"token-mean": live, "token-sum": 3}.get(aggregation, sequences)


def check_parts(name, function, aggregation, batch, exact_bits=True):
    """Sequences of any length, packed, padded, and cut into micro-batches in either form."""
    lengths, cuts, seed = batch
    total, longest = sum(lengths), max(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    flat = tokens(total, seed=seed)
    mask = some_mask(total, seed=seed)
    inside = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def pad(t):
        return torch.full(inside.shape, 7, dtype=t.dtype).masked_scatter(inside, t)

    padded = [pad(t) for t in flat]
    padded_mask = pad(mask) & inside
    rows = [mask[a:b] for a, b in pairwise(offsets)]
    kwargs = {
        "aggregation": aggregation,
        "norm_length": NORM.get(aggregation),
        "denominator": denominators(aggregation, rows),
    }
    with executor(name):
        loss, grad, m = with_grad(function, *flat, mask, cu_seqlens=offsets, **kwargs)
        padded_loss, padded_grad, padded_m = with_grad(function, *padded, padded_mask, **kwargs)
        parts = []
        for a, b in pairwise(cuts):
            inputs = [t[offsets[a] : offsets[b]] for t in (*flat, mask)]
            part_offsets = offsets[a : b + 1] - offsets[a]
            parts.append(with_grad(function, *inputs, cu_seqlens=part_offsets, **kwargs))
        padded_parts = [
            with_grad(function, *(t[a:b] for t in (*padded, padded_mask)), **kwargs)
            for a, b in pairwise(cuts)
        ]
    close = {"rtol": 1e-12, "atol": 1e-14}

    def same(a, b):
        if exact_bits:
            assert torch.equal(a, b)
        else:
            assert_close(a, b, **close)

    assert_close(padded_loss, loss, **close)
    same(padded_grad[inside], grad)
    assert_close(padded_m.stats, m.stats, **close)
    for some in (parts, padded_parts):
        assert_close(sum(p[0] for p in some), loss, **close)
        assert_close(pk.reduce_metrics([p[2] for p in some]).stats, m.stats, **close)
    same(torch.cat([p[1] for p in parts]), grad)
    same(torch.cat([p[1] for p in padded_parts]), padded_grad)
