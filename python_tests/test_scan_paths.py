"""Which way a chunk takes through the CPU scan, directly or through buffers, shows in no bit."""

import pytest
import torch

import ppo_kernels as pk

CHUNK = 1024


def masks(shape, generator):
    """Live steps in one run (anywhere, at either end, all, none), with gaps, and mixed."""
    rows, cols = shape
    step = torch.arange(cols)
    begin = torch.randint(0, cols + 1, (rows, 1), generator=generator)
    end = torch.randint(0, cols + 1, (rows, 1), generator=generator)
    run = (step >= begin) & (step < end)
    yield run
    yield step < end
    yield step >= begin
    yield torch.ones(shape, dtype=torch.bool)
    yield torch.zeros(shape, dtype=torch.bool)
    yield run & (step != (begin + end) // 2)
    yield ((step % 2500) < 2300).expand(shape)  # gaps far apart: chunks of either kind in one row
    yield torch.rand(shape, generator=generator) < 0.9


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("convention", ["carry", "zero", "truncate"])
@pytest.mark.parametrize(
    "shape", [(1, 9 * CHUNK + 5), (3, 2 * CHUNK), (70, 130), (5, 3 * CHUNK + 1)]
)
def test_direct_and_buffered_chunks_give_the_same_bits(shape, convention, threads):
    g = torch.Generator().manual_seed(7)
    rewards, values = torch.randn(2, *shape, generator=g)
    bootstrapped = torch.cat([values, torch.randn(shape[0], 1, generator=g)], 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for mask in masks(shape, g):
            for v in (values, bootstrapped):
                hidden = torch.where(mask, rewards, torch.nan)

                def advantages(lam, mask, rewards=hidden, v=v):
                    return pk.gae(
                        rewards, v, gamma=0.99, lam=lam, mask=mask, mask_convention=convention,
                        backend="cpu",
                    )  # fmt: skip

                # A lambda for each row goes through buffers.
                expected = advantages(torch.full((shape[0],), 0.95, dtype=torch.float64), mask)
                bytes_ = torch.where(mask, torch.randint(1, 256, shape, generator=g), 0)
                spread = torch.stack([mask, ~mask], -1)[..., 0]
                for same in (mask, bytes_.to(torch.uint8), spread, mask.double()):
                    for a, b in zip(advantages(0.95, same), expected, strict=True):
                        assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
