"""vtrace beyond the cube: the loop, values by hand, gae as its special case, bits, errors."""

import math

import pytest
import torch
from device import DEVICE, raises, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_oracle import (
    CHUNK,
    CONVENTIONS,
    NAN,
    arguments,
    batch,
    close,
    hide,
    packed,
    padded,
    rows_of,
    vtrace_oracle,
)
from torch.library import opcheck

import ppo_kernels as pk
from ppo_kernels.testing import executor, executors

EXECUTORS = executors("vtrace", device=DEVICE)
COMPILED = [e for e in EXECUTORS if e != "torch"]
PER_STEP = ("logprobs", "rollout_logprobs", "rewards", "values")
CLIPS = {"rho_clip": 1.3, "c_clip": 1.1, "pg_rho_clip": None}


def off_policy(seed, lengths, dtype=torch.float64, spread=0.5, **more):
    """The sequences of `batch` with log-probabilities whose ratios lie on both sides of 1."""
    g = seeded(seed + 1)
    sequences = batch(seed, lengths, dtype, **more)
    for s, n in zip(sequences, lengths, strict=True):
        logprobs = -torch.rand(n, generator=g, dtype=torch.float64)
        change = torch.randn(n, generator=g, dtype=torch.float64) * spread
        s |= {"logprobs": logprobs.to(dtype), "rollout_logprobs": (logprobs - change).to(dtype)}
    return sequences


def call(o, sequences, layout=packed):
    """The keyword arguments of vtrace, and each sequence's arguments of the oracle."""
    kwargs, exact = arguments({"value_lam": None} | o, sequences, layout, PER_STEP)
    del kwargs["value_lam"]
    clips = {k: o[k] for k in CLIPS}
    return kwargs | clips, [e | clips for e in exact]


options = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "lengths": st.lists(st.integers(0, 40), min_size=1, max_size=6),
        "convention": st.sampled_from(CONVENTIONS),
        "terminated": st.booleans(),
        "truncated": st.booleans(),
        "gamma": st.sampled_from([0.0, 0.9, 1.0]),
        "lam": st.sampled_from([0.0, 0.5, 1.0]),
        "rho_clip": st.sampled_from([0.7, 1.0, 2.0, None]),
        "c_clip": st.sampled_from([0.0, 0.7, 1.0, 2.0]),
        "pg_rho_clip": st.sampled_from([0.7, 1.0, 2.0, None]),
    }
)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=60, deadline=None)
@given(o=options)
def test_packed_equals_the_loop(name, dtype, o):
    sequences = off_policy(o["seed"], o["lengths"], dtype)
    kwargs, exact = call(o, sequences)
    with executor(name):
        got = pk.vtrace(**kwargs)
    assert got.advantages.dtype == got.returns.dtype == dtype
    each = zip(rows_of(got.advantages, sequences), rows_of(got.returns, sequences), strict=True)
    for e, result in zip(exact, each, strict=True):
        for x, expected in zip(result, vtrace_oracle(**e), strict=True):
            close(x, expected, dtype)


@pytest.mark.parametrize("name", EXECUTORS)
@settings(max_examples=60, deadline=None)
@given(o=options, rows=st.integers(1, 4), width=st.integers(0, 20), longer=st.booleans())
def test_padded_equals_the_loop(name, o, rows, width, longer):
    """Rows of one width, with and without the extra column of values, and a lambda per row."""
    sequences = off_policy(o["seed"], [width] * rows)
    stacked = lambda sequences, keys: {k: torch.stack([s[k] for s in sequences]) for k in keys}  # noqa: E731
    kwargs, exact = call(o, sequences, stacked)
    kwargs["lam"] = torch.rand(rows, generator=seeded(o["seed"])).double()
    if longer:
        last = torch.stack([s["bootstrap"] for s in sequences])
        kwargs["values"] = torch.cat([kwargs["values"], last[:, None]], 1)
    with executor(name):
        got = pk.vtrace(**kwargs)
    for i, e in enumerate(exact):
        end = sequences[i]["bootstrap"].item() if longer else 0.0
        expected = vtrace_oracle(**e | {"lam": kwargs["lam"][i].item(), "bootstrap": end})
        for x, wanted in zip(got, expected, strict=True):
            close(x[i], wanted, torch.float64)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("flag_rate", [0.0, 0.0005, 0.05])
