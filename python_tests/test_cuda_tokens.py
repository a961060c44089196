"""Losses, KL and moments in CUDA C++ beyond the cube: cuts, sequences, grids and schedules."""

import math

import cuda_emulated
import pytest
import torch
from gpu_losses import LOSSES, equal, example, offsets, results

import ppo_kernels as pk

pytestmark = pytest.mark.skipif(
    cuda_emulated.unavailable() is not None, reason=str(cuda_emulated.unavailable())
)
BACKEND = cuda_emulated.NAME
# Of csrc/cuda/tokens.cuh, csrc/cuda/losses.cu and csrc/cuda/moments.cu.
VECTOR, BLOCK, GROUPS = 4, 2048, 1024
WARP_OF_MASK = 512
RUN_CHUNK, COLUMN_CHUNK = 4096, 1024
FUNCTIONS = pytest.mark.parametrize("function", LOSSES, ids=["clip", "gmpo", "value"])
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


# ---- schedules and grids -------------------------------------------------------------------------


def packed_loss():
    inputs, mask = example(BACKEND, 4500, dtype=torch.bfloat16)
    ends = offsets(BACKEND, 0, 3, 700, 701, 701, 4500)
    how = {"cu_seqlens": ends, "aggregation": "seq-mean-token-mean"}
    return results(pk.clipped_loss, BACKEND, inputs, mask, dual_clip=1.5, **how)


def loss_of_sequences():
    inputs, mask = example(BACKEND, 4500, dtype=torch.bfloat16)
    ends = offsets(BACKEND, 0, 3, 700, 701, 701, 4500)
    return results(pk.clipped_loss, BACKEND, inputs, mask, variant="gspo", cu_seqlens=ends)


def weights():
    (old, rollout, _), mask = example(BACKEND, 4500)
    ends = offsets(BACKEND, 0, 3, 700, 701, 701, 4500)
    made, metrics = pk.importance_weights(
        old, rollout, mask, kind="tis-geometric", high=1.01, cu_seqlens=ends, backend=BACKEND
    )
    return made, metrics.stats


def padded_loss():
    inputs, mask = example(BACKEND, 3, 701)
    return results(pk.value_loss, BACKEND, inputs, mask, aggregation="seq-mean-token-sum")


def rewards():
    (a, b, _), mask = example(BACKEND, 2100)
    scores, ends = torch.ones(5), offsets(BACKEND, 0, 40, 41, 1000, 2100)
    leaf = a.requires_grad_()
    out = pk.shape_rewards(
        scores, leaf, b, mask, kl_coef=0.1, estimator="k3", cu_seqlens=ends, backend=BACKEND
    )
    return *(t.detach() for t in out), *torch.autograd.grad(out.rewards.sum(), leaf)


def whitened():
    (x, upstream, _), mask = example(BACKEND, 3, 3001)
    leaf = x.requires_grad_()
    y = pk.whiten(leaf, mask, backend=BACKEND)
    return y.detach(), *torch.autograd.grad(y, leaf, upstream)


def sums():
    (x, *_), mask = example(BACKEND, 2, 4500, 3)
    return [pk.masked_mean(x, mask, dim, backend=BACKEND) for dim in (None, 0, 1, 2)]


CALLS = [packed_loss, loss_of_sequences, weights, padded_loss, rewards, whitened, sums]


@pytest.mark.parametrize("call", CALLS)
def test_bits_depend_on_no_schedule_and_no_grid(monkeypatch, call):
    expected = call()
    for schedule in cuda_emulated.SCHEDULES:
        with cuda_emulated.scheduled(**schedule):
            assert equal(call(), expected), schedule
    monkeypatch.setattr(cuda_emulated, "PROCESSORS", 1000)
    assert equal(call(), expected)


def test_more_tokens_than_groups_have_blocks():
    """Some groups of two blocks, the last one of less; in fp64, where every lost token shows."""
    n = GROUPS * BLOCK + 3 * BLOCK + 5
    (x, old, target), mask = example(BACKEND, n, dtype=torch.float64)
    got, want = (
        results(pk.value_loss, backend, (x, old, target), mask) for backend in (BACKEND, "torch")
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-18)
    for f in (pk.whiten, pk.masked_sum):
        torch.testing.assert_close(
            f(x, mask, backend=BACKEND), f(x, mask, backend="torch"), **CLOSE
        )


# ---- vectors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_depend_on_no_address(dtype):
    n = BLOCK + 37
    (a, b, c), mask = example(BACKEND, n, dtype=dtype)

    def moved(t, by):
        return torch.cat([t.new_zeros(by), t])[by:]

    def everything(a, b, c, mask):
        leaf = a.requires_grad_()
        kl = pk.kl_penalty(leaf, b, mask, backend=BACKEND)
        return (
            *results(pk.clipped_loss, BACKEND, (a, b, c), mask),
            *(kl.detach(), *torch.autograd.grad(kl.sum(), leaf)),
            pk.whiten(a.detach(), mask, backend=BACKEND),
            pk.masked_sum(a.detach(), mask, backend=BACKEND),
        )

    expected = everything(a, b, c, mask)
    for by in range(1, 16):
        assert equal(everything(*(moved(t.detach(), by) for t in (a, b, c, mask))), expected), by
    mixed = everything(a.detach(), *(moved(t, 3) for t in (b, c)), moved(mask, 1))
    assert equal(mixed, expected)


