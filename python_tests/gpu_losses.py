"""What the tests of losses and rewards on GPU backends are called with."""

from functools import partial

import torch

import ppo_kernels as pk
from ppo_kernels.testing import device_of, executors

BACKENDS = [
    e
    for e in executors("clipped_loss", "value_loss", "kl_penalty", "shape_rewards")
    if e != "torch" and not e.startswith("cpu")
]
# With a variant that needs numbers of whole sequences.
LOSSES = [pk.clipped_loss, partial(pk.clipped_loss, variant="gmpo"), pk.value_loss]


def example(backend, *shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    first = -torch.randn(shape, generator=g, dtype=torch.float64).abs()
    others = (
        first + 0.4 * torch.randn(shape, generator=g, dtype=torch.float64),
        torch.randn(shape, generator=g, dtype=torch.float64),
    )
    mask = torch.rand(shape, generator=g) < 0.6
    device = device_of(backend)
    return [t.to(device, dtype) for t in (first, *others)], mask.to(device)


def results(function, backend, inputs, mask=None, **more):
    """Loss, stats and gradient."""
    leaf = inputs[0].detach().requires_grad_()
    loss, metrics = function(leaf, *inputs[1:], mask, backend=backend, **more)
    (grad,) = torch.autograd.grad(loss * 1.5, leaf)
    return loss.detach(), metrics.stats, grad


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def offsets(backend, *ends, dtype=torch.int32):
    return torch.tensor([0, *ends], dtype=dtype, device=device_of(backend))
