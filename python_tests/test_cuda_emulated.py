"""The CUDA kernels in the emulator, beyond the cube: every schedule gives the same bits."""

import cuda_emulated
import pytest
import torch

import ppo_kernels as pk

pytestmark = pytest.mark.skipif(
    cuda_emulated.unavailable() is not None, reason=str(cuda_emulated.unavailable())
)
# Of one step and of several segments; aligned rows and others; less than a vector.
SHAPES = [((3, 5), torch.float32), ((3, 40001), torch.bfloat16), ((2, 40000), torch.float32)]


@pytest.mark.parametrize(("shape", "dtype"), SHAPES)
def test_bits_depend_on_no_schedule(shape, dtype):
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=g) * 3).to(dtype)
    tokens = torch.randint(shape[-1], shape[:-1], generator=g)

    def results():
        leaf = logits.clone().requires_grad_()
        out = pk.logprobs_from_logits(
            leaf * 1, tokens, entropy=True, inplace_backward=True, backend=cuda_emulated.NAME
        )
        (out.logprobs.sum() + 0.3 * out.entropy.sum()).backward()
        return out.logprobs.detach(), out.entropy.detach(), leaf.grad

    expected = results()
    for schedule in cuda_emulated.SCHEDULES:
        with cuda_emulated.scheduled(**schedule):
            for got, wanted in zip(results(), expected, strict=True):
                assert torch.equal(got, wanted), schedule
