"""gae and discounted_returns beyond the cube: conventions, edges, bits, gradients, graphs, errors.

The oracle is a plain loop over Python floats, one sequence at a time, that first lists the steps
which exist and then walks them as Schulman et al. 2016 (arXiv:1506.02438) define the estimator.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import ppo_kernels as pk
from ppo_kernels.testing import executor, executors

EXECUTORS = executors("gae", "discounted_returns", device="cpu")
COMPILED = [e for e in EXECUTORS if e != "torch"]
CHUNK = 1024  # of csrc/cpu/scan.cpp
CONVENTIONS = [None, "carry", "zero", "truncate"]
NAN = float("nan")
TOKENS = ("rewards", "values", "next_values", "mask", "terminated", "truncated")


# ---- the oracle ----------------------------------------------------------------------------------


def oracle(
    rewards,
    values,
    gamma,
    lam,
    bootstrap=0.0,
    mask=None,
    convention=None,
    terminated=None,
    truncated=None,
    next_values=None,
):
    """Advantages of one sequence; lists of numbers in, list of numbers out."""
    steps = list(range(len(rewards)))
    live = steps if mask is None else [t for t in steps if mask[t]]
    after_the_end = bootstrap
    if convention == "carry":
        steps = live
    elif convention == "truncate":
        if not live or live[-1] != steps[-1]:
            after_the_end = 0.0
        steps = steps[: live[-1] + 1] if live else []
    alive = set(live)

    def number(x, t):
        return x[t] if t in alive else 0.0

    def flag(x, t):
        return x is not None and t in alive and bool(x[t])

    advantages = [0.0] * len(rewards)
    accumulated = 0.0
    for t, following in reversed(list(zip(steps, [*steps[1:], None], strict=False))):
        if flag(terminated, t):
            next_value, accumulated = 0.0, 0.0
        elif flag(truncated, t):
            next_value, accumulated = next_values[t], 0.0
        else:
            next_value = after_the_end if following is None else number(values, following)
        delta = number(rewards, t) + gamma * next_value - number(values, t)
        accumulated = delta + gamma * lam * accumulated
        if t in alive:
            advantages[t] = accumulated
    return advantages


def close(got, expected, dtype=torch.float32):
    """Within one ulp of fp32, and in fp64 of the rounding of the largest magnitude."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = expected.abs().max().item() if expected.numel() else 0.0
    rtol = 2**-23 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=1e-12 * max(scale, 1.0))


def batch(seed, lengths, dtype=torch.float64, density=0.7, flag_rate=0.15):
    """Sequences of random numbers, masks and flags; what is masked or unused is NaN."""
    g = torch.Generator().manual_seed(seed)
    sequences = []
    for n in lengths:

        def normal(n=n):
            return torch.randn(n, generator=g, dtype=torch.float64).to(dtype)

        def chosen(rate, n=n):
            return torch.rand(n, generator=g) < rate

        mask, truncated = chosen(density), chosen(flag_rate)
        sequences.append(
            {
                "rewards": normal(),
                "values": normal(),
                "next_values": torch.where(truncated, normal(), NAN),
                "mask": mask,
                "terminated": chosen(flag_rate),
                "truncated": truncated,
                "bootstrap": normal(1)[0],
            }
        )
    return sequences


def hide(sequences):
    """The same batch with NaN under the mask."""
    return [s | {k: torch.where(s["mask"], s[k], NAN) for k in TOKENS[:3]} for s in sequences]


def pad(rows, width, fill):
    return torch.stack(
        [torch.cat([x, torch.full((width - len(x),), fill, dtype=x.dtype)]) for x in rows]
    )


def packed(sequences, keys):
    lengths = [len(s["rewards"]) for s in sequences]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return {k: torch.cat([s[k] for s in sequences]) for k in keys} | {"cu_seqlens": offsets}


def padded(sequences, keys):
    """Right padding: NaN under a mask that is 0 there."""
    width = max(len(s["rewards"]) for s in sequences)
    fill = {"rewards": NAN, "values": NAN, "next_values": NAN}
    rows = {k: pad([s[k] for s in sequences], width, fill.get(k, k != "mask")) for k in keys}
    ones = [torch.ones(len(s["rewards"]), dtype=torch.bool) for s in sequences]
    return {"mask": pad(ones, width, False)} | rows


