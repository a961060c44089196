"""What holds for clipped_loss and value_loss alike, beyond the cube."""

import pytest
import torch
from device import INTERPRETED
from hypothesis import given, settings
from loss_oracle import (
    BACKENDS,
    EXECUTORS,
    KERNELS,
    LOSSES,
    NORM,
    batches,
    bits,
    check_parts,
    some_mask,
    tokens,
    with_grad,
)
from torch.testing import assert_close

import ppo_kernels as pk
from ppo_kernels import cpu
from ppo_kernels.ops._aggregation import AGGREGATIONS
from ppo_kernels.testing import executor


@LOSSES
@EXECUTORS
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_beside_whole_vectors_count_once(name, function, masked):
    """Every length up to two of the longest vectors, in fp32 as in fp64."""
    for n in range(1, 34) if name != "triton" else (1, 7, 33):  # has no vectors
        inputs = tokens(n, seed=n)
        mask = some_mask(n, seed=n) if masked else None
        with executor(name):
            exact = with_grad(function, *inputs, mask)
            got = with_grad(function, *(t.float() for t in inputs), mask)
        for a, b in zip((*got[:2], got[2].stats), (*exact[:2], exact[2].stats), strict=True):
            assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


@EXECUTORS
def test_at_exact_ties_the_gradient_flows(name):
    lp, old = torch.tensor([0.3]), torch.zeros(1)
    up, down = torch.tensor([1.0]), torch.tensor([-1.0])
    with executor(name):
        r = pk.clipped_loss(lp, old, up).metrics.ratio_max.item()
        cases = [
            (lp, up, {"clip_high": r - 1}, -r),
            (lp, up, {"clip_high": r - 1 - 1e-6}, 0),
            (lp, down, {"dual_clip": r}, r),
            (lp, down, {"dual_clip": r - 1e-6}, 0),
            (lp, down, {"log_ratio_clamp": lp.item()}, r),
            (lp, down, {"log_ratio_clamp": lp.item() - 1e-6}, 0),
            (old, up, {"clip_low": 0.0}, -1),
            (old, down, {"clip_low": 0.0}, 1),
        ]
        for live, adv, bounds, slope in cases:
            assert with_grad(pk.clipped_loss, live, old, adv, **bounds)[1].item() == slope, bounds
        one, two = torch.tensor([1.0]), torch.tensor([2.0])
        # |v - R| = |v' - R|, clipped and not.
        for v, old_v, target in [(two, one, torch.tensor([1.75])), (one, one, two)]:
            grad = with_grad(pk.value_loss, v, old_v, target, clip=0.5)[1]
            assert grad.item() == (v - target).item()


@EXECUTORS
@pytest.mark.parametrize("clip", [0.2, None])
def test_nan_in_a_live_input_gives_nan_there_and_only_there(name, clip):
    for where in range(3):
        inputs = [t.clone() for t in tokens(2, 5, dtype=torch.float32)]
        inputs[where][1, 2] = torch.nan
        with executor(name):
            loss, grad, m = with_grad(pk.clipped_loss, *inputs, dual_clip=2.0)
            assert loss.isnan()
            assert grad.isnan().nonzero().tolist() == [[1, 2]]
            assert m.ratio_max.isnan() == m.ratio_min.isnan() == (where < 2)
            if where == 1 and clip is None:
                continue
            loss, grad, m = with_grad(pk.value_loss, *inputs, clip=clip, huber_delta=0.5)
            assert loss.isnan()
            assert grad.isnan().nonzero().tolist() == [[1, 2]]


# ---- masks -------------------------------------------------------------------------------------


@LOSSES
@EXECUTORS
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_what_lies_under_the_mask_changes_no_bit(name, function, aggregation):
    mask = some_mask(6, 37)
    mask[4] = False
    clean = tokens(6, 37, dtype=torch.float32)
    results = []
    for garbage in (0.0, torch.nan, torch.inf, -torch.inf, 1e30):
        inputs = [torch.where(mask, t, garbage) for t in clean]
        with executor(name):
            loss, grad, m = with_grad(
                function, *inputs, mask, aggregation=aggregation,
                norm_length=NORM.get(aggregation), upstream=0.7,
            )  # fmt: skip
        assert not grad[~mask].any()
        results.append((loss, grad, m.stats))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
            assert not b.isnan().any()


@LOSSES
@EXECUTORS
def test_any_nonzero_mask_element_is_live(name, function):
    inputs = tokens(3, 67, dtype=torch.float32)
    live = some_mask(3, 67)
    expected = None
    for dtype, one in [
        (torch.bool, True), (torch.uint8, 255), (torch.int8, -128), (torch.int16, 256),
        (torch.int32, 2**31 - 2**30), (torch.int64, 2**40), (torch.float32, 1e-40),
        (torch.float64, 1e-300), (torch.bfloat16, -1.0), (torch.float16, 6e-8),
    ]:  # fmt: skip
        mask = torch.zeros(3, 67, dtype=dtype)
        mask[live] = one
        if dtype.is_floating_point:
            mask[~live] = -0.0
        with executor(name):
            got = function(*inputs, mask, aggregation="seq-mean-token-mean")
        expected = expected or got
        assert torch.equal(got.loss, expected.loss), dtype
        assert torch.equal(got.metrics.stats, expected.metrics.stats), dtype


