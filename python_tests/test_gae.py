"""gae beyond the cube: the loop, values by hand, mask conventions, gradients, errors."""

import pytest
import torch
from device import INTERPRETED, raises, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_oracle import (
    CONVENTIONS,
    EXECUTORS,
    NAN,
    arguments,
    batch,
    close,
    options,
    oracle,
    rows_of,
)

import ppo_kernels as pk
from ppo_kernels.testing import executor


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
    kwargs["lam"] = torch.rand(rows, generator=seeded(o["seed"])).double()
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
    g = seeded(3)
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


# ---- masks and flags -----------------------------------------------------------------------------


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
    g = seeded(7)

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
        assert torch.autograd.gradcheck(f, (r, v, n), fast_mode=INTERPRETED)


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
    arguments = {"rewards": R, "values": V, "gamma": 0.9, "lam": 0.9} | given
    with executor(name), raises(name, error, message):
        pk.gae(**arguments)
