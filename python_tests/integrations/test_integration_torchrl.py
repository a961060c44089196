"""torchrl's estimates, ours and its own."""

import pytest
import torch
from comparing import compare

functional = pytest.importorskip("torchrl.objectives.value.functional", reason="needs torchrl")
from ppo_kernels.integrations import torchrl  # noqa: E402

GAE = ("generalized_advantage_estimate", "vec_generalized_advantage_estimate")
TD = ("td_lambda_return_estimate", "vec_td_lambda_return_estimate")


VECTORISED = (GAE[1], TD[1])
ZERO = [(0.9, 0.0), (0.0, 0.5)]
DISCOUNTS = [(0.99, 0.95), (1.0, 1.0), *ZERO]


def pair(name, *discounts):
    """Ours, torchrl's, and its loop with discounts in float64: it rounds numbers to fp32."""
    wide = [torch.tensor(x, dtype=torch.float64) for x in discounts]
    ours, host = (
        lambda *args, f=f, **how: f(*discounts, *args, **how)
        for f in (getattr(torchrl, name), getattr(functional, name))
    )
    loop = getattr(functional, name.removeprefix("vec_"))
    return ours, host, lambda *args, **how: loop(*wide, *args, **how)


def steps(shape, seed=0, ends=0.2):
    g = torch.Generator().manual_seed(seed)
    floats = [torch.randn(shape, generator=g) for _ in range(3)]
    done = torch.rand(shape, generator=g) < ends
    return floats, done, done & (torch.rand(shape, generator=g) < 0.5)


@pytest.mark.parametrize(("gamma", "lmbda"), DISCOUNTS)
@pytest.mark.parametrize("name", GAE)
@pytest.mark.parametrize("given", [True, False])
def test_gae(name, gamma, lmbda, given):
    floats, done, terminated = steps((2, 3, 17, 1))
    if gamma * lmbda == 0 and name in VECTORISED:
        # IndexError, as its kernel has no element; test_no_series_at_all holds ours to the truth.
        pytest.skip("torchrl's own raises at gamma * lambda = 0")
    flags = (done, terminated) if given else (done,)
    ours, host, truth = (lambda *x, f=f: f(*x, *flags) for f in pair(name, gamma, lmbda))
    compare(ours, host, floats, differentiable=range(3), truth=truth)


@pytest.mark.parametrize(("gamma", "lmbda"), DISCOUNTS)
@pytest.mark.parametrize("name", TD)
def test_td_lambda(name, gamma, lmbda):
    if gamma * lmbda == 0 and name in VECTORISED:
        # IndexError, as its kernel has no element; test_no_series_at_all holds ours to the truth.
        pytest.skip("torchrl's own raises at gamma * lambda = 0")
    floats, done, terminated = steps((3, 17, 2))
    ours, host, truth = (lambda *x, f=f: f(*x, done, terminated) for f in pair(name, gamma, lmbda))
    compare(ours, host, floats[:2], differentiable=range(2), truth=truth)


@pytest.mark.parametrize(
    "thresholds", [(1.0, 1.0), (2.0, 0.5), (torch.tensor(1.5), torch.tensor(1.0))]
)
@pytest.mark.parametrize("given", [True, False])
def test_vtrace(thresholds, given):
    (state, after, reward), done, terminated = steps((3, 17, 1))
    (log_pi, log_mu, _), _, _ = steps((3, 17, 1), seed=1)
    flags = (done, terminated if given else None)
    ours, host, truth = (
        lambda *x, f=f: f(*x, *flags, *thresholds) for f in pair("vtrace_advantage_estimate", 0.97)
    )
    compare(ours, host, [log_pi, log_mu, state, after, reward], truth=truth)


@pytest.mark.parametrize("name", [*GAE, "td_lambda_return_estimate"])
@pytest.mark.parametrize(
    ("shape", "time_dim"), [((3, 9), -1), ((9, 3), 0), ((2, 9, 3, 1), 1), ((9,), -1)]
)
def test_time_dim(name, shape, time_dim):
    floats, done, terminated = steps(shape)
    floats = floats if name in GAE else floats[:2]
    ours, host, truth = (
        lambda *x, f=f: f(*x, done, terminated, time_dim=time_dim) for f in pair(name, 0.99, 0.95)
    )
    compare(ours, host, floats, truth=truth)


