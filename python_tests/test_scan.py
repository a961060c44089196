"""The scan under gae and discounted_returns beyond the cube: lengths, bits, cuts, graphs."""

import math

import pytest
import torch
from device import DEVICE, seeded
from scan_oracle import (
    CHUNK,
    COMPILED,
    CONVENTIONS,
    EXECUTORS,
    NAN,
    TOKENS,
    arguments,
    batch,
    close,
    hide,
    oracle,
    packed,
    padded,
    rows_of,
)
from torch.library import opcheck

import ppo_kernels as pk
from ppo_kernels.testing import executor

# ---- lengths -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_length_is_exact(name, dtype):
    """Integers without discount are exact in any order: a lost or doubled step shows at once."""
    g = seeded(0)
    around = [k * CHUNK + d for k in (1, 2, 4) for d in (-1, 0, 1)]
    for n in [*range(1, 71), *around] if name != "torch" else [1, 2, 5, 70]:
        r = torch.randint(-3, 4, (2, n), generator=g).to(dtype)
        v = torch.randint(-3, 4, (2, n + 1), generator=g).to(dtype)
        with executor(name):
            got = pk.gae(r, v, gamma=1, lam=1)
            bare = pk.gae(r, v[:, :-1], gamma=1, lam=1)
            sums = pk.discounted_returns(r, gamma=1, bootstrap=v[:, -1])
        to_go = r.float().flip(1).cumsum(1).flip(1)
        assert torch.equal(sums, to_go + v[:, -1:].float())
        assert torch.equal(got.returns, sums)
        assert torch.equal(got.advantages, sums - v[:, :-1].float())
        assert torch.equal(bare.returns, to_go)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("flag_rate", [0.0, 0.0005, 0.05])
def test_long_sequences_equal_the_loop(name, convention, flag_rate):
    lengths = [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3, 5 * CHUNK + 77, 0, 900]
    for seed, dtype in enumerate((torch.float32, torch.float64)):
        sequences = batch(seed, lengths, dtype, density=0.8, flag_rate=flag_rate)
        o = {"convention": convention, "gamma": 0.999, "lam": 0.97, "value_lam": 1.0}
        kwargs, exact = arguments(o | {"terminated": True, "truncated": True}, sequences)
        with executor(name):
            got = rows_of(pk.gae(**kwargs).advantages, sequences)
        for g, e in zip(got, exact, strict=True):
            close(g, oracle(**e), dtype)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
def test_empty_and_single_steps(name, shape):
    r = torch.ones(shape, requires_grad=True)
    v = torch.ones(shape[0], shape[1] + 1, requires_grad=True)
    with executor(name):
        got = pk.gae(r, v, gamma=0.5, lam=0.5)
        (got.advantages.sum() + got.returns.sum()).backward()
    assert got.advantages.shape == got.returns.shape == shape
    assert torch.equal(got.advantages, torch.full(shape, 0.5))
    assert r.grad.shape == shape
    assert v.grad.tolist() == ([[-1.0, 1.0]] if shape == (1, 1) else torch.zeros(v.shape).tolist())


@pytest.mark.parametrize("name", EXECUTORS)
def test_sequences_of_no_tokens(name):
    with executor(name):
        nothing = pk.gae(torch.ones(0), torch.ones(0), gamma=1, lam=1, cu_seqlens=torch.tensor([0]))
        empties = pk.discounted_returns(
            torch.ones(3), gamma=1, cu_seqlens=torch.tensor([0, 0, 0, 2, 2, 3, 3]),
            bootstrap=torch.tensor([NAN, NAN, 10.0, NAN, 20.0, NAN]),
        )  # fmt: skip
    assert nothing.advantages.shape == (0,)
    assert empties.tolist() == [12.0, 11.0, 21.0]