@LOSSES
@EXECUTORS
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_no_live_token_gives_a_connected_zero(name, function, aggregation):
    norm = NORM.get(aggregation)
    with executor(name):
        for shape in ((3, 5), (0, 5), (3, 0)):
            inputs = tokens(*shape, dtype=torch.bfloat16)
            mask = torch.zeros(shape, dtype=torch.bool)
            loss, grad, m = with_grad(
                function, *inputs, mask, aggregation=aggregation, norm_length=norm
            )
            assert loss == 0
            assert grad.shape == shape
            assert grad.dtype == torch.bfloat16
            assert not grad.any()
            numbers = m.as_dict()
            assert all(t.isfinite() for t in numbers.values())
            assert numbers["tokens"] == numbers["sequences"] == 0
            if function is pk.clipped_loss:
                ones = [numbers[k].item() for k in ("ratio_mean", "ratio_max", "ratio_min", "ess")]
                assert ones == [1, 1, 1, 1]
        # A zero denominator although tokens are live.
        for zero in (0, torch.tensor(0)):
            loss, grad, _ = with_grad(
                function, *tokens(2, 3), aggregation=aggregation, norm_length=norm, denominator=zero
            )
            assert loss == 0
            assert not grad.any()


# ---- parts of a batch --------------------------------------------------------------------------


@LOSSES
@EXECUTORS
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@settings(max_examples=5 if INTERPRETED else 25, deadline=None)
@given(batch=batches())
def test_padding_packing_and_micro_batches_are_one_batch(name, function, aggregation, batch):
    check_parts(name, function, aggregation, batch)


@LOSSES
@KERNELS
def test_micro_batches_in_fp32_give_the_same_gradient_bits(function, backend):
    inputs = tokens(8, 700, dtype=torch.float32)
    mask = some_mask(8, 700)
    count = mask.sum()
    setting = {"denominator": count, "backend": backend}
    loss, grad, _ = with_grad(function, *inputs, mask, **setting)
    parts = [
        with_grad(function, *(t[a:b] for t in (*inputs, mask)), **setting)
        for a, b in ((0, 1), (1, 5), (5, 8))
    ]
    assert torch.equal(torch.cat([p[1] for p in parts]), grad)
    assert_close(sum(p[0] for p in parts), loss, rtol=3e-7, atol=0)


# ---- gradients ---------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck(backend, aggregation):
    first, second, third = tokens(3, 5)
    mask = some_mask(3, 5)
    kwargs = {"aggregation": aggregation, "norm_length": NORM.get(aggregation), "backend": backend}

    def policy(x):
        return pk.clipped_loss(x, second, third, mask, dual_clip=1.5, **kwargs).loss * 1.7

    def value(x):
        return pk.value_loss(x, second, third, mask, huber_delta=0.6, **kwargs).loss * 1.7

    for f in (policy, value):
        assert torch.autograd.gradcheck(f, first.clone().requires_grad_())


@LOSSES
@KERNELS
def test_an_upstream_gradient_of_one_costs_nothing_and_others_are_rounded_once(function, backend):
    inputs = tokens(4, 400)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        cast = [t.to(dtype) for t in inputs]
        exact = with_grad(function, *(t.double() for t in cast), backend="torch")[1]
        for upstream in (1.0, 0.3, 0.0, -5.0):
            pk.reset_op_counts()
            grad = with_grad(function, *cast, upstream=upstream, backend=backend)[1]
            scaled = pk.op_counts().get(("scale_gradient", backend), 0)
            assert scaled == (upstream != 1 or dtype in (torch.bfloat16, torch.float16))
            assert grad.dtype == dtype
            near = {"rtol": 1.01 * torch.finfo(dtype).eps * (2 if dtype.itemsize == 2 else 8)}
            assert_close(grad.double(), exact * upstream, atol=1e-7, **near)


@LOSSES
@BACKENDS
def test_a_bad_upstream_gradient_stays_out_of_masked_positions(function, backend):
    mask = some_mask(3, 40)
    for bad in (torch.inf, torch.nan):
        grad = with_grad(function, *tokens(3, 40), mask, upstream=bad, backend=backend)[1]
        assert not grad[~mask].any()
        assert not grad[mask].isfinite().all()


@LOSSES
@BACKENDS
def test_backward_twice_gives_the_same_gradient(function, backend):
    first, *others = tokens(3, 40)
    leaf = first.clone().requires_grad_()
    loss, _ = function(leaf * 1, *others, backend=backend)
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward()
    assert torch.equal(leaf.grad, 2 * once)