def test_long_sequences_equal_the_loop(name, convention, flag_rate):
    lengths = [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3, 5 * CHUNK + 77, 0, 900]
    o = {"convention": convention, "gamma": 0.999, "lam": 0.97, **CLIPS}
    for seed, dtype in enumerate((torch.float32, torch.float64)):
        sequences = off_policy(seed, lengths, dtype, 0.05, density=0.8, flag_rate=flag_rate)
        kwargs, exact = call(o | {"terminated": True, "truncated": True}, sequences)
        with executor(name):
            got = [rows_of(x, sequences) for x in pk.vtrace(**kwargs)]
        for i, e in enumerate(exact):
            for x, expected in zip(got, vtrace_oracle(**e), strict=True):
                close(x[i], expected, dtype)


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_three_steps_by_hand(name):
    r, v = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 2.0, 8.0, 16.0]])
    new, old = torch.tensor([[2.0, 0.5, 1.0]]).double().log(), torch.zeros(1, 3)
    gamma, lam, never = 0.5, 0.5, torch.full((1, 3), NAN)

    def check(advantages, returns, **changed):
        setting = {"gamma": gamma, "lam": lam, "rho_clip": 1.5, "pg_rho_clip": None} | changed
        got = pk.vtrace(new, old, r, v, **setting)
        assert got.advantages.tolist() == [pytest.approx(advantages, rel=1e-14, abs=1e-14)]
        assert got.returns.tolist() == [pytest.approx(returns, rel=1e-14, abs=1e-14)]

    with executor(name):
        # TD errors -2, 4, 3; times 1.5, 0.5, 1 the differences -3, 2, 3; coefficients 1/4, 1/8.
        first = -3 + 0.25 * 2.375
        check([2 * (-2 + 0.5 * 2.375), 0.5 * (4 + 0.5 * 3), 3], [4 + first, 2 + 2.375, 8 + 3])
        check([-2 + 0.5 * 2.375, 2.75, 3], [4 + first, 4.375, 11], pg_rho_clip=1.0)
        check([-0.8125 * 1.25, 2.75, 3], [4 + first, 4.375, 11], pg_rho_clip=1.25)
        # Unclipped, the first difference is -4, and its coefficient 1/2 under a threshold of 2.
        check([-1.625, 2.75, 3], [-4 + 0.5 * 2.375 + 4, 4.375, 11], rho_clip=None, c_clip=2)
        # Without traces the next target still enters the advantage.
        check([2 * (-2 + 0.5 * 2), 2.75, 3], [4 - 3, 2 + 2, 11], lam=0.0)
        check([2 * (-2 + 0.5 * 2), 2.75, 3], [4 - 3, 2 + 2, 11], c_clip=0.0)
        check([2 * (1 - 4), 0.0, 3 - 8], [4 - 1.5 * 3, 2, 8 - 5], gamma=0.0)
        ends = torch.tensor([[0, 1, 0]])
        check([-4, 0, 3], [4 - 3, 2, 11], terminated=ends)
        after = torch.tensor([[NAN, 10, NAN]])
        cut_short = {"truncated": ends, "next_values": after}
        check([2 * (-2 + 0.5 * 2.5), 2.5, 3], [4 - 3 + 0.625, 4.5, 11], **cut_short)
        check([-4, 0, 3], [4 - 3, 2, 11], **cut_short | {"next_values": never}, terminated=ends)