@pytest.mark.parametrize("name", COMPILED)
def test_many_tiny_sequences(name):
    """More of them than a chunk holds tokens, most of them empty."""
    g = seeded(0)
    lengths = (torch.rand(5000, generator=g) < 0.1).long() * torch.randint(3, (5000,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    r = torch.randint(9, (int(offsets[-1]),), generator=g).float()
    ends = torch.randint(9, (5000,), generator=g).float()
    with executor(name):
        got = pk.discounted_returns(r, gamma=0.5, cu_seqlens=offsets, bootstrap=ends)
    for i in range(5000):
        a, b = offsets[i : i + 2].tolist()
        following = ends[i].item()
        for t in range(b - 1, a - 1, -1):
            following = r[t].item() + 0.5 * following
            assert got[t].item() == following


# ---- bits ----------------------------------------------------------------------------------------

LENGTHS = [5, CHUNK, 1, 2 * CHUNK + 3, 0, 70, 3 * CHUNK, 40, 900, 900]


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("convention", ["carry", "zero", "truncate"])
def test_packing_equals_padding_bit_for_bit(name, convention):
    """Right padding, with gaps inside the sequences and without."""
    lengths = LENGTHS if name != "torch" else [5, 1, 70, 0, 40]
    sequences = batch(1, lengths, flag_rate=0.001)
    numbers = {"gamma": 0.99, "lam": 0.95, "value_lam": 0.7}
    flags = ("terminated", "truncated", "next_values")
    for keys, masked in (
        (("rewards", "values", *flags), {}),
        (("rewards", "values", "mask", *flags), {"mask_convention": convention}),
    ):
        content = hide(sequences) if masked else sequences
        with executor(name):
            one = pk.gae(**packed(content, keys), **numbers, **masked)
            other = pk.gae(**padded(content, keys), **numbers, mask_convention=convention)
        for a, b in zip(one, other, strict=True):
            for x, y in zip(rows_of(a, sequences), rows_of(b, sequences), strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("name", EXECUTORS)
def test_carry_equals_removal_bit_for_bit(name):
    lengths = LENGTHS if name != "torch" else [5, 1, 70, 0, 40]
    sequences = hide(batch(2, lengths, flag_rate=0.01))
    keys = ("rewards", "values", "terminated", "truncated", "next_values", "mask")
    removed = [s | {k: s[k][s["mask"]] for k in keys} for s in sequences]
    numbers = {"gamma": 0.99, "lam": 0.95, "value_lam": 1.0}
    with executor(name):
        with_gaps = pk.gae(**packed(sequences, keys), **numbers, mask_convention="carry")
        without = pk.gae(**packed(removed, keys[:-1]), **numbers)
    mask = torch.cat([s["mask"] for s in sequences])
    for a, b in zip(with_gaps, without, strict=True):
        assert torch.equal(a[mask], b)
        assert not a[~mask].any()


@pytest.mark.parametrize(
    "name",  # interpreted: see test_triton_scan.py
    [e for e in COMPILED if (e, DEVICE) != ("triton", "cpu")],
)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_bits_do_not_depend_on_threads_place_or_strides(name, convention):
    """One sequence alone, among others, first or last, contiguous or not, on 1, 2 or 3 threads."""
    (long,) = batch(3, [40 * CHUNK + 123], torch.float32, flag_rate=0.0001)
    others = batch(4, [17, 3 * CHUNK, 500], torch.float32)
    o = {"convention": convention, "gamma": 0.999, "lam": 0.99, "value_lam": 0.9}

    def run(sequences, threads):
        kwargs, _ = arguments(o | {"terminated": True, "truncated": True}, sequences)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            leaves = {k: kwargs[k].clone().requires_grad_() for k in ("rewards", "values")}
            got = pk.gae(**kwargs | leaves)
            upstream = [torch.sin(torch.arange(x.numel()) * 0.1) for x in got]
            for i, s in enumerate(sequences):  # the same upstream gradient wherever it is
                if s is long:
                    at = sum(len(q["rewards"]) for q in sequences[:i])
                    n = len(s["rewards"])
                    for u in upstream:
                        u[at : at + n] = torch.cos(torch.arange(n) * 0.1)
            grads = torch.autograd.grad(got, list(leaves.values()), upstream)
        finally:
            torch.set_num_threads(before)
        where = next(i for i, s in enumerate(sequences) if s is long)
        return [rows_of(x.detach(), sequences)[where] for x in (*got, *grads)]

    with executor(name):
        expected = run([long], 1)
        for threads in (1, 2, 3):
            for order in ([long], [long, *others], [*others, long], [*others, long, *others]):
                for a, b in zip(run(order, threads), expected, strict=True):
                    assert torch.equal(a, b)
        kwargs, _ = arguments(o | {"terminated": True, "truncated": True}, [long])
        spread = {k: torch.stack([x, x], 1)[:, 1] if k in TOKENS else x for k, x in kwargs.items()}
        for a, b in zip(pk.gae(**spread), expected[:2], strict=True):
            assert torch.equal(a, b)


# ---- NaN, infinity and cuts ----------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_nan_and_infinity_spread_backwards_and_stop_at_cuts(name):
    r, v = torch.zeros(2, 6), torch.zeros(2, 6)
    r[0, 4], r[1, 4] = NAN, math.inf
    ends = torch.tensor([0, 1, 0, 0, 0, 0]).expand(2, -1)
    with executor(name):
        got = pk.gae(r, v, gamma=0.9, lam=0.9, terminated=ends).advantages
        single = pk.gae(r, v, gamma=0.9, lam=0.0).advantages
        packed_got = pk.gae(
            r.flatten(), v.flatten(), gamma=0.9, lam=0.9, cu_seqlens=torch.tensor([0, 2, 6, 8, 12])
        ).advantages
    assert got[0].isnan().tolist() == [False, False, True, True, True, False]
    assert got[1].isinf().tolist() == [False, False, True, True, True, False]
    assert torch.equal(got.isfinite().flatten(), packed_got.isfinite())
    assert (~single.isfinite()).tolist() == [[False] * 4 + [True, False]] * 2


@pytest.mark.parametrize("name", COMPILED)
def test_infinity_crosses_chunks_however_small_the_discount(name):
    r = torch.zeros(1, 3 * CHUNK + 10)
    r[0, -1] = math.inf
    with executor(name):
        assert pk.discounted_returns(r, gamma=0.3).isinf().all()
        r[0, -1] = NAN
        assert pk.discounted_returns(r, gamma=0.3).isnan().all()


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_cut_stops_nan_between_chunks(name, threads):
    r = torch.zeros(1, 40 * CHUNK)
    ends = torch.zeros(1, 40 * CHUNK)
    r[0, -5], ends[0, 20 * CHUNK + 7] = NAN, 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with executor(name):
            got = pk.discounted_returns(r, gamma=0.99, terminated=ends)[0].isnan()
    finally:
        torch.set_num_threads(before)
    assert not got[: 20 * CHUNK + 8].any()
    assert got[20 * CHUNK + 8 : -4].all()
    assert not got[-4:].any()


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_cuts_and_ends_at_the_edges_of_chunks(name, convention):
    """Flags and last live steps just before, at and after where a chunk begins, from both ends."""
    n = 3 * CHUNK + 5
    edges = [CHUNK - 1, CHUNK, 2 * CHUNK - 1, n - CHUNK - 1, n - CHUNK, n - CHUNK + 1, n - 1]
    g = seeded(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    r, v = normal(len(edges), n), normal(len(edges), n + 1)
    flags = torch.zeros(len(edges), n)
    flags[range(len(edges)), edges] = 1
    masked = {}
    if convention:  # row i lives up to its edge; its flag is on its last step, or two rows on
        mask = torch.arange(n) <= torch.tensor(edges)[:, None]
        masked = {"mask": mask, "mask_convention": convention}
    for kind in ({"terminated": flags}, {"terminated": flags.roll(-2, 0)}):
        leaves = [x.clone().requires_grad_() for x in (r, v)]
        with executor(name):
            got = pk.gae(*leaves, gamma=0.999, lam=0.99, **kind, **masked)
            upstream = [normal(len(edges), n) for _ in got]
            grads = torch.autograd.grad(got, leaves, upstream)
        for i in range(len(edges)):
            expected = oracle(
                r[i].tolist(),
                v[i].tolist(),
                0.999,
                0.99,
                bootstrap=v[i, -1].item(),
                mask=mask[i].tolist() if convention else None,
                convention=convention,
                terminated=kind["terminated"][i].tolist(),
            )
            close(got.advantages[i], expected, torch.float64)
        left = sum((u * x.detach()).sum(1) for u, x in zip(upstream, got, strict=True))
        right = sum((d * x).sum(1) for d, x in zip(grads, (r, v), strict=True))
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_gradients_of_long_sequences_equal_the_transposed_scan(name, convention):
    """<u, A(r, v)> = <A^T u, (r, v)>, since the advantages are linear: no bootstrap needed."""
    lengths = [5 * CHUNK + 77, 40, 0, CHUNK, 2 * CHUNK + 1, 700, 700]
    sequences = batch(9, lengths, density=0.8, flag_rate=0.0005)
    o = {"convention": convention, "gamma": 0.999, "lam": 0.98, "value_lam": 0.9}
    kwargs, _ = arguments(o | {"terminated": True, "truncated": True}, sequences)
    names = ("rewards", "values", "next_values")
    for k in names:
        kwargs[k] = kwargs[k].requires_grad_()
    with executor(name):
        got = pk.gae(**kwargs)
        g = seeded(1)
        upstream = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in got]
        grads = torch.autograd.grad(got, [kwargs[k] for k in names], upstream)
    left = sum((u * x.detach()).sum() for u, x in zip(upstream, got, strict=True))
    right = sum(
        (d * kwargs[k].detach().nan_to_num()).sum() for d, k in zip(grads, names, strict=True)
    )
    assert left.item() == pytest.approx(right.item(), rel=1e-10)
    hidden = kwargs["next_values"].isnan()
    assert not grads[2][hidden].any()


@pytest.mark.parametrize("name", COMPILED)
def test_gradients_have_the_dtype_of_their_input(name):
    r = torch.randn(2, 5, dtype=torch.bfloat16, requires_grad=True)
    v = torch.randn(2, 6, dtype=torch.float16, requires_grad=True)
    with executor(name):
        pk.gae(r, v, gamma=0.9, lam=0.9).returns.sum().backward()
    assert r.grad.dtype == torch.bfloat16
    assert v.grad.dtype == torch.float16


@pytest.mark.parametrize("name", COMPILED)
def test_double_backward_raises_and_names_the_function(name):
    r = torch.ones(1, 3, requires_grad=True)
    with executor(name):
        total = pk.discounted_returns(r, gamma=0.9).sum()
        with pytest.raises(RuntimeError, match=r"discounted_returns.*double backward"):
            torch.autograd.grad(total, r, create_graph=True)
        total = pk.gae(r, torch.ones(1, 3), gamma=0.9, lam=0.9).returns.sum()
        with pytest.raises(RuntimeError, match=r"gae.*double backward"):
            torch.autograd.grad(total, r, create_graph=True)


# ---- torch.library and torch.compile -------------------------------------------------------------


@pytest.mark.parametrize("name", COMPILED)
def test_opcheck(name):
    backend = name.partition(":")[0]
    r, v, n = (torch.randn(3, 5, requires_grad=True) for _ in range(3))
    b = torch.randn(3, requires_grad=True)
    flags = torch.rand(3, 5) < 0.3
    setting = (torch.rand(3, 5) < 0.7, flags, ~flags, None, torch.rand(3), None)
    numbers = (0.9, 0.0, 0.8, "carry", 2)
    with executor(name):
        opcheck(torch.ops.ppo_kernels.gae_forward, (r, v, n, b, *setting, *numbers, backend))
        grads = (torch.randn(3, 5), None)
        args = (*grads, *setting, *numbers, [True, False, True, True], backend)
        opcheck(torch.ops.ppo_kernels.gae_backward, args)
        flat = torch.randn(7, requires_grad=True)
        setting = (None, None, None, torch.tensor([0, 3, 7]), None, None)
        numbers = (0.9, 1.0, 0.0, "none", 1)
        args = (flat, None, None, None, *setting, *numbers, backend)
        opcheck(torch.ops.ppo_kernels.returns_forward, args)
        args = (None, torch.randn(7), *setting, *numbers, [True] + [False] * 3, backend)
        opcheck(torch.ops.ppo_kernels.returns_backward, args)


@pytest.mark.parametrize("name", ["torch", *COMPILED[-1:]])
def test_compiles_in_one_graph(name):
    g = seeded(0)
    r, v = torch.randn(2, 6, generator=g), torch.randn(2, 7, generator=g)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1] * 6])
    flat, offsets = torch.randn(6, generator=g), torch.tensor([0, 2, 2, 6])

    def f(r, v, flat):
        padded = pk.gae(r, v, gamma=0.9, lam=0.8, mask=mask, mask_convention="carry")
        sums = pk.discounted_returns(flat, gamma=0.9, cu_seqlens=offsets)
        return (padded.advantages * padded.returns).sum() + sums.square().sum()

    with executor(name):
        expected_inputs = [x.clone().requires_grad_() for x in (r, v, flat)]
        expected = f(*expected_inputs)
        expected.backward()
        inputs = [x.clone().requires_grad_() for x in (r, v, flat)]
        got = torch.compile(f, backend="aot_eager", fullgraph=True)(*inputs)
        got.backward()
    torch.testing.assert_close(got, expected)
    for a, b in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)