def rows_of(x, sequences):
    """Per-sequence results of a packed [N] or padded [B, T] tensor."""
    lengths = [len(s["rewards"]) for s in sequences]
    if x.dim() == 1:
        return list(x.split(lengths))
    return [row[:n] for row, n in zip(x, lengths, strict=True)]


options = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "lengths": st.lists(st.integers(0, 40), min_size=1, max_size=6),
        "convention": st.sampled_from(CONVENTIONS),
        "terminated": st.booleans(),
        "truncated": st.booleans(),
        "gamma": st.sampled_from([0.0, 0.9, 0.99, 1.0]),
        "lam": st.sampled_from([0.0, 0.5, 0.95, 1.0]),
        "value_lam": st.sampled_from([None, 0.0, 0.7, 1.0]),
    }
)


def arguments(o, sequences, layout=packed):
    """The keyword arguments of gae, and each sequence's arguments of the oracle."""
    keys = ["rewards", "values"]
    keys += ["mask"] if o["convention"] else []
    keys += ["terminated"] if o["terminated"] else []
    keys += ["truncated", "next_values"] if o["truncated"] else []
    kwargs = layout(hide(sequences) if o["convention"] else sequences, keys)
    kwargs |= {"gamma": o["gamma"], "lam": o["lam"], "value_lam": o["value_lam"]}
    if o["convention"]:
        kwargs["mask_convention"] = o["convention"]
    exact = [
        {k: s[k].tolist() for k in keys}
        | {"gamma": o["gamma"], "lam": o["lam"], "convention": o["convention"]}
        for s in sequences
    ]
    return kwargs, exact


# ---- against the oracle --------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=60, deadline=None)
@given(o=options)
def test_packed_equals_the_loop(name, dtype, o):
    sequences = batch(o["seed"], o["lengths"], dtype)
    kwargs, exact = arguments(o, sequences)
    with executor(name):
        got = pk.gae(**kwargs)
    assert got.advantages.dtype == got.returns.dtype == dtype
    advantages = rows_of(got.advantages, sequences)
    returns = rows_of(got.returns, sequences)
    value_lam = o["lam"] if o["value_lam"] is None else o["value_lam"]
    for i, e in enumerate(exact):
        close(advantages[i], oracle(**e), dtype)
        live = e.get("mask", [True] * len(e["rewards"]))
        target = oracle(**e | {"lam": value_lam})
        target = [x + v if m else 0 for x, v, m in zip(target, e["values"], live, strict=True)]
        close(returns[i], target, dtype)


@pytest.mark.parametrize("name", EXECUTORS)
@settings(max_examples=60, deadline=None)
@given(o=options, rows=st.integers(1, 4), width=st.integers(0, 20), longer=st.booleans())
def test_padded_equals_the_loop(name, o, rows, width, longer):
    """Rows of one width, with and without the extra column of values, and a lambda per row."""
    sequences = batch(o["seed"], [width] * rows)
    stacked = lambda sequences, keys: {k: torch.stack([s[k] for s in sequences]) for k in keys}  # noqa: E731
    kwargs, exact = arguments(o, sequences, stacked)
    kwargs["lam"] = torch.rand(rows, generator=torch.Generator().manual_seed(o["seed"])).double()
    if longer:
        last = torch.stack([s["bootstrap"] for s in sequences])
        kwargs["values"] = torch.cat([kwargs["values"], last[:, None]], 1)
    with executor(name):
        got = pk.gae(**kwargs)
    for i, e in enumerate(exact):
        end = sequences[i]["bootstrap"].item() if longer else 0.0
        expected = oracle(**e | {"lam": kwargs["lam"][i].item(), "bootstrap": end})
        close(got.advantages[i], expected, torch.float64)
        if o["value_lam"] is not None:
            live = e.get("mask", [True] * width)
            target = oracle(**e | {"lam": o["value_lam"], "bootstrap": end})
            target = [x + v if m else 0 for x, v, m in zip(target, e["values"], live, strict=True)]
            close(got.returns[i], target, torch.float64)