@LOSSES
@BACKENDS
def test_double_backward_raises_on_kernels_and_works_on_the_reference(function, backend):
    first, *others = tokens(2, 3)
    leaf = first.clone().requires_grad_()
    loss, _ = function(leaf, *others, backend=backend)
    if backend == "torch":
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        assert grad.requires_grad
        return
    with pytest.raises(RuntimeError, match=f"{function.__name__}: .*double backward"):
        torch.autograd.grad(loss, leaf, create_graph=True)


@LOSSES
@BACKENDS
def test_metrics_and_losses_without_grad_are_detached(function, backend):
    first, *others = tokens(2, 3)
    leaf = first.clone().requires_grad_()
    assert not function(leaf, *others, backend=backend).metrics.stats.requires_grad
    with torch.no_grad():
        assert not function(leaf, *others, backend=backend).loss.requires_grad
    assert not function(first, *others, backend=backend).loss.requires_grad


# ---- bits --------------------------------------------------------------------------------------


@LOSSES
@KERNELS
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_bits_depend_neither_on_threads_nor_on_strides(function, backend, aggregation):
    shape = (7, 5000)
    mask = some_mask(*shape)
    setting = {"aggregation": aggregation, "backend": backend}
    for dtype in (torch.float32, torch.float64):
        inputs = tokens(*shape, dtype=dtype)
        expected = bits(function, *inputs, mask, **setting)
        threads = torch.get_num_threads()
        try:
            for n in (1, 2, 3) if backend == "cpu" else ():
                torch.set_num_threads(n)
                got = bits(function, *inputs, mask, **setting)
                assert all(map(torch.equal, got, expected)), n
        finally:
            torch.set_num_threads(threads)
        strided = [t.mT.contiguous().mT for t in (*inputs, mask.int())]
        got = bits(function, *strided, **setting)
        assert all(map(torch.equal, got, expected))


@LOSSES
@BACKENDS
def test_cu_seqlens_may_be_int32(function, backend):
    inputs = tokens(10)
    offsets = torch.tensor([0, 3, 3, 10])
    a, b = (
        function(
            *inputs, cu_seqlens=c, aggregation="seq-mean-token-mean", backend=backend
        ).metrics.stats
        for c in (offsets, offsets.int())
    )
    assert torch.equal(a, b)


# ---- graphs ------------------------------------------------------------------------------------


@LOSSES
@KERNELS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(function, backend, dtype):
    first, second, third = tokens(3, 5, dtype=dtype)
    op = getattr(torch.ops.ppo_kernels, function.__name__).default
    settings = (0.8, 1.2, None, None, 0) if function is pk.clipped_loss else (0.2, None)
    for mask, offsets, aggregation, denominator, divisor in [
        (None, None, 0, None, None),
        (some_mask(3, 5), None, 3, torch.tensor(3), None),
        (some_mask(3, 5), None, 0, None, 4.0),
    ]:
        for needs_gradient in (False, True):
            live = first.clone().requires_grad_(needs_gradient)
            torch.library.opcheck(
                op,
                (live, second, third, *settings, mask, offsets, aggregation, denominator, divisor,
                 None, needs_gradient, backend),
            )  # fmt: skip
    scale = torch.ops.ppo_kernels.scale_gradient.default
    torch.library.opcheck(scale, (torch.randn(3, 5), torch.tensor(0.5), dtype, backend))


@LOSSES
@KERNELS
def test_the_op_itself_refuses_to_drop_a_gradient(function, backend):
    first, second, third = tokens(3, 5)
    op = getattr(torch.ops.ppo_kernels, function.__name__)
    settings = (0.8, 1.2, None, None, 0) if function is pk.clipped_loss else (0.2, None)
    with pytest.raises(RuntimeError, match="requires grad"):
        op(first.requires_grad_(), second, third, *settings, *(None,) * 2, 0, *(None,) * 3,
           False, backend)  # fmt: skip


@LOSSES
@BACKENDS
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_to_one_graph(function, backend, packed, dtype):
    shape = (23,) if packed else (4, 6)
    offsets = torch.tensor([0, 4, 4, 15, 16, 23]) if packed else None
    inputs = tokens(*shape, dtype=dtype)
    mask = some_mask(*shape)
    count = torch.tensor(4)

    def step(live, *constants):
        loss, metrics = function(
            live, *constants, mask, cu_seqlens=offsets, aggregation="seq-mean-token-mean",
            denominator=count, backend=backend,
        )  # fmt: skip
        return loss * 0.5, metrics.loss, metrics.clip_fraction

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for f in (step, compiled):
        live = inputs[0].clone().requires_grad_()
        loss, *metrics = f(live, *inputs[1:])
        loss.backward()
        results.append((loss.detach(), live.grad, *metrics))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_this_machine_runs_the_kernels():
    assert cpu.UNAVAILABLE is None
