"""OpenRLHF's functions, ours and its own, whose modules are loaded with stubs for GPU packages."""

import importlib.util

import host_openrlhf
import pytest
import torch
from comparing import compare, policies, ragged

if importlib.util.find_spec("openrlhf") is None:
    # Too heavy for every environment of tests.
    pytest.skip("needs openrlhf, which `make test-integrations` installs", allow_module_level=True)
loss, utils, experience_maker = host_openrlhf.load()

from ppo_kernels import op_counts, reset_op_counts  # noqa: E402
from ppo_kernels.integrations import openrlhf  # noqa: E402

MASK = ragged()
FULL = ragged(gaps=False)
GLOBAL = {"local": {}, "global": {"dp_size": 2, "batch_num_tokens": 50.0, "global_batch_size": 7.0}}
Maker = experience_maker.RemoteExperienceMaker


def numbers(x, seed=0):
    return torch.randn(x, generator=torch.Generator().manual_seed(seed))


def both(name, module=utils):
    return getattr(openrlhf, name), getattr(module, name)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("off_policy", [False, True])
def test_approx_kl(estimator, unbiased, off_policy):
    new, old, _ = policies(spread=2.0)
    new[1, 0] = old[1, 0] - 200
    before = old + 0.3 if off_policy else None
    ours, host = (
        lambda p, q, f=f: f(
            p, q, None if before is None else before.to(p.dtype), estimator, unbiased
        )
        for f in both("compute_approx_kl")
    )
    compare(ours, host, [new, old], differentiable=[0], scale=25)
    with pytest.raises(ValueError, match="Unknown kl_estimator: k4"):
        openrlhf.compute_approx_kl(new, old, kl_estimator="k4")