@pytest.mark.parametrize("name", EXECUTORS)
@settings(max_examples=60, deadline=None)
@given(o=options, bootstrapped=st.booleans())
def test_discounted_returns_equal_the_loop(name, o, bootstrapped):
    """Values of 0 and lambda 1 leave the discounted return."""
    sequences = batch(o["seed"], o["lengths"])
    kwargs, exact = arguments(o | {"truncated": False}, sequences)
    for unused in ("values", "lam", "value_lam"):
        kwargs.pop(unused)
    if bootstrapped:
        kwargs["bootstrap"] = torch.stack([s["bootstrap"] for s in sequences])
    with executor(name):
        got = rows_of(pk.discounted_returns(**kwargs), sequences)
    for i, e in enumerate(exact):
        end = sequences[i]["bootstrap"].item() if bootstrapped else 0.0
        silent = {"values": [0.0] * len(e["rewards"]), "lam": 1.0, "bootstrap": end}
        close(got[i], oracle(**e | silent), torch.float64)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_length_is_exact(name, dtype):
    """Integers without discount are exact in any order: a lost or doubled step shows at once."""
    g = torch.Generator().manual_seed(0)
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


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_three_steps_by_hand(name):
    r, v = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 2.0, 8.0, 16.0]])
    with executor(name):
        got = pk.gae(r, v, gamma=0.5, lam=0.5)
        assert got.advantages.tolist() == [[-2 + 0.25 * (4 + 0.25 * 3), 4.75, 3.0]]
        assert got.returns.tolist() == [[4 - 2 + 1.1875, 6.75, 11.0]]
        # The bootstrap enters once: through the last delta.
        bare = pk.gae(r, v[:, :3], gamma=0.5, lam=0.5)
        assert bare.advantages[0, 2].item() == 3 - 8
        ended = pk.gae(r, v, gamma=0.5, lam=0.5, terminated=torch.tensor([[0, 1, 0]]))
        assert ended.advantages.tolist() == [[-2.0, 0.0, 3.0]]
        cut = pk.gae(
            r, v, gamma=0.5, lam=0.5, truncated=torch.tensor([[0, 1, 0]]),
            next_values=torch.tensor([[NAN, 10.0, NAN]]),
        )  # fmt: skip
        assert cut.advantages.tolist() == [[-2 + 0.25 * 5, 5.0, 3.0]]
        both = pk.gae(
            r, v, gamma=0.5, lam=0.5, terminated=torch.tensor([[0, 1, 0]]),
            truncated=torch.tensor([[0, 1, 0]]), next_values=torch.full((1, 3), NAN),
        )  # fmt: skip
        assert both.advantages.tolist() == ended.advantages.tolist()


@pytest.mark.parametrize("name", EXECUTORS)
def test_the_conventions_differ_as_they_say(name):
    r = torch.tensor([[1.0, NAN, 2.0, NAN]])
    v = torch.tensor([[4.0, NAN, 8.0, NAN, 16.0]])
    mask = torch.tensor([[1, 0, 1, 0]])
    expected = {
        "carry": [1 + 0.5 * 8 - 4 + 0.25 * (2 + 0.5 * 16 - 8), 0.0, 2 + 0.5 * 16 - 8, 0.0],
        # Masked step 3: delta 0.5 * 16, reaching step 2 with 0.25; step 1: 0.5 * 8.
        "zero": [1 - 4 + 0.25 * (0.5 * 8 + 0.25 * (2 - 8 + 0.25 * 8)), 0.0, 2 - 8 + 0.25 * 8, 0.0],
        "truncate": [1 - 4 + 0.25 * (0.5 * 8 + 0.25 * (2 - 8)), 0.0, 2 - 8, 0.0],
    }
    for convention, advantages in expected.items():
        with executor(name):
            got = pk.gae(r, v, gamma=0.5, lam=0.5, mask=mask, mask_convention=convention)
        assert got.advantages.tolist() == [advantages], convention
        returns = [
            a + x if m else 0.0 for a, x, m in zip(advantages, v[0, :4], mask[0], strict=True)
        ]
        assert got.returns.tolist() == [[float(x) for x in returns]], convention


