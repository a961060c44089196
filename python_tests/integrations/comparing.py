"""Ours and a host's function on the same inputs, held to the host's in float64."""

import torch

DTYPES = (torch.float32, torch.bfloat16)


def compare(ours, host, inputs, differentiable=(), live=None, scale=None, truth=None, slack=1):
    """Ours are as close to the host's function in float64 as the host's own, or within rounding.

    `inputs` are float tensors, given in fp32 and in bf16; of those whose index is in
    `differentiable` the gradients are compared too. Shapes and dtypes of results have to agree.
    Where a result has the shape of `live` only the live elements are compared, and ours of the
    others must be 0. `scale` is the size of what is summed, where results are much smaller. `truth`
    is what to hold both to where the host has parts in fp32 whatever its inputs; `slack` times the
    host's error is allowed, more than 1 where matrix products in fp32 add in another order.
    """
    for dtype in DTYPES:
        rounded = [x.to(dtype) for x in inputs]
        exact = _run(truth or host, [x.double() for x in rounded], differentiable)
        theirs, made = (_run(f, rounded, differentiable) for f in (host, ours))
        assert len(made) == len(theirs)
        for i, trio in enumerate(zip(made, theirs, exact, strict=True)):
            mine, other, _ = trio
            what = f"result {i} in {dtype}"
            assert mine.shape == other.shape, what
            assert mine.dtype == other.dtype, (
                f"{what}: {mine.dtype}, the host{chr(39)}s {other.dtype}"
            )
            is_gradient = i >= len(made) - len(differentiable)
            chosen = ...
            if live is not None and mine.shape == live.shape and not is_gradient:
                assert (mine[~live] == 0).all(), what
                chosen = live
            check(what, *(x[chosen] for x in trio), scale, slack)


def check(what, mine, other, exact, scale=None, slack=1):
    mine, other, exact, dtype = mine.double(), other.double(), exact.double(), mine.dtype
    same = (mine == exact) | (mine.isnan() & exact.isnan())
    error, allowed = ((x - exact).abs()[~same] for x in (mine, other))
    size = exact.abs().nan_to_num(0, 0, 0).amax() if exact.numel() else 0
    size = max(float(size), scale or 0)
    # Four ulps of fp32, in which both compute, or the one rounding to half precision.
    eps = max(
        4 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps if dtype.itemsize < 4 else 0
    )
    host = slack * float(allowed.nan_to_num(0, 0, 0).max()) if error.numel() else 0
    bound = max(host, size * eps)
    assert (error <= bound).all(), (
        f"{what}: error {error.max():.3g}, the host's {allowed.max():.3g}, of {size:.3g}"
    )


def _run(function, inputs, differentiable):
    inputs = [x.detach().clone().requires_grad_(i in differentiable) for i, x in enumerate(inputs)]
    results = list(_tensors(function(*inputs)))
    flowing = [r for r in results if r.requires_grad]
    if differentiable:
        generator = torch.Generator().manual_seed(7)
        upstream = [torch.randn(r.shape, generator=generator).to(r.dtype) for r in flowing]
        results += torch.autograd.grad(flowing, [inputs[i] for i in differentiable], upstream)
    return [r.detach() for r in results]


def _tensors(result):
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, dict):
        for value in result.values():
            yield torch.tensor(value, dtype=torch.float32)  # a number made of one
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from _tensors(part)


def ragged(rows=5, steps=12, gaps=True):
    """A mask: sequences of all lengths, one without a token, one with all."""
    lengths = torch.tensor([steps, 0, 1, steps // 2, steps - 1])[torch.arange(rows) % 5]
    mask = torch.arange(steps) < lengths[:, None]
    if gaps:
        mask[0, 3:5] = mask[3, 2] = False
    return mask


def policies(rows=5, steps=12, seed=0, spread=0.5):
    """Log-probabilities now and then, and advantages; a few steps far apart."""
    g = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, steps, generator=g)
    new = old + spread * torch.randn(rows, steps, generator=g)
    new[0, 0], new[0, 1], new[-1, 0] = old[0, 0], old[0, 1] + 25, old[-1, 0] - 25
    advantages = torch.randn(rows, steps, generator=g)
    advantages[-1, 1] = 0
    return new, old, advantages