@pytest.mark.parametrize("coefficient", [0.1, 0.0, -1.0])
@pytest.mark.parametrize("clip", [None, (-0.5, 0.5)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_reward(coefficient, clip, dtype):
    live = ragged()[[0, 2, 3, 4]]
    mask = live.to(dtype)
    ours, host = (
        lambda r, kl, f=f: f(r, coefficient, kl, mask, clip) for f in both("compute_reward")
    )
    compare(ours, host, [numbers(4), numbers((4, 12), 1)], live=live, scale=2)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("peak", [0.0, 30.0])
def test_logprobs(temperature, peak):
    tokens = torch.randint(97, (5, 12), generator=torch.Generator().manual_seed(1))
    logits = 4 * numbers((5, 12, 97))
    logits.scatter_add_(-1, tokens[..., None], torch.full((5, 12, 1), peak))

    def run(f):
        def logprobs(z):
            z = z * 1  # divided in place, by both
            made = f(z, tokens, temperature)
            return made, z.detach()

        return logprobs

    ours, host = map(run, both("log_probs_from_logits"))
    compare(ours, host, [logits], differentiable=[0], scale=1)


def test_entropy():
    logits = 3 * numbers((5, 12, 97))
    plain = utils.compute_entropy._torchdynamo_orig_callable
    compare(openrlhf.compute_entropy, plain, [logits], differentiable=[0], scale=1)


@pytest.mark.parametrize("mask", [MASK[[0, 2, 3]], MASK[[0, 2, 3]].float(), None])
@pytest.mark.parametrize("dim", [None, 1, -1])
def test_masked_mean(mask, dim):
    ours, host = (lambda x, f=f: f(x, mask, dim) for f in both("masked_mean"))
    compare(ours, host, [numbers((3, 12)) + 3], differentiable=[0], scale=4)


@pytest.mark.parametrize("dim", [0, 1])
def test_masked_normalize(dim):
    ours, host = (lambda x, f=f: f(x, MASK, dim) for f in both("masked_normalize"))
    compare(ours, host, [numbers((5, 12)) + 3], scale=8)


@pytest.mark.parametrize("info", GLOBAL.values(), ids=list(GLOBAL))
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_aggregate_loss(by_token, info, dtype):
    ours, host = (
        lambda x, f=f: f(x, MASK.to(dtype), by_token, **info) for f in both("aggregate_loss", loss)
    )
    compare(ours, host, [numbers((5, 12)) + 1], differentiable=[0], scale=4)


def test_nothing_live():
    x, nothing = numbers((5, 12)), torch.zeros(5, 12)
    assert utils.masked_mean(x, nothing).isnan()
    assert openrlhf.masked_mean(x, nothing) == 0
    x.requires_grad_()
    made = openrlhf.PolicyLoss()(x, x.detach(), x.detach(), nothing)[0]
    made.backward()
    assert made == 0
    assert (x.grad == 0).all()


CORRECTIONS = {
    "off": {},
    "token mask": {"is_correction_level": "token"},
    "token clip": {"is_correction_level": "token", "is_correction_mode": "clip"},
    "sequence mask": {"is_correction_level": "seq", "is_correction_threshold": (0.8, 1.2)},
    "divergence": {
        "is_correction_level": "token",
        "is_correction_gating": "tv",
        "is_correction_threshold": (0.0, 0.2),
    },
}


@pytest.mark.parametrize("info", GLOBAL.values(), ids=list(GLOBAL))
@pytest.mark.parametrize("correction", CORRECTIONS.values(), ids=list(CORRECTIONS))
@pytest.mark.parametrize(
    "settings",
    [{}, {"dual_clip": 3.0, "clip_eps_high": 0.28, "token_level_loss": False}],
    ids=["token", "sequence"],
)
def test_policy_loss(settings, correction, info):
    new, old, advantages = policies()
    rollout = old + 0.3 * numbers((5, 12), 9)
    ours, host = (
        lambda *x, f=f: f(**settings, **correction)(*x[:3], MASK, x[3], **info)
        for f in both("PolicyLoss", loss)
    )
    compare(ours, host, [new, old, advantages, rollout], differentiable=[0], scale=2)


def test_gspo_is_openrlhfs():
    new, old, advantages = policies(spread=0.1)
    made, expected = (
        f(policy_loss_type="gspo")(new, old, advantages, MASK)[0] for f in both("PolicyLoss", loss)
    )
    assert made.equal(expected)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("by_token", [True, False])
@pytest.mark.parametrize("info", GLOBAL.values(), ids=list(GLOBAL))
def test_value_loss(clip, by_token, info):
    inputs = [numbers((5, 12), seed) for seed in (1, 2, 3)]
    ours, host = (
        lambda *x, f=f: f(clip, by_token)(*x, MASK.float(), **info) for f in both("ValueLoss", loss)
    )
    compare(ours, host, inputs, differentiable=[0], scale=4)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("mask", [MASK, FULL.long(), None], ids=["gaps", "ends", "none"])
def test_gae_and_returns(gamma, lam, mask):
    inputs = [numbers((5, 12), 1), numbers((5, 12), 2)]
    live = torch.ones(5, 12, dtype=torch.bool) if mask is None else mask != 0
    for name, args in (
        ("get_advantages_and_returns", (gamma, lam)),
        ("get_cumulative_returns", (gamma,)),
    ):
        ours, host = (
            lambda *x, f=f: f(None, *x, mask, *args)  # noqa: B023
            for f in (getattr(openrlhf, name), getattr(Maker, name))
        )
        compare(ours, host, inputs[: len(args)], live=live, scale=4)


def test_patched_host_uses_ours_and_is_restored():
    new, old, advantages = policies(spread=0.1)
    policy, forward = loss.PolicyLoss(), loss.PolicyLoss.forward
    expected = policy(new, old, advantages, MASK)
    reset_op_counts()
    with openrlhf.patch() as patch:
        made = policy(new, old, advantages, MASK)
        reward = experience_maker.compute_reward(new[:, 0], 0.1, old, MASK)
        experience_maker.RemoteExperienceMaker.get_advantages_and_returns(
            None, old, reward, MASK, 1.0, 0.95
        )
    counts = op_counts()
    for op in ("clipped_loss", "shape_rewards", "gae_forward"):
        assert counts[op, "cpu"] == 1
    for mine, other in zip(made, expected, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            torch.testing.assert_close(mine, other)
    assert "openrlhf.trainer.ppo_utils.experience_maker.compute_reward" in patch.replaced
    assert loss.PolicyLoss.forward is forward