@pytest.mark.parametrize("name", EXECUTORS)
def test_lambda_one_is_the_return_minus_the_value_and_lambda_zero_the_td_error(name):
    g = torch.Generator().manual_seed(3)
    r, v = torch.randn(3, 50, generator=g), torch.randn(3, 51, generator=g)
    with executor(name):
        monte_carlo = pk.gae(r, v, gamma=0.9, lam=1.0)
        sums = pk.discounted_returns(r, gamma=0.9, bootstrap=v[:, -1])
        one_step = pk.gae(r, v, gamma=0.9, lam=0.0)
    torch.testing.assert_close(monte_carlo.returns, sums, rtol=0, atol=2e-6)
    torch.testing.assert_close(monte_carlo.advantages, sums - v[:, :-1], rtol=0, atol=2e-6)
    td = (r.double() + 0.9 * v[:, 1:].double() - v[:, :-1].double()).float()
    torch.testing.assert_close(one_step.advantages, td, rtol=2**-23, atol=1e-14)


# ---- the conventions of other libraries ----------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
def test_the_recurrence_that_carries_over_masked_tokens(name):
    """verl's form: both registers keep their contents where the response mask is 0."""
    (s,) = batch(5, [60], torch.float32)
    r, v, m = s["rewards"], s["values"], s["mask"].double()
    register = {"value": torch.zeros((), dtype=torch.float64), "advantage": torch.zeros(())}
    out = torch.zeros(60, dtype=torch.float64)
    for t in range(59, -1, -1):
        td = r[t].double() + 0.97 * register["value"] - v[t].double()
        fresh = td + 0.97 * 0.9 * register["advantage"]
        register["value"] = torch.lerp(register["value"], v[t].double(), m[t])
        register["advantage"] = torch.lerp(register["advantage"].double(), fresh, m[t])
        out[t] = fresh
    with executor(name):
        got = pk.gae(
            r[None], v[None], gamma=0.97, lam=0.9, mask=s["mask"][None], mask_convention="carry"
        )
    close(got.advantages[0], out * m)


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("convention", ["zero", "truncate"])
def test_the_recurrence_on_values_zeroed_after_the_end(name, convention):
    """TRL's form: rewards and values filled with 0 past the response, no mask in the loop."""
    (s,) = batch(6, [60], torch.float32)
    length = 41
    live = torch.arange(60) < length
    r, v = (torch.where(live, s[k], 0.0).double() for k in ("rewards", "values"))
    reversed_advantages = []
    for t in range(59, -1, -1):
        value_ahead = v[t + 1] if t < 59 else 0.0
        last = reversed_advantages[-1] if reversed_advantages else 0.0
        reversed_advantages.append(r[t] + 0.97 * value_ahead - v[t] + 0.97 * 0.9 * last)
    expected = torch.stack(reversed_advantages[::-1])
    with executor(name):
        got = pk.gae(
            s["rewards"][None], s["values"][None], gamma=0.97, lam=0.9, mask=live[None],
            mask_convention=convention,
        )  # fmt: skip
    close(got.advantages[0], expected)


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


@pytest.mark.parametrize("name", [e for e in COMPILED if e != "triton"])  # see test_triton_scan.py
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


# ---- NaN, infinity, empty ------------------------------------------------------------------------


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
@pytest.mark.parametrize("convention", ["carry", "zero", "truncate"])
def test_fully_masked_rows_give_connected_zeros(name, convention):
    r = torch.full((2, 4), NAN, requires_grad=True)
    v = torch.full((2, 5), NAN, requires_grad=True)
    with executor(name):
        got = pk.gae(r, v, gamma=0.9, lam=0.9, mask=torch.zeros(2, 4), mask_convention=convention)
        (got.advantages.sum() + got.returns.sum()).backward()
    assert not got.advantages.any()
    assert not got.returns.any()
    assert not r.grad.any()
    assert not v.grad.any()


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
    g = torch.Generator().manual_seed(0)
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


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64]
)
def test_masks_and_flags_of_any_dtype(name, dtype):
    r, v = torch.arange(6.0)[None], torch.ones(1, 6)
    mask, ends = torch.tensor([[1, 0, 1, 1, 0, 1]]), torch.tensor([[0, 0, 1, 0, 0, 0]])
    arguments = {"gamma": 0.5, "lam": 0.5, "mask_convention": "zero"}
    with executor(name):
        expected = pk.gae(r, v, **arguments, mask=mask, terminated=ends)
        got = pk.gae(r, v, **arguments, mask=mask.to(dtype), terminated=ends.to(dtype))
        if dtype.is_floating_point:
            minus_zero = torch.where(mask == 0, -0.0, 0.25).to(dtype)
            also = pk.gae(r, v, **arguments, mask=minus_zero, terminated=ends.to(dtype))
            assert torch.equal(also.advantages, expected.advantages)
    assert torch.equal(got.advantages, expected.advantages)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("value_lam", [None, 0.5])
