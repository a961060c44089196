"""The whole loss of a PPO step in one compiled graph, once through Inductor."""

import pytest
import torch
from device import DEVICE, kernels, seeded
from torch.utils._python_dispatch import TorchDispatchMode

import ppo_kernels as pk

KERNELS = kernels(
    *("logprobs_from_logits", "shape_rewards", "gae", "whiten", "clipped_loss", "value_loss"),
    *("kl_penalty", "masked_mean", "masked_sum", "discounted_returns", "vtrace"),
    "importance_weights",
)


def step(logits, values, batch):
    """Rewards to losses, as a trainer calls the ops; gradients reach the logits and the values."""
    mask = batch["mask"]
    logprobs, entropy = pk.logprobs_from_logits(
        logits, batch["tokens"], temperature=0.9, mask=mask, entropy=True
    )
    rewards, kl = pk.shape_rewards(
        batch["scores"], batch["old_logprobs"], batch["ref_logprobs"], mask, kl_coef=0.1
    )
    advantages, returns = pk.gae(
        rewards, batch["old_values"], gamma=1.0, lam=0.95, mask=mask, mask_convention="truncate"
    )
    advantages = pk.whiten(advantages, mask)
    weights, corrected = pk.importance_weights(
        batch["old_logprobs"], batch["ref_logprobs"], mask, kind="tis-geometric", high=2.0
    )
    advantages = advantages * weights
    policy = pk.clipped_loss(logprobs, batch["old_logprobs"], advantages, mask, clip_high=0.3)
    value = pk.value_loss(values, batch["old_values"], returns, mask)
    penalty = pk.kl_penalty(logprobs, batch["ref_logprobs"], mask, estimator="k3", gradient="k2")
    loss = (
        policy.loss
        + 0.5 * value.loss
        - 0.01 * pk.masked_mean(entropy, mask)
        + 0.05 * pk.masked_sum(penalty, mask) / mask.sum()
    )
    returned = pk.discounted_returns(rewards, gamma=0.9)
    targets = pk.vtrace(
        logprobs, batch["old_logprobs"], rewards, batch["old_values"], gamma=1.0, lam=0.95,
        mask=mask, mask_convention="truncate",
    )  # fmt: skip
    loss = loss - pk.masked_mean(targets.advantages * logprobs, mask)
    measured = policy.metrics.kl_k1, value.metrics.explained_variance, corrected.ess
    return loss, *measured, kl, returned, *targets


def example():
    g = seeded(0)
    rows, cols, vocab = 4, 7, 50

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    lengths = torch.tensor([7, 3, 1, 5])
    batch = {
        "mask": torch.arange(cols) < lengths[:, None],
        "tokens": torch.randint(vocab, (rows, cols), generator=g),
        "scores": normal(rows),
        "old_logprobs": -normal(rows, cols).abs() - 3,
        "ref_logprobs": -normal(rows, cols).abs() - 3,
        "old_values": normal(rows, cols),
    }
    return normal(rows, cols, vocab), normal(rows, cols), batch


def run(function, logits, values, batch):
    logits, values = (t.clone().requires_grad_() for t in (logits, values))
    outputs = function(logits, values, batch)
    outputs[0].backward()
    return [*(t.detach() for t in outputs), logits.grad, values.grad]


@pytest.mark.parametrize(
    ("compiler", "backend"),
    [*(("aot_eager", b) for b in ("torch", *KERNELS)), *(("inductor", b) for b in KERNELS[:1])],
)
def test_a_whole_step_compiles_into_one_graph(compiler, backend):
    inputs = example()
    with pk.use_backend("torch"):
        expected = run(step, *inputs)
    torch._dynamo.reset()
    with pk.use_backend(backend):
        pk.reset_op_counts()
        got = run(torch.compile(step, fullgraph=True, backend=compiler), *inputs)
        served = {name for _, name in pk.op_counts()}
    assert served == (set() if backend == "torch" else {backend})
    for e, o in zip(expected, got, strict=True):
        torch.testing.assert_close(o, e, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("backend", KERNELS)
def test_autocast_inference_mode_and_another_default_device_change_nothing(backend):
    inputs = example()
    with pk.use_backend(backend):
        expected = step(*inputs)
        with torch.autocast(DEVICE, torch.bfloat16):
            under_autocast = step(*inputs)
        with torch.inference_mode():
            inferred = step(*inputs)
        with torch.device("meta"):
            elsewhere = step(*inputs)
    for e, *others in zip(expected, under_autocast, inferred, elsewhere, strict=True):
        assert all(torch.equal(e, other) for other in others)


# ---- eager calls that go past the dispatcher -----------------------------------------------------


def test_modes_see_every_op():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    logits = torch.randn(3, 20, requires_grad=True)
    with Watch():
        pk.logprobs_from_logits(logits, torch.tensor([1, 2, 3])).sum().backward()
    ops = torch.ops.ppo_kernels
    assert {ops.logprob_forward.default, ops.logprob_backward.default} <= set(seen)


def test_the_profiler_sees_every_op():
    logits = torch.randn(3, 20, requires_grad=True)
    with torch.profiler.profile() as profile:
        pk.logprobs_from_logits(logits, torch.tensor([1, 2, 3])).sum().backward()
    names = {event.name for event in profile.events()}
    assert {"ppo_kernels::logprob_forward", "ppo_kernels::logprob_backward"} <= names


@pytest.mark.parametrize("lazy", ["negative", "functorch", "subclass", "zero"])
def test_tensors_that_are_not_what_their_memory_says(lazy):
    """Kernels read memory; the dispatcher makes it say what the tensor means."""
    x = torch.randn(4, 6)
    if lazy == "negative":
        given = torch.complex(x, -x).conj().imag
        assert given.is_neg()
        torch.testing.assert_close(pk.masked_sum(given), x.sum())
    elif lazy == "functorch":
        got = torch.func.vmap(lambda row: pk.kl_penalty(row, torch.zeros(6)))(x)
        torch.testing.assert_close(got, x)
    elif lazy == "subclass":

        class Named(torch.Tensor):
            pass

        assert type(pk.masked_sum(x.as_subclass(Named))) is Named
    else:
        zeros = torch._efficientzerotensor((4, 6))
        torch.testing.assert_close(pk.kl_penalty(zeros, x), -x)