# ---- sequences -----------------------------------------------------------------------------------

# Inside a thread's neighbours, on their edges, on those of a warp and of a block; some empty.
ENDS = [1, 1, 3, 4, 15, 16, 40, WARP_OF_MASK - 1, WARP_OF_MASK, WARP_OF_MASK, WARP_OF_MASK + 1]
ENDS += [2 * WARP_OF_MASK, 3 * WARP_OF_MASK + 9, BLOCK, BLOCK + 1, 3 * BLOCK + 7, 3 * BLOCK + 7]


@FUNCTIONS
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_live_tokens_of_sequences_are_counted(function, masked, dtype):
    inputs, mask = example(BACKEND, ENDS[-1], dtype=torch.float64)
    mask[16:40] = mask[BLOCK] = False
    ends = offsets(BACKEND, *ENDS, dtype=dtype)
    how = {"cu_seqlens": ends, "aggregation": "seq-mean-token-mean"}
    got, want = (
        results(function, backend, inputs, mask if masked else None, **how)
        for backend in (BACKEND, "torch")
    )
    torch.testing.assert_close(got, want, **CLOSE)
    assert torch.equal(got[1][:2], want[1][:2])


@FUNCTIONS
@pytest.mark.parametrize("shape", [(700, 3), (5, 1000), (3, 2500)])
def test_live_tokens_of_rows_are_counted(function, shape):
    inputs, mask = example(BACKEND, *shape, dtype=torch.float64)
    mask[1] = False
    got, want = (
        results(function, backend, inputs, mask.double(), aggregation="seq-mean-token-mean")
        for backend in (BACKEND, "torch")
    )
    torch.testing.assert_close(got, want, **CLOSE)
    assert torch.equal(got[1][:2], want[1][:2])


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100])
def test_the_last_live_token_is_found(length):
    for last in {0, length // 2, length - 1, -1}:
        mask = torch.zeros(3, length, dtype=torch.bool)
        mask[:, : last + 1] = True
        mask[2] = False
        zeros, scores = torch.zeros(3, length), torch.tensor([2.0, 3.0, torch.nan])
        want = torch.zeros_like(zeros)
        if last >= 0:
            want[0, last], want[1, last] = 2.0, 3.0
        ends = offsets(BACKEND, length, 2 * length, 3 * length)
        more = {"kl_coef": 1.0, "backend": BACKEND}
        padded = pk.shape_rewards(scores, zeros, zeros, mask, **more).rewards
        flat = [t.flatten() for t in (zeros, zeros, mask)]
        packed = pk.shape_rewards(scores, *flat, cu_seqlens=ends, **more).rewards
        assert torch.equal(padded, want)
        assert torch.equal(packed.view(3, length), want)


# ---- sums ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        *[(2, n, 1) for n in (32, 33, RUN_CHUNK, RUN_CHUNK + 1, 2 * RUN_CHUNK + 9)],
        *[(2, n, 5) for n in (8, 9, COLUMN_CHUNK, COLUMN_CHUNK + 1, 2 * COLUMN_CHUNK + 9)],
        *[(3, 40, n) for n in (31, 32, 33, 70)],
        (70, 3, 1),
        (1, 300 * COLUMN_CHUNK, 2),
    ],
)
def test_sums_of_every_cut(shape):
    """Whole numbers, so that sums are exact in any order."""
    x = torch.randint(-50, 50, shape).float()
    mask = torch.rand(shape) < 0.7
    got = pk.masked_sum(x, mask, 1, backend=BACKEND)
    assert torch.equal(got, torch.where(mask, x, 0.0).sum(1))
    padded = torch.full((shape[0], shape[1] + 3, shape[2]), torch.nan)
    padded[:, 2:-1] = x
    assert torch.equal(pk.masked_sum(padded[:, 2:-1], mask, 1, backend=BACKEND), got)


def test_the_sum_of_a_row_depends_on_no_other_row():
    (x, *_), mask = example(BACKEND, 9, 5000)
    for dim, n in ((1, 5000), (2, 70), (1, 3)):
        rows, live = (t[:, : n * 3].reshape(9, n if dim == 1 else 3, -1) for t in (x, mask))
        whole = pk.masked_sum(rows, live, dim, backend=BACKEND)
        for row in (0, 4, 8):
            alone = pk.masked_sum(rows[row, None], live[row, None], dim, backend=BACKEND)
            assert torch.equal(alone[0], whole[row])


# ---- moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3])
def test_blocks_without_a_live_token_and_far_from_each_other(n):
    (x, upstream, _), mask = example(BACKEND, n, dtype=torch.float64)
    x[n // 2 :] += 1e4
    mask[: n // 2] &= torch.arange(n // 2) > BLOCK
    got, want = [], []
    for backend, to in ((BACKEND, got), ("torch", want)):
        leaf = x.clone().requires_grad_()
        y = pk.whiten(leaf, mask, backend=backend)
        to += [y.detach(), *torch.autograd.grad(y, leaf, upstream)]
    # Either side rounds its mean to half a unit in the last place of 1e4, and what it subtracts.
    torch.testing.assert_close(got, want, rtol=1e-9, atol=4 * math.ulp(1e4))