def test_gradcheck(name, convention, value_lam):
    g = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)

    r, v, n = normal(2, 7), normal(2, 8), normal(2, 7)
    some = lambda rate: torch.rand(2, 7, generator=g) < rate  # noqa: E731
    masked = {"mask": some(0.7), "mask_convention": convention} if convention else {}
    flags = {"terminated": some(0.2), "truncated": some(0.3)}

    def f(r, v, n):
        return tuple(
            pk.gae(r, v, gamma=0.9, lam=0.8, value_lam=value_lam, next_values=n, **flags, **masked)
        )

    with executor(name):
        assert torch.autograd.gradcheck(f, (r, v, n))


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_gradcheck_of_packed_returns(name, convention):
    g = torch.Generator().manual_seed(8)
    r = torch.randn(9, generator=g, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, generator=g, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 4, 4, 5, 9], dtype=torch.int32)
    mask = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0])
    masked = {"mask": mask, "mask_convention": convention} if convention else {}
    ends = torch.tensor([0, 0, 1, 0, 0, 0, 0, 0, 0])

    def f(r, b):
        return pk.discounted_returns(
            r, gamma=0.9, cu_seqlens=offsets, bootstrap=b, terminated=ends, **masked
        )

    with executor(name):
        assert torch.autograd.gradcheck(f, (r, b))


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
        g = torch.Generator().manual_seed(1)
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
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_cuts_and_ends_at_the_edges_of_chunks(name, convention):
    """Flags and last live steps just before, at and after where a chunk begins, from both ends."""
    n = 3 * CHUNK + 5
    edges = [CHUNK - 1, CHUNK, 2 * CHUNK - 1, n - CHUNK - 1, n - CHUNK, n - CHUNK + 1, n - 1]
    g = torch.Generator().manual_seed(0)

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
    g = torch.Generator().manual_seed(0)
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


# ---- bad input -----------------------------------------------------------------------------------

