"""The whole loss of a PPO step in one compiled graph, once through Inductor."""

import pytest
import torch

import ppo_kernels as pk


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
    return loss, policy.metrics.kl_k1, value.metrics.explained_variance, kl, returned


def example():
    g = torch.Generator().manual_seed(0)
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
    ("compiler", "backend"), [("aot_eager", "torch"), ("aot_eager", "cpu"), ("inductor", "cpu")]
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


def test_autocast_and_inference_mode_change_nothing():
    logits, values, batch = example()
    expected = step(logits, values, batch)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = step(logits, values, batch)
    with torch.inference_mode():
        inferred = step(logits, values, batch)
    for e, a, i in zip(expected, under_autocast, inferred, strict=True):
        assert torch.equal(e, a)
        assert torch.equal(e, i)
