"""verl's functions, ours and its own."""

import importlib.metadata
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from comparing import compare, policies, ragged

pytest.importorskip("verl", reason="needs verl")
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import ActorConfig, PolicyLossConfig

from ppo_kernels import op_counts, reset_op_counts
from ppo_kernels.integrations import verl

MASK = ragged()
MASKS = {"bool": MASK, "int": MASK.long(), "float": MASK.float(), "all": torch.ones_like(MASK)}
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
GLOBAL = {
    "local": {},
    "global": {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 7},
    "tensor": {"batch_num_tokens": torch.tensor(50), "global_batch_size": 7.0},
}
weights = 2 * torch.rand(5, 12, generator=torch.Generator().manual_seed(3))
weights[0, 2] = 0


def config(**changed):
    info = changed.pop("global_batch_info", {})
    made = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_mini_batch_size=4,
        ppo_micro_batch_size_per_gpu=1,
        **{"clip_ratio_low": 0.2, "clip_ratio_high": 0.28} | changed,
    )
    made.global_batch_info.update(info)
    return made


def numbers(x, seed=0):
    return torch.randn(x, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("peak", [0.0, 30.0])
@pytest.mark.parametrize("name", ["logprobs_from_logits", "logprobs_from_logits_v2"])
def test_logprobs(name, peak):
    tokens = torch.randint(97, (5, 12), generator=torch.Generator().manual_seed(1))
    logits = 4 * numbers((5, 12, 97))
    logits.scatter_add_(-1, tokens[..., None], torch.full((5, 12, 1), peak))
    ours, host = (
        lambda z, f=f: f(z, tokens) for f in (getattr(verl, name), getattr(torch_functional, name))
    )
    compare(ours, host, [logits], differentiable=[0], scale=1)


@pytest.mark.parametrize("name", ["entropy_from_logits", "entropy_from_logits_with_chunking"])
def test_entropy(name):
    logits = 3 * numbers((40, 97))
    ours, host = getattr(verl, name), getattr(torch_functional, name)
    # verl's sum in chunks is in fp32 whatever the logits.
    compare(ours, host, [logits], [0], scale=1, truth=torch_functional.entropy_from_logits)
    logits[:, 1:50] = -torch.inf
    assert host(logits).isnan().all()
    assert ours(logits).isfinite().all()


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_masked_sum_and_mean(mask, axis):
    for name in ("masked_sum", "masked_mean"):
        ours, host = (
            lambda x, f=f: f(x, mask, axis)
            for f in (getattr(verl, name), getattr(torch_functional, name))
        )
        compare(ours, host, [numbers((5, 12)) + 3], differentiable=[0], scale=4)
    x = numbers((5, 12))
    both = verl.masked_sum(x, mask, (0, 1)), torch_functional.masked_sum(x, mask, (0, 1))
    assert both[0].equal(both[1])


@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
@pytest.mark.parametrize("flag", [True, False])
def test_variance_and_whitening(mask, flag):
    x = numbers((5, 12)) + 3
    for name in ("masked_var", "masked_whiten"):
        ours, host = (
            lambda x, f=f: f(x, mask, flag)
            for f in (getattr(verl, name), getattr(torch_functional, name))
        )
        compare(ours, host, [x], live=mask != 0, scale=4)


@pytest.mark.parametrize("live", [0, 1])
def test_whitening_refuses_too_few(live):
    mask = torch.arange(12)[None] < live
    x = numbers((1, 12))
    for module in (verl, torch_functional):
        for name in ("masked_whiten", "masked_var"):
            with pytest.raises(ValueError, match=r"in the mask|mask is one"):
                getattr(module, name)(x, mask)
    biased = (m.masked_var(x, mask, unbiased=False) for m in (verl, torch_functional))
    assert all((v == 0).all() for v in biased)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.99, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("mask", [MASKS["float"], MASKS["int"]])
def test_gae(gamma, lam, mask):
    inputs = [numbers((5, 12), 1), numbers((5, 12), 2)]
    ours, host = (
        lambda r, v, f=f: f(r, v, mask, gamma, lam)
        for f in (verl.compute_gae_advantage_return, core_algos.compute_gae_advantage_return)
    )
    compare(ours, host, inputs, live=mask != 0, scale=4)


@pytest.mark.parametrize("info", GLOBAL.values(), ids=list(GLOBAL))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("mask", [MASKS["float"], MASKS["bool"]], ids=["float", "bool"])
def test_agg_loss(mode, info, mask):
    for factor in (None, 100):
        ours, host = (
            lambda x, f=f, k=factor: f(x, mask, mode, loss_scale_factor=k, **info)
            for f in (verl.agg_loss, core_algos.agg_loss)
        )
        compare(ours, host, [numbers((5, 12)) + 1], differentiable=[0], scale=4)


def test_agg_loss_refuses():
    x, mask = numbers((5, 12)), MASK.float()
    for module in (verl, core_algos):
        for mode in ("token-mean", "seq-mean-token-mean"):
            with pytest.raises(ValueError, match="required when dp_size > 1"):
                module.agg_loss(x, mask, mode, dp_size=2)
        with pytest.raises(ValueError, match="Invalid loss_agg_mode: mean"):
            module.agg_loss(x, mask, "mean")


def policy_pair(name, mask, mode, settings, correction, extremes=True):
    new, old, advantages = policies(spread=0.5 if extremes else 0.1)
    if name == "gspo" and extremes:  # a sequence beyond verl's bound of 10
        new[-1] = old[-1] + 12
    functions = (getattr(module, f"compute_policy_loss_{name}") for module in (verl, core_algos))
    ours, host = (
        lambda new, old, a, f=f: f(old, new, a, mask, mode, settings, correction) for f in functions
    )
    return ours, host, [new, old, advantages]


LOSSES = ("vanilla", "gspo", "sapo", "gpg", "cispo", "kl_cov", "geo_mean")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("corrected", [False, True])
def test_policy_losses(name, mode, corrected):
    correction = weights if corrected else None
    for mask, info in ((MASK.float(), GLOBAL["local"]), (MASK.long(), GLOBAL["global"])):
        settings = config(
            global_batch_info=info, policy_loss=PolicyLossConfig(kl_cov_ratio=0.1, ppo_kl_coef=0.3)
        )
        ours, host, inputs = policy_pair(name, mask, mode, settings, correction)
        if name in ("gpg", "cispo", "geo_mean", "kl_cov"):
            inputs[0][0, 1] = inputs[1][0, 1] + 2  # unbounded there: e^25 would hide the rest
            inputs[0][-1, 0] = inputs[1][-1, 0] - 2
        compare(ours, host, inputs, differentiable=[0], scale=1)


@pytest.mark.parametrize("c", [1.5, 3.0])
def test_dual_clip_is_always_on(c):
    new, old, _ = policies()
    advantages = -torch.ones_like(new)
    new[0, 1] = old[0, 1] + 5
    args = (old, new, advantages, MASK, "token-sum", config(clip_ratio_c=c))
    (mine, measured), (loss, expected) = (
        m.compute_policy_loss_vanilla(*args) for m in (verl, core_algos)
    )
    torch.testing.assert_close(mine, loss)
    assert measured["actor/pg_clipfrac_lower"] == pytest.approx(expected["actor/pg_clipfrac_lower"])
    assert expected["actor/pg_clipfrac_lower"] > 0


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_live_and_garbage_under_the_mask(name):
    new, old, advantages = policies()
    settings = config(policy_loss=PolicyLossConfig(kl_cov_ratio=0.1))
    f = getattr(verl, f"compute_policy_loss_{name}")
    new.requires_grad_()
    loss, _ = f(old, new, advantages, torch.zeros_like(MASK), config=settings)
    loss.backward()
    assert loss == 0
    assert (new.grad == 0).all()
    dirty = [torch.where(MASK, x.detach(), torch.nan) for x in (old, new, advantages)]
    clean, dirty = (f(*args, MASK, config=settings)[0] for args in ((old, new, advantages), dirty))
    assert dirty.equal(clean)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("info", GLOBAL.values(), ids=list(GLOBAL))
def test_value_loss(mode, info):
    inputs = [numbers((5, 12), seed) for seed in (1, 2, 3)]
    ours, host = (
        lambda v, r, old, f=f: f(v, r, old, MASK.float(), 0.5, mode, **info)
        for f in (verl.compute_value_loss, core_algos.compute_value_loss)
    )
    compare(ours, host, inputs, differentiable=[0], scale=4)


@pytest.mark.parametrize("plus", ["", "+"])
@pytest.mark.parametrize("name", ["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"])
def test_kl_penalty(name, plus):
    new, old, _ = policies(spread=2.0)
    ours, host = (
        lambda new, old, f=f: f(new, old, name + plus)
        for f in (verl.kl_penalty, core_algos.kl_penalty)
    )
    compare(ours, host, [new, old], differentiable=[0], scale=3)
    if not plus:
        with pytest.raises(NotImplementedError):  # as verl's own: it has the name alone
            verl.kl_penalty(new, old, "full")


@pytest.mark.parametrize("shape", [(24,), (4, 6)])
def test_fused_linear(shape):
    """The torch form; verl's kernel `linear_cross_entropy` computes the same on a GPU only."""
    hidden, weight = numbers((*shape, 16)), numbers((97, 16), 1)
    tokens = torch.randint(97, shape, generator=torch.Generator().manual_seed(1))
    head = FusedLinearForPPO(chunk_size=8)

    def truth(h, w):
        logp = (h @ w.T / 0.7).log_softmax(-1)
        return logp.gather(-1, tokens[..., None])[..., 0], -(logp.exp() * logp).sum(-1)

    compare(
        lambda h, w: verl.fused_linear_forward(head, h, w, tokens, 0.7),
        lambda h, w: head(h, w, tokens, 0.7),
        [hidden, weight],
        differentiable=[0, 1],
        truth=truth,
        slack=2,
    )
    made = verl.linear_cross_entropy(hidden, weight, tokens, 0.7)
    for mine, other in zip(made, head(hidden, weight, tokens, 0.7), strict=True):
        assert mine.shape == (24,)
        torch.testing.assert_close(mine, other.flatten(), rtol=1e-5, atol=1e-5)


def test_patched_registry_and_by_name_users_and_restored():
    vanilla, gae = core_algos.compute_policy_loss_vanilla, core_algos.compute_gae_advantage_return
    new, old, advantages = policies()
    expected, _ = core_algos.get_policy_loss_fn("vanilla")(
        old, new, advantages, MASK, config=config()
    )
    reset_op_counts()
    with verl.patch() as patch:
        function = core_algos.get_policy_loss_fn("vanilla")
        made, _ = function(old, new, advantages, MASK, config=config())
        assert core_algos.get_adv_estimator_fn("gae") is not gae
        entropy = core_algos.compute_entropy_loss(numbers((5, 12, 97)), MASK)
    assert op_counts()["clipped_loss", "cpu"] == 1
    assert op_counts()["logprob_forward", "cpu"] == 1
    assert entropy.isfinite()
    torch.testing.assert_close(made, expected)
    assert "verl.trainer.ppo.core_algos.POLICY_LOSS_REGISTRY.vanilla" in patch.replaced
    assert core_algos.compute_policy_loss_vanilla is vanilla
    assert core_algos.get_policy_loss_fn("vanilla") is vanilla
    assert core_algos.get_adv_estimator_fn("gae") is gae


def test_register():
    names = verl.register()
    try:
        assert core_algos.get_policy_loss_fn("ppo_kernels_gspo") is verl.compute_policy_loss_gspo
        assert len(names) == len(LOSSES)
    finally:
        for name in names:
            del core_algos.POLICY_LOSS_REGISTRY[name]


PROBE = """
import verl
from verl.trainer.ppo import core_algos
print(core_algos.agg_loss.__code__.co_filename)
"""


def test_the_entry_point_patches_where_the_environment_asks(monkeypatch):
    monkeypatch.setenv("PPO_KERNELS_VERL", "patch")
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == verl.agg_loss.__code__.co_filename


@pytest.mark.parametrize("wanted", ["", "register", "nonsense"])
def test_the_plugin_does_what_it_is_asked(wanted, monkeypatch, caplog):
    monkeypatch.setenv("PPO_KERNELS_VERL", wanted)
    agg_loss, before = core_algos.agg_loss, dict(core_algos.POLICY_LOSS_REGISTRY)
    monkeypatch.delitem(sys.modules, "ppo_kernels.integrations.verl.plugin", raising=False)
    entry_points = importlib.metadata.entry_points(group="verl.plugins")
    [plugin] = [e for e in entry_points if e.name == "ppo_kernels"]
    try:
        with nullcontext() if wanted != "nonsense" else pytest.raises(ValueError, match="nonsense"):
            plugin.load()
        added = core_algos.POLICY_LOSS_REGISTRY.keys() - before.keys()
        assert len(added) == (len(LOSSES) if wanted == "register" else 0)
        assert ("PPO_KERNELS_VERL=nonsense failed" in caplog.text) == (wanted == "nonsense")
        assert core_algos.agg_loss is agg_loss
    finally:
        core_algos.POLICY_LOSS_REGISTRY.clear()
        core_algos.POLICY_LOSS_REGISTRY.update(before)