R, V = torch.ones(2, 3), torch.ones(2, 3)
N = torch.ones(6)
BAD = {
    "rewards list": (dict(rewards=[1.0]), TypeError, "rewards: expected a tensor, got list"),
    "rewards int": (dict(rewards=R.int()), TypeError, "rewards: expected dtype .*, got int32"),
    "rewards 1-D": (dict(rewards=N), ValueError, r"rewards: expected shape \[B, T\].*, got \[6\]"),
    "values shape": (
        dict(values=torch.ones(2, 5)),
        ValueError,
        r"values: expected shape \[2, 3\] or \[2, 4\].*got \[2, 5\]",
    ),
    "packed values": (
        dict(rewards=N, values=torch.ones(7), cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        r"values: expected shape \[6\].*got \[7\]",
    ),
    "values dtype": (dict(values=V.long()), TypeError, "values: expected dtype .*, got int64"),
    "gamma": (dict(gamma=1.5), ValueError, r"gamma: .*\[0, 1\], got 1.5"),
    "gamma nan": (dict(gamma=NAN), ValueError, r"gamma: .*\[0, 1\], got nan"),
    "lam": (dict(lam=-0.1), ValueError, r"lam: .*\[0, 1\], got -0.1"),
    "lam text": (dict(lam="1"), TypeError, "lam: expected a number, got str"),
    "lam shape": (dict(lam=torch.ones(3)), ValueError, r"lam: expected shape \[2\].*got \[3\]"),
    "lam range": (
        dict(lam=torch.tensor([0.5, 1.5])),
        ValueError,
        r"lam: expected finite numbers in \[0, 1\], got 1.5 at index 1",
    ),
    "lam nan": (
        dict(lam=torch.tensor([NAN, 1])),
        ValueError,
        r"lam: expected finite numbers in \[0, 1\], got nan at index 0",
    ),
    "value_lam range": (
        dict(value_lam=torch.tensor([0.5, -1.0])),
        ValueError,
        r"value_lam: expected finite numbers in \[0, 1\], got -1.0 at index 1",
    ),
    "lam grad": (
        dict(lam=torch.ones(2, requires_grad=True)),
        ValueError,
        r"lam: .*lam\.detach\(\)",
    ),
    "mask shape": (
        dict(mask=torch.ones(2, 4), mask_convention="carry"),
        ValueError,
        r"mask: expected shape \[2, 3\].*got \[2, 4\]",
    ),
    "no convention": (
        dict(mask=torch.ones(2, 3)),
        ValueError,
        "mask_convention: expected one of carry, zero, truncate with a mask, got None",
    ),
    "no mask": (
        dict(mask_convention="zero"),
        ValueError,
        "mask_convention: expected None without a mask, got 'zero'",
    ),
    "convention": (
        dict(mask=torch.ones(2, 3), mask_convention="skip"),
        ValueError,
        "mask_convention: unknown mask_convention 'skip', expected one of carry, zero, truncate",
    ),
    "truncated alone": (
        dict(truncated=torch.ones(2, 3)),
        ValueError,
        "next_values: expected together with truncated, got None",
    ),
    "next_values alone": (
        dict(next_values=torch.ones(2, 3)),
        ValueError,
        "truncated: expected together with next_values, got None",
    ),
    "terminated shape": (
        dict(terminated=torch.ones(2)),
        ValueError,
        r"terminated: expected shape \[2, 3\].*got \[2\]",
    ),
    "offsets with padding": (
        dict(cu_seqlens=torch.tensor([0, 6])),
        ValueError,
        r"cu_seqlens: expected only with packed \[N\] rewards, got \[2, 3\]",
    ),
    "offsets dtype": (
        dict(rewards=N, values=N, cu_seqlens=torch.tensor([0.0, 6.0])),
        TypeError,
        "cu_seqlens: expected dtype int32, int64, got float32",
    ),
    "offsets empty": (
        dict(rewards=N, values=N, cu_seqlens=torch.tensor([], dtype=torch.long)),
        ValueError,
        r"cu_seqlens: expected shape \[sequences \+ 1\], got \[0\]",
    ),
    "offsets start": (
        dict(rewards=N, values=N, cu_seqlens=torch.tensor([1, 6])),
        ValueError,
        "cu_seqlens: expected to start at 0, got 1 at index 0",
    ),
    "offsets decrease": (
        dict(rewards=N, values=N, cu_seqlens=torch.tensor([0, 4, 3, 6])),
        ValueError,
        r"cu_seqlens: expected not to decrease \(after 4\), got 3 at index 2",
    ),
    "offsets end": (
        dict(rewards=N, values=N, cu_seqlens=torch.tensor([0, 4, 5])),
        ValueError,
        "cu_seqlens: expected to end at 6, the number of tokens, got 5 at index 2",
    ),
    "backend": (dict(backend="gpu"), ValueError, "backend: unknown backend 'gpu'"),
}


@pytest.mark.parametrize("name", EXECUTORS)
@pytest.mark.parametrize("what", BAD)
def test_bad_input(name, what):
    given, error, message = BAD[what]
    if name == "triton" and "at index" in message:
        pytest.skip("only check() tells: see test_triton_scan.py")
    arguments = {"rewards": R, "values": V, "gamma": 0.9, "lam": 0.9} | given
    with executor(name), pytest.raises(error, match=message):
        pk.gae(**arguments)


@pytest.mark.parametrize("name", EXECUTORS)
def test_bad_input_of_discounted_returns(name):
    with executor(name):
        with pytest.raises(ValueError, match=r"bootstrap: expected shape \[2\].*got \[3\]"):
            pk.discounted_returns(R, gamma=0.9, bootstrap=torch.ones(3))
        with pytest.raises(ValueError, match="gamma: "):
            pk.discounted_returns(R, gamma=-1)
        if name == "triton":
            return  # only check() tells
        with pytest.raises(ValueError, match="cu_seqlens: expected to end at 6"):
            pk.discounted_returns(N, gamma=0.9, cu_seqlens=torch.tensor([0, 7]))
