"""The metrics of the losses: their digits, and of parts those of the whole batch."""

import pytest
import torch
from device import DEVICE
from loss_oracle import BACKENDS, EXECUTORS, LOSSES, some_mask, tokens
from torch.testing import assert_close

import ppo_kernels as pk
from ppo_kernels.testing import executor


@EXECUTORS
def test_a_squared_ratio_does_not_overflow_the_sample_size(name):
    x = torch.tensor([60.0] + [0.0] * 9)
    with executor(name):
        m = pk.clipped_loss(x, torch.zeros(10), torch.ones(10)).metrics
    assert_close(m.ess.item(), 0.1, rtol=1e-6, atol=0)


@EXECUTORS
def test_k3_of_nearly_equal_policies_keeps_its_digits(name):
    old = torch.zeros(1000)
    for size in (1e-6, 1e-3, 0.1, 0.49, 0.51, 3.0):
        for x in (torch.full((1000,), size), torch.full((1000,), -size)):
            with executor(name):
                got = pk.clipped_loss(x, old, old).metrics.kl_k3.item()
            exact = x[0].double()
            exact = (torch.expm1(exact) - exact).item() if size > 1e-5 else (exact**2 / 2).item()
            assert got == pytest.approx(exact, rel=3e-6)


@BACKENDS
@pytest.mark.parametrize(
    ("values", "returns", "expected"),
    [
        ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0], 1.0),
        ([2.0, 3.0, 5.0], [1.0, 2.0, 4.0], 1.0),  # a constant error explains all the variance
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0], 0.0),
        ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], -3.0),
        ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1], 1.0),
        ([0.0, 1.0, 2.0], [0.1, 0.1, 0.1], 0.0),
        ([5.0], [3.0], 1.0),
        ([10000.5, 10001.5], [10000.0, 10002.0], 0.75),
    ],
)
def test_explained_variance(values, returns, expected, backend):
    m = pk.value_loss(
        torch.tensor(values), None, torch.tensor(returns), clip=None, backend=backend
    ).metrics
    assert m.explained_variance.item() == pytest.approx(expected, abs=1e-6)


@BACKENDS
def test_explained_variance_of_a_nan_is_nan(backend):
    values = torch.tensor([1.0, torch.nan])
    m = pk.value_loss(values, None, torch.ones(2), clip=None, backend=backend).metrics
    assert m.explained_variance.isnan()


# ---- of several batches ------------------------------------------------------------------------


@LOSSES
@BACKENDS
def test_reduced_metrics_are_those_of_one_batch(function, backend):
    tensors = (*tokens(9, 50), some_mask(9, 50))

    def metrics(*part):
        return function(*part, backend=backend).metrics

    whole = metrics(*tensors)
    parts = [metrics(*(t[i : i + 2] for t in tensors)) for i in range(0, 9, 2)]
    merged = pk.reduce_metrics(parts)
    assert type(merged) is type(whole)
    assert_close(merged.stats, whole.stats, rtol=1e-13, atol=1e-13)
    # An empty part adds nothing.
    nothing = metrics(*(t[:1] for t in tensors[:3]), torch.zeros(1, 50))
    assert torch.equal(pk.reduce_metrics([*parts, nothing]).stats, merged.stats)


def test_reduce_metrics_takes_one_type_and_at_least_one_object():
    inputs = tokens(2, 3)
    policy, value = (f(*inputs).metrics for f in (pk.clipped_loss, pk.value_loss))
    with pytest.raises(TypeError, match="got PolicyMetrics, ValueMetrics"):
        pk.reduce_metrics([policy, value])
    with pytest.raises(TypeError, match="got Tensor"):
        pk.reduce_metrics([torch.zeros(13)])
    with pytest.raises(ValueError, match="at least one"):
        pk.reduce_metrics([])


def _rank(rank, file):
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    for function in (pk.clipped_loss, pk.value_loss):
        inputs = tokens(6, 11)
        whole = function(*inputs).metrics
        first, last = ((0, 2), (2, 6))[rank]
        parts = [function(*(t[i : i + 1] for t in inputs)).metrics for i in range(first, last)]
        merged = pk.reduce_metrics(parts, group=torch.distributed.group.WORLD)
        assert_close(merged.stats, whole.stats, rtol=1e-13, atol=1e-13)
    bad = torch.full((1, 3), torch.nan if rank == 0 else 0.5)
    m = pk.clipped_loss(bad, torch.zeros(1, 3), torch.ones(1, 3)).metrics
    merged = pk.reduce_metrics([m], group=torch.distributed.group.WORLD)
    assert merged.ratio_max.isnan()
    assert merged.ratio_min.isnan()
    assert merged.tokens == 6
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="the processes are on the CPU")
def test_metrics_reduce_over_two_processes(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "rendezvous"),), nprocs=2)
