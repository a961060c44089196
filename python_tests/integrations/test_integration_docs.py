"""The code of docs/drop_in.md, and what it says of compiling and sharding."""

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard

import ppo_kernels as pk
from ppo_kernels.integrations import openrlhf, torchrl, trl, verl

PAGE = Path(__file__).parents[2] / "docs/drop_in.md"


def code(heading):
    """The Python of one section."""
    section = PAGE.read_text().split(f"\n### {heading}\n")[1].split("\n### ")[0].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.S)
    names = {}
    exec(compile(block, f"{PAGE.name}: {heading}", "exec"), names)
    return names


def rollout(steps=40, envs=3):
    torch.manual_seed(0)
    rewards, values = torch.randn(steps, envs), torch.randn(steps, envs)
    dones = (torch.rand(steps + 1, envs) < 0.1).float()
    return rewards, values, dones[:-1], torch.randn(1, envs), dones[-1]


def loop(rewards, values, dones, next_value, next_done, gamma, lam):
    """The definition, one step after the other."""
    values, dones = torch.cat([values, next_value]), torch.cat([dones, next_done[None]])
    advantages, following = torch.zeros_like(rewards), 0
    for t in reversed(range(len(rewards))):
        going_on = 1 - dones[t + 1]
        delta = rewards[t] + gamma * values[t + 1] * going_on - values[t]
        advantages[t] = following = delta + gamma * lam * going_on * following
    return advantages, advantages + values[:-1]


def test_cleanrl_advantages():
    data = rollout()
    made = code("CleanRL")["advantages_and_returns"](*data, 0.99, 0.95)
    torch.testing.assert_close(made, loop(*data, 0.99, 0.95))


def test_cleanrl_losses():
    torch.manual_seed(0)
    new, value, old, advantages, returns, values = torch.randn(6, 64)
    pg_loss, v_loss, kl, clipped = code("CleanRL")["losses"](
        new, value, old, advantages, returns, values, 0.2
    )
    a = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = (new - old).exp()
    expected = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2)).mean()
    near = values + (value - values).clamp(-0.2, 0.2)
    v_expected = 0.5 * torch.max((value - returns) ** 2, (near - returns) ** 2).mean()
    torch.testing.assert_close(pg_loss, expected)
    torch.testing.assert_close(v_loss, v_expected)
    torch.testing.assert_close(kl.float(), (ratio - 1 - (new - old)).mean())
    assert 0 < clipped < 1


def test_the_diff_by_hand():
    """Both sides of it compute the same."""
    section = PAGE.read_text().split("\n## By hand\n")[1]
    (diff,) = re.findall(r"```diff\n(.*?)```", section.split("\n### ")[0], re.S)
    results = []
    for side in "-+":
        torch.manual_seed(0)
        names = {
            "pk": pk,
            "torch": torch,
            "logits": torch.randn(4, 9, 50, requires_grad=True),
            "tokens": torch.randint(50, (4, 9)),
            "old_logprobs": -4 + torch.randn(4, 9),
            "advantages": torch.randn(4, 9),
            "mask": (torch.rand(4, 9) < 0.8).float(),
        }
        lines = [line[1:] for line in diff.splitlines() if line[0] == side]
        exec("\n".join(lines), names)
        results.append([names[n] for n in ("loss", "entropy")] + [names["logits"].grad])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_stable_baselines3():
    buffers = pytest.importorskip(
        "stable_baselines3.common.buffers", reason="needs stable_baselines3"
    )
    from gymnasium.spaces import Box, Discrete

    rewards, values, dones, next_value, next_done = rollout()
    made = []
    for kind in (buffers.RolloutBuffer, code("Stable-Baselines3")["Buffer"]):
        buffer = kind(40, Box(-1, 1, (2,)), Discrete(2), gamma=0.99, gae_lambda=0.95, n_envs=3)
        buffer.rewards[:], buffer.values[:] = rewards.numpy(), values.numpy()
        buffer.episode_starts[:] = dones.numpy()
        buffer.compute_returns_and_advantage(next_value[0], next_done.bool().numpy())
        made.append((torch.tensor(buffer.advantages), torch.tensor(buffer.returns)))
    torch.testing.assert_close(*made)


