"""discounted_returns beyond the cube: the loop, gradients, errors."""

import pytest
import torch
from device import raises, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_oracle import (
    CONVENTIONS,
    EXECUTORS,
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
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_gradcheck_of_packed_returns(name, convention):
    g = seeded(8)
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


@pytest.mark.parametrize("name", EXECUTORS)
def test_bad_input_of_discounted_returns(name):
    padded, packed = torch.ones(2, 3), torch.ones(6)
    with executor(name):
        with pytest.raises(ValueError, match=r"bootstrap: expected shape \[2\].*got \[3\]"):
            pk.discounted_returns(padded, gamma=0.9, bootstrap=torch.ones(3))
        with pytest.raises(ValueError, match="gamma: "):
            pk.discounted_returns(padded, gamma=-1)
        with raises(name, ValueError, "cu_seqlens: expected to end at 6"):
            pk.discounted_returns(packed, gamma=0.9, cu_seqlens=torch.tensor([0, 7]))