@pytest.mark.parametrize(("gamma", "lmbda"), ZERO)
@pytest.mark.parametrize("name", VECTORISED)
def test_no_series_at_all(name, gamma, lmbda):
    floats, done, terminated = steps((3, 17, 1))
    inputs = floats if name in GAE else floats[:2]
    ours, host, _ = pair(name, gamma, lmbda)
    with pytest.raises(IndexError):
        host(*inputs, done, terminated)
    loop = getattr(functional, name.removeprefix("vec_"))
    torch.testing.assert_close(
        ours(*inputs, done, terminated), loop(gamma, lmbda, *inputs, done, terminated)
    )


def test_long_series_are_not_cut():
    shape = (1, 3000, 1)
    ones, zeros, done = torch.ones(shape), torch.zeros(shape), torch.zeros(shape).bool()
    ours, _, truth = pair("vec_generalized_advantage_estimate", 0.999, 0.999)
    exact = truth(zeros.double(), zeros.double(), ones.double(), done)[0]
    made = ours(zeros, zeros, ones, done)[0].double()
    assert (made - exact).abs().max() <= torch.finfo(torch.float32).eps * exact.max()


def test_discounts_per_step_and_bad_shapes_are_torchrls():
    floats, done, terminated = steps((3, 9, 1))
    gammas = torch.rand(3, 9, 1)
    made = torchrl.vec_generalized_advantage_estimate(gammas, 0.9, *floats, done, terminated)
    host = functional.vec_generalized_advantage_estimate(gammas, 0.9, *floats, done, terminated)
    assert all(a.equal(b) for a, b in zip(made, host, strict=True))
    with pytest.raises(RuntimeError, match="must share a unique shape"):
        torchrl.generalized_advantage_estimate(0.9, 0.9, *floats, done[:, :-1])
    with pytest.raises(RuntimeError, match="rolling_gamma=False"):
        torchrl.td_lambda_return_estimate(0.9, 0.9, *floats[:2], done, rolling_gamma=False)


def test_a_differentiated_vtrace_is_torchrls():
    (state, after, reward), done, _ = steps((3, 9, 1))
    state.requires_grad_()
    made = torchrl.vtrace_advantage_estimate(0.9, reward, after, state, after, reward, done)
    made[0].sum().backward()
    assert state.grad.abs().sum() > 0


@pytest.mark.parametrize("vectorized", [True, False])
def test_modules_use_them(vectorized):
    """GAE, TD(lambda) and V-trace estimators over a value network, patched and not."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torch import nn
    from torchrl.objectives.value import GAE as Module
    from torchrl.objectives.value import TDLambdaEstimator

    from ppo_kernels import op_counts, reset_op_counts

    torch.manual_seed(0)
    value = TensorDictModule(nn.Linear(4, 1), in_keys=["obs"], out_keys=["state_value"])
    done = torch.rand(3, 20, 1) < 0.1
    after = {"obs": torch.randn(3, 20, 4), "reward": torch.randn(3, 20, 1), "done": done}
    data = TensorDict(
        {"obs": torch.randn(3, 20, 4), "next": after | {"terminated": done}}, batch_size=(3, 20)
    )
    settings = {"gamma": 0.99, "lmbda": 0.95, "value_network": value, "vectorized": vectorized}
    for kind, keys in (
        (Module, ("advantage", "value_target")),
        (TDLambdaEstimator, ("advantage",)),
    ):
        expected = kind(**settings)(data.clone())
        reset_op_counts()
        with torchrl.patch():
            made = kind(**settings)(data.clone())
        assert sum(op_counts().values()) > 0
        for key in keys:
            torch.testing.assert_close(made[key], expected[key], rtol=1e-5, atol=1e-6)