@pytest.mark.parametrize("name", EXECUTORS)
def test_the_conventions_differ_as_they_say(name):
    r, v = torch.tensor([[1.0, NAN, 2.0, NAN]]), torch.tensor([[4.0, NAN, 8.0, NAN, 16.0]])
    new = torch.tensor([[math.log(2), NAN, math.log(0.5), NAN]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 0]])
    # The ratios are 2 and 1/2, clipped at 1; coefficients 1/2 and 1/4, of a masked step 1/2.
    last = {"carry": 0.5 * (2 + 8 - 8), "zero": 0.5 * (2 - 8) + 0.25 * 8, "truncate": 0.5 * -6}
    for convention, x in last.items():
        error = 1 + 0.5 * 8 - 4 if convention == "carry" else 1 - 4
        beyond = x if convention == "carry" else 0.5 * 8 + 0.5 * x
        step = {"carry": 0.5 * 2, "zero": 0.5 * (2 - 8 + 0.5 * 8), "truncate": 0.5 * -6}
        with executor(name):
            got = pk.vtrace(new, new * 0, r, v, gamma=0.5, mask=mask, mask_convention=convention)
        first = error + 0.5 * beyond
        assert got.advantages.tolist() == [pytest.approx([first, 0, step[convention], 0])]
        assert got.returns.tolist() == [pytest.approx([first + 4, 0, x + 8, 0])]


@pytest.mark.parametrize("name", EXECUTORS)
def test_targets_are_the_sums_of_the_paper(name):
    """v_s = V_s + sum over t >= s of gamma^(t-s) c_s ... c_(t-1) rho_t (r_t + gamma V_t+1 - V_t)"""
    g, n, gamma = seeded(4), 12, 0.9
    new, old, r = (torch.randn(1, n, generator=g, dtype=torch.float64) for _ in range(3))
    v = torch.randn(1, n + 1, generator=g, dtype=torch.float64)
    with executor(name):
        got = pk.vtrace(new, old, r, v, gamma=gamma, rho_clip=1.5, c_clip=0.8)
    ratio = [math.exp(x) for x in (new - old)[0].tolist()]
    r, v = r[0].tolist(), v[0].tolist()
    targets = []
    for s in range(n):
        total = v[s]
        for t in range(s, n):
            trace = math.prod(min(0.8, ratio[i]) for i in range(s, t))
            total += (
                gamma ** (t - s) * trace * min(1.5, ratio[t]) * (r[t] + gamma * v[t + 1] - v[t])
            )
        targets.append(total)
    assert got.returns[0].tolist() == pytest.approx(targets, rel=1e-12)
    following = [*targets[1:], v[n]]
    policy = [min(1, ratio[t]) * (r[t] + gamma * following[t] - v[t]) for t in range(n)]
    assert got.advantages[0].tolist() == pytest.approx(policy, rel=1e-12)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_on_policy_it_is_gae(name, convention):
    lengths = [3, 0, 200, 40] if name == "torch" else [3, 0, 3 * CHUNK + 9, 40]
    for dtype in (torch.float32, torch.float64):
        o = {"convention": convention, "terminated": True, "truncated": True, "gamma": 0.97}
        sequences = off_policy(5, lengths, dtype, spread=0.0, flag_rate=0.01)
        for lam in (1.0, 0.9):
            kwargs, _ = call(o | {"lam": lam} | CLIPS, sequences)
            with executor(name):
                got = pk.vtrace(**kwargs)
                for key in (*PER_STEP[:2], *CLIPS):
                    del kwargs[key]
                want = pk.gae(**kwargs)
            close(got.returns, want.returns, dtype)
            if lam == 1:
                close(got.advantages, want.advantages, dtype)