def test_stable_baselines3_trains_with_the_buffer():
    sb3 = pytest.importorskip("stable_baselines3", reason="needs stable_baselines3")
    curves = []
    for kind in (None, code("Stable-Baselines3")["Buffer"]):
        torch.manual_seed(0)
        ppo = sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32, n_epochs=2,
                      rollout_buffer_class=kind, seed=0, device="cpu")  # fmt: skip
        ppo.learn(128)
        curves.append(torch.cat([p.detach().flatten() for p in ppo.policy.parameters()]))
    torch.testing.assert_close(*curves, rtol=0, atol=1e-4)


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_functions_under_hosts_names_compile_in_one_graph():
    x, mask = torch.randn(4, 8), (torch.rand(4, 8) < 0.7).float()
    logits, tokens = torch.randn(4, 8, 50), torch.randint(50, (4, 8))
    done, column = torch.rand(4, 8, 1) < 0.2, x[..., None]
    head = torch.randn(50, 8)
    calls = {
        "trl": lambda: trl.selective_log_softmax(logits, tokens),
        "fused head": lambda: trl.ChunkedLogProbFunction.apply(
            x, head, None, tokens[:, 0], 1.0, 32, None, 1.0, ("entropy",)
        )[:2],
        "verl statistics": lambda: verl.masked_mean(x, mask),
        "verl": lambda: verl.agg_loss(x, mask, "seq-mean-token-mean"),
        "verl value loss": lambda: verl.compute_value_loss(x, x + 1, x, mask, 0.2),
        "verl KL": lambda: verl.kl_penalty(x, x - 1, "k3+"),
        "openrlhf": lambda: openrlhf.PolicyLoss(dual_clip=3.0)(x, x - 0.1, -x, mask)[:3],
        "openrlhf KL": lambda: openrlhf.compute_approx_kl(x, x - 1, kl_estimator="k3"),
        "openrlhf reward": lambda: openrlhf.compute_reward(x[:, 0], 0.1, x, mask),
        "torchrl": lambda: torchrl.generalized_advantage_estimate(
            0.99, 0.95, column, column, column, done
        ),
    }
    for function in calls.values():
        torch.testing.assert_close(compiled(function)(), function(), rtol=1e-6, atol=1e-6)
        torch._dynamo.reset()


class Model(torch.nn.Module):
    """A head on an embedding: logits, or the log-probabilities without them."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Embedding(50, 16)
        self.head = torch.nn.Linear(16, 50, bias=False)

    def forward(self, tokens, fused):
        hidden = self.body(tokens[:, :-1])
        if not fused:
            return pk.logprobs_from_logits(self.head(hidden), tokens[:, 1:])
        weight = self.head.weight
        weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        return pk.logprobs_from_hidden(hidden, weight, tokens[:, 1:])


def step(model, fused, gather=lambda grad: grad):
    torch.manual_seed(1)
    tokens = torch.randint(50, (4, 9))
    logprobs = model(tokens, fused)
    loss, _ = pk.clipped_loss(logprobs, logprobs.detach() - 0.1, torch.randn(4, 8))
    loss.backward()
    return [loss.detach(), *(gather(p.grad) for p in model.parameters())]


def fresh():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("fused", [False, True])
def test_fsdp(fused, one_rank):
    model = fresh()
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh)
    made = step(model, fused, lambda grad: grad.full_tensor())
    torch.testing.assert_close(made, step(fresh(), fused))


def test_a_sharded_head_is_refused(one_rank):
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    weight = distribute_tensor(torch.randn(50, 16), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"weight: .* got a DTensor; gather it with .*full_tensor"):
        pk.logprobs_from_hidden(torch.randn(4, 16), weight, torch.arange(4))


@pytest.mark.parametrize("fused", [False, True])
def test_accelerate(fused):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = accelerate.Accelerator(cpu=True).prepare(fresh())
    torch.testing.assert_close(step(model, fused), step(fresh(), fused))
