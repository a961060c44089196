"""examples/cartpole.py: resets are masked, truncated episodes bootstrap, a few updates improve."""

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("gymnasium")

import gymnasium as gym

EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "cartpole.py"))
Agent, Settings = EXAMPLE["Agent"], EXAMPLE["Settings"]


pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_step_after_an_end_is_not_live():
    agent = Agent(0, Settings(envs=4, steps=60))
    parts = [agent.collect() for _ in range(2)]
    rollout = {key: torch.cat([part[key] for part in parts], dim=1) for key in parts[0]}
    ended = rollout["terminated"] | rollout["truncated"]
    assert ended.sum() > 10
    assert torch.equal(rollout["live"][:, 1:], ~ended[:, :-1])
    assert rollout["live"][:, 0].all()
    # CartPole pays 1 for every step that was taken, nothing for a reset
    assert torch.equal(rollout["rewards"], rollout["live"].float())


def test_an_episode_cut_short_bootstraps_from_its_final_state(monkeypatch):
    agent = Agent(0, Settings(envs=2, steps=30))
    agent.env.close()
    agent.env = gym.make_vec(
        "CartPole-v1",
        num_envs=2,
        vectorization_mode="sync",
        vector_kwargs={},
        wrappers=[lambda env: gym.wrappers.TimeLimit(env, max_episode_steps=5)],
    )
    agent.obs = torch.from_numpy(agent.env.reset(seed=0)[0])
    seen = {}
    kernels = EXAMPLE["pk"]
    gae = kernels.gae

    def spy(rewards, values, **settings):
        seen.update(settings, rewards=rewards, values=values)
        seen["advantages"], seen["returns"] = gae(rewards, values, **settings)
        return seen["advantages"], seen["returns"]

    monkeypatch.setattr(kernels, "gae", spy)
    agent.update()
    cut = seen["truncated"] & seen["mask"].bool()
    assert cut.sum() == 10  # every sixth step is a reset
    final_values = seen["values"][:, 1:][cut]
    expected = 1 + 0.99 * final_values
    torch.testing.assert_close(seen["returns"][cut], expected)
    assert (seen["advantages"][~seen["mask"].bool()] == 0).all()


def test_a_few_updates_improve():
    agent = Agent(3, Settings(updates=30))
    before = agent.greedy_return(seed=7, episodes=16)
    for _ in range(12):
        agent.update()
    assert before < 50 < 200 < agent.greedy_return(seed=7, episodes=16)