# ---- ratios --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_extreme_ratios(name):
    """Overflow is clipped or infinite, a probability of 0 cuts, NaN shows there and before."""
    new = torch.tensor([[0.0, 1000.0, 0.0, -math.inf, 0.0]])
    old, r, v = torch.zeros(3, 1, 5) + torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    with executor(name):
        got = pk.vtrace(new, old, r, v, gamma=0.5)
        unclipped = pk.vtrace(new, old, r, v, gamma=0.5, pg_rho_clip=None)
        r[0, 4] = NAN
        behind_a_cut = pk.vtrace(new, old, r, v, gamma=0.5)
        r[0, 4], new[0, 3] = 1.0, NAN
        missing = pk.vtrace(new, old, r, v, gamma=0.5)
    assert got.returns.tolist() == got.advantages.tolist() == [[1.75, 1.5, 1.0, 0.0, 1.0]]
    assert unclipped.advantages.tolist() == [[1.75, math.inf, 1.0, 0.0, 1.0]]
    assert behind_a_cut.returns[0, :4].tolist() == [1.75, 1.5, 1.0, 0.0]
    assert missing.returns.isnan().tolist() == [[True] * 4 + [False]]
    assert missing.advantages.isnan().tolist() == [[True] * 4 + [False]]


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("log_ratio", [5.0, -5.0])
def test_products_of_ratios_beyond_the_range_of_numbers(name, log_ratio):
    """Zero carried by too large a product stays zero; infinity by too small a one, infinite."""
    n = 3 * CHUNK + 10
    new, r = torch.full((1, n), log_ratio), torch.zeros(1, n)
    clips = {"gamma": 0.99, "c_clip": 1000.0, "rho_clip": None}
    with executor(name):
        nothing = pk.vtrace(new, torch.zeros(1, n), r, r, **clips)
        r[0, -1] = math.inf
        infinite = pk.vtrace(new, torch.zeros(1, n), r, torch.zeros(1, n), **clips)
    assert not nothing.returns.any()
    assert not nothing.advantages.any()
    assert (infinite.returns == math.inf).all()
    assert (infinite.advantages == math.inf).all()


# ---- constants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_no_gradient_flows_through_the_targets(name):
    (s,) = off_policy(3, [7], torch.float32)
    inputs = {k: s[k][None] for k in PER_STEP}
    inputs["values"] = torch.cat([inputs["values"], torch.ones(1, 1)], 1)
    with executor(name):
        expected = pk.vtrace(**inputs, gamma=0.9)
        got = pk.vtrace(**{k: x.requires_grad_() for k, x in inputs.items()}, gamma=0.9)
        assert torch.is_grad_enabled()
    for x, wanted in zip(got, expected, strict=True):
        assert not x.requires_grad
        assert torch.equal(x, wanted)


# ---- bits ----------------------------------------------------------------------------------------

LENGTHS = [5, CHUNK, 1, 2 * CHUNK + 3, 0, 70, 3 * CHUNK, 40, 900, 900]
SHORT = [5, 1, 70, 0, 40]


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("convention", ["carry", "zero", "truncate"])
def test_packing_equals_padding_bit_for_bit(name, convention):
    """Right padding, with gaps inside the sequences and without."""
    sequences = off_policy(1, SHORT if name == "torch" else LENGTHS, flag_rate=0.001)
    setting = {"gamma": 0.99, "lam": 0.95, **CLIPS}
    keys = (*PER_STEP, "terminated", "truncated", "next_values")
    for more, masked in (((), {}), (("mask",), {"mask_convention": convention})):
        content = hide(sequences) if more else sequences
        with executor(name):
            one = pk.vtrace(**packed(content, (*keys, *more)), **setting, **masked)
            other = pk.vtrace(
                **padded(content, (*keys, *more)), **setting, mask_convention=convention
            )
        for a, b in zip(one, other, strict=True):
            for x, y in zip(rows_of(a, sequences), rows_of(b, sequences), strict=True):
                assert torch.equal(x, y)


@pytest.mark.parametrize("name", EXECUTORS)
def test_carry_equals_removal_bit_for_bit(name):
    sequences = hide(off_policy(2, SHORT if name == "torch" else LENGTHS, flag_rate=0.01))
    keys = (*PER_STEP, "terminated", "truncated", "next_values", "mask")
    removed = [s | {k: s[k][s["mask"]] for k in keys} for s in sequences]
    setting = {"gamma": 0.99, "lam": 0.95, **CLIPS}
    with executor(name):
        with_gaps = pk.vtrace(**packed(sequences, keys), **setting, mask_convention="carry")
        without = pk.vtrace(**packed(removed, keys[:-1]), **setting)
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
    (long,) = off_policy(3, [40 * CHUNK + 123], torch.float32, 0.05, flag_rate=0.0001)
    others = off_policy(4, [17, 3 * CHUNK, 500], torch.float32)
    o = {"convention": convention, "gamma": 0.999, "lam": 0.99, **CLIPS}
    o |= {"terminated": True, "truncated": True}

    def run(sequences, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            got = pk.vtrace(**call(o, sequences)[0])
        finally:
            torch.set_num_threads(before)
        where = next(i for i, s in enumerate(sequences) if s is long)
        return [rows_of(x, sequences)[where] for x in got]

    with executor(name):
        expected = run([long], 1)
        for threads in (1, 2, 3):
            for order in ([long], [long, *others], [*others, long], [*others, long, *others]):
                for a, b in zip(run(order, threads), expected, strict=True):
                    assert torch.equal(a, b)
        kwargs, _ = call(o, [long])
        n = len(long["rewards"])
        spread = {
            k: torch.stack([x, x], 1)[:, 1] if isinstance(x, torch.Tensor) and len(x) == n else x
            for k, x in kwargs.items()
        }
        for a, b in zip(pk.vtrace(**spread), expected, strict=True):
            assert torch.equal(a, b)


# ---- shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (1, 1)])
def test_empty_and_single_steps(name, shape):
    x, v = torch.ones(shape), torch.ones(shape[0], shape[1] + 1)
    with executor(name):
        got = pk.vtrace(x, x, x, v, gamma=0.5)
    assert got.advantages.shape == got.returns.shape == shape
    assert torch.equal(got.advantages, torch.full(shape, 0.5))
    assert torch.equal(got.returns, torch.full(shape, 1.5))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("wide", ["logprobs", "rollout_logprobs", "rewards", "values", None])
def test_one_fp64_input_makes_fp64_results(name, wide):
    (s,) = off_policy(6, [9], torch.bfloat16)
    inputs = {k: s[k].double() if k == wide else s[k] for k in PER_STEP}
    with executor(name):
        got = pk.vtrace(**inputs, gamma=0.9, cu_seqlens=torch.tensor([0, 9]))
    assert got.advantages.dtype == got.returns.dtype == (torch.float64 if wide else torch.float32)


# ---- torch.library and torch.compile -------------------------------------------------------------


@pytest.mark.parametrize("name", COMPILED)
def test_opcheck(name):
    backend = name.partition(":")[0]
    numbers, flags = torch.randn(5, 3, 5), torch.rand(2, 3, 5) < 0.3
    op = torch.ops.ppo_kernels.vtrace
    with executor(name):
        setting = (torch.rand(3, 5) < 0.7, flags[0], flags[1], None, torch.rand(3))
        settings_ = (0.9, 0.0, 1.0, 1.0, math.inf, "carry", backend)
        opcheck(op, (*numbers, torch.randn(3), *setting, *settings_))
        flat = torch.randn(4, 7)
        setting = (None, None, None, torch.tensor([0, 3, 7]), None)
        opcheck(op, (*flat, None, None, *setting, 0.9, 1.0, 1.0, 1.0, 1.0, "none", backend))


@pytest.mark.parametrize("name", ["torch", *COMPILED[-1:]])
def test_compiles_in_one_graph(name):
    g = seeded(0)
    new, old, r = (torch.randn(2, 6, generator=g) for _ in range(3))
    v = torch.randn(2, 7, generator=g)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1] * 6])

    def f(new, old, r, v):
        got = pk.vtrace(new, old, r, v, gamma=0.9, mask=mask, mask_convention="carry")
        flat = [x.flatten() for x in (new, old, r, v[:, 1:])]
        ends = torch.tensor([0, 5, 5, 12], device=new.device)
        sums = pk.vtrace(*flat, gamma=0.9, pg_rho_clip=None, cu_seqlens=ends)
        policy = -(got.advantages * new).sum() - (sums.advantages * flat[0]).sum()
        return policy + (got.returns - v[:, :-1]).square().sum() + sums.returns.sum()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    results = []
    with executor(name):
        for function in (f, compiled):
            inputs = [x.clone().requires_grad_() for x in (new, old, r, v)]
            total = function(*inputs)
            grads = torch.autograd.grad(total, [inputs[0], inputs[3]])
            results.append((total.detach(), *grads))
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted)


# ---- bad input -----------------------------------------------------------------------------------

X, N = torch.ones(2, 3), torch.ones(6)
PACKED = dict.fromkeys(PER_STEP, N)
BAD = {
    "logprobs list": (dict(logprobs=[1.0]), TypeError, "logprobs: expected a tensor, got list"),
    "logprobs int": (dict(logprobs=X.int()), TypeError, "logprobs: expected dtype .*, got int32"),
    "logprobs longer": (
        dict(logprobs=torch.ones(2, 4)),
        ValueError,
        r"^logprobs: expected shape \[2, 3\] \(as rewards\), got \[2, 4\]",
    ),
    "rollout_logprobs shape": (
        dict(rollout_logprobs=N),
        ValueError,
        r"rollout_logprobs: expected shape \[2, 3\] \(as rewards\), got \[6\]",
    ),
    "rewards 1-D": (dict(rewards=N), ValueError, r"rewards: expected shape \[B, T\].*, got \[6\]"),
    "values shape": (
        dict(values=torch.ones(2, 5)),
        ValueError,
        r"values: expected shape \[2, 3\] or \[2, 4\].*got \[2, 5\]",
    ),
    "gamma": (dict(gamma=1.5), ValueError, r"gamma: .*\[0, 1\], got 1.5"),
    "lam": (dict(lam=-0.1), ValueError, r"lam: .*\[0, 1\], got -0.1"),
    "lam shape": (dict(lam=torch.ones(3)), ValueError, r"lam: expected shape \[2\].*got \[3\]"),
    "lam range": (
        dict(lam=torch.tensor([0.5, 1.5])),
        ValueError,
        r"lam: expected finite numbers in \[0, 1\], got 1.5 at index 1",
    ),
    "rho_clip": (dict(rho_clip=-1), ValueError, r"rho_clip: .*\[0, inf\)?, got -1"),
    "rho_clip nan": (dict(rho_clip=NAN), ValueError, r"rho_clip: .* got nan"),
    "c_clip": (dict(c_clip=-0.5), ValueError, r"c_clip: .* got -0.5"),
    "c_clip none": (dict(c_clip=None), TypeError, "c_clip: expected a number, got NoneType"),
    "c_clip inf": (dict(c_clip=math.inf), ValueError, "c_clip: expected a finite number"),
    "pg_rho_clip": (dict(pg_rho_clip="1"), TypeError, "pg_rho_clip: expected a number, got str"),
    "mask shape": (
        dict(mask=torch.ones(2, 4), mask_convention="carry"),
        ValueError,
        r"mask: expected shape \[2, 3\].*got \[2, 4\]",
    ),
    "no convention": (
        dict(mask=X),
        ValueError,
        "mask_convention: expected one of carry, zero, truncate with a mask, got None",
    ),
    "truncated alone": (
        dict(truncated=X),
        ValueError,
        "next_values: expected together with truncated, got None",
    ),
    "offsets decrease": (
        dict(**PACKED, cu_seqlens=torch.tensor([0, 4, 3, 6])),
        ValueError,
        r"cu_seqlens: expected not to decrease \(after 4\), got 3 at index 2",
    ),
    "backend": (dict(backend="gpu"), ValueError, "backend: unknown backend 'gpu'"),
}


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("what", BAD)
def test_bad_input(name, what):
    given, error, message = BAD[what]
    arguments = dict.fromkeys(PER_STEP, X) | {"gamma": 0.9} | given
    with executor(name), raises(name, error, message):
        pk.vtrace(**arguments)
