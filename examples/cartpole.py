"""PPO on CartPole-v1 with the kernels that train language models.

Run it: pip install 'ppo-kernels[examples]', then python examples/cartpole.py --seeds 0 1 2
"""

import argparse
import itertools
import time
from dataclasses import dataclass

import gymnasium as gym
import torch
from torch import Tensor, nn

import ppo_kernels as pk


@dataclass(frozen=True)
class Settings:
    envs: int = 8
    steps: int = 128
    """Steps of each environment between two updates."""
    updates: int = 300
    epochs: int = 4
    minibatch: int = 256
    lr: float = 1e-3
    gamma: float = 0.99
    lam: float = 0.95
    clip: float = 0.2
    entropy_coef: float = 0.005
    value_coef: float = 0.5
    max_grad_norm: float = 0.5
    target: float = 490.0
    """Training stops once this greedy return is reached in a check, which is every `check`."""
    check: int = 20


def network(inputs: int, outputs: int, last_gain: float) -> nn.Sequential:
    """Two hidden layers with orthogonal weights."""
    sizes = [inputs, 64, 64, outputs]
    layers: list[nn.Module] = []
    for i, (before, after) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        linear = nn.Linear(before, after)
        nn.init.orthogonal_(linear.weight, last_gain if last else 2**0.5)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class Agent:
    """A policy and a value function, trained by `update` on what `collect` returns."""

    def __init__(self, seed: int, settings: Settings) -> None:
        torch.manual_seed(seed)
        self.settings = settings
        self.env = gym.make_vec("CartPole-v1", num_envs=settings.envs, vectorization_mode="sync")
        self.obs = torch.from_numpy(self.env.reset(seed=seed)[0])
        self.ended = torch.zeros(settings.envs, dtype=torch.bool)
        inputs = self.obs.shape[1]
        self.policy = network(inputs, 2, last_gain=0.01)
        self.value = network(inputs, 1, last_gain=1.0)
        self.parameters = [*self.policy.parameters(), *self.value.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, lr=settings.lr, eps=1e-5)
        self.schedule = torch.optim.lr_scheduler.LinearLR(
            self.optimizer, 1.0, 0.0, settings.updates
        )

    @torch.no_grad()
    def collect(self) -> dict[str, Tensor]:
        """Play `steps` steps in every environment; return tensors `[envs, steps, ...]`."""
        steps: list[dict[str, Tensor]] = []
        observations = [self.obs]
        for _ in range(self.settings.steps):
            logits = self.policy(self.obs)
            actions = torch.distributions.Categorical(logits=logits).sample()
            # the step after the end of an episode resets; its action and reward mean nothing
            live = ~self.ended
            obs, rewards, terminated, truncated, _ = self.env.step(actions.numpy())
            steps.append(
                {
                    "logits": logits,
                    "actions": actions,
                    "live": live,
                    "rewards": torch.from_numpy(rewards).float(),
                    "terminated": torch.from_numpy(terminated),
                    "truncated": torch.from_numpy(truncated),
                }
            )
            self.obs = torch.from_numpy(obs)
            self.ended = steps[-1]["terminated"] | steps[-1]["truncated"]
            observations.append(self.obs)
        rollout = {key: torch.stack([step[key] for step in steps], dim=1) for key in steps[0]}
        states = torch.stack(observations, dim=1)
        rollout["states"], rollout["all_values"] = states[:, :-1], self.value(states)[..., 0]
        return rollout

    def update(self) -> dict[str, float]:
        """Collect, then improve policy and value function; return the metrics."""
        settings, rollout = self.settings, self.collect()
        live, values = rollout["live"], rollout["all_values"]
        advantages, returns = pk.gae(
            rollout["rewards"],
            values,
            gamma=settings.gamma,
            lam=settings.lam,
            mask=live,
            mask_convention="carry",
            terminated=rollout["terminated"],
            truncated=rollout["truncated"],
            next_values=values[:, 1:],  # with resets a step later, the final state is the next one
        )
        batch = {
            "states": rollout["states"][live],
            "actions": rollout["actions"][live],
            "values": values[:, :-1][live],
            "advantages": advantages[live],
            "returns": returns[live],
            "logprobs": pk.logprobs_from_logits(rollout["logits"][live], rollout["actions"][live]),
        }
        policy_metrics, value_metrics = [], []
        for _ in range(settings.epochs):
            for index in torch.randperm(len(batch["states"])).split(settings.minibatch):
                part = {key: value[index] for key, value in batch.items()}
                logprobs, entropy = pk.logprobs_from_logits(
                    self.policy(part["states"]), part["actions"], entropy=True
                )
                policy = pk.clipped_loss(
                    logprobs[None],
                    part["logprobs"][None],
                    pk.whiten(part["advantages"][None]),
                    clip_low=settings.clip,
                )
                value = pk.value_loss(
                    self.value(part["states"])[None, :, 0],
                    part["values"][None],
                    part["returns"][None],
                    clip=None,
                )
                loss = policy.loss + settings.value_coef * value.loss
                (loss - settings.entropy_coef * entropy.mean()).backward()
                nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
                policy_metrics.append(policy.metrics)
                value_metrics.append(value.metrics)
        self.schedule.step()
        metrics = pk.reduce_metrics(policy_metrics).as_dict()
        metrics["explained_variance"] = pk.reduce_metrics(value_metrics).as_dict()[
            "explained_variance"
        ]
        return {key: float(value) for key, value in metrics.items()}

    @torch.no_grad()
    def greedy_return(self, seed: int, episodes: int = 32) -> float:
        """Mean return of episodes, side by side, in which the likeliest action is taken."""
        env = gym.make_vec("CartPole-v1", num_envs=episodes, vectorization_mode="sync")
        obs, _ = env.reset(seed=seed)
        returns, running = torch.zeros(episodes), torch.ones(episodes, dtype=torch.bool)
        while running.any():
            actions = self.policy(torch.from_numpy(obs)).argmax(-1)
            obs, rewards, terminated, truncated, _ = env.step(actions.numpy())
            returns += torch.from_numpy(rewards).float() * running
            running &= ~torch.from_numpy(terminated | truncated)
        return float(returns.mean())


def train(seed: int, settings: Settings) -> tuple[Agent, int]:
    """Train until a greedy check reaches the target; return the agent and its updates."""
    agent = Agent(seed, settings)
    for update in range(1, settings.updates + 1):
        metrics = agent.update()
        if update % settings.check == 0:
            greedy = agent.greedy_return(seed=seed + 1000, episodes=8)
            print(
                f"seed {seed} update {update}: greedy return {greedy:.0f}, "
                f"clip fraction {metrics['clip_fraction']:.3f}, "
                f"explained variance {metrics['explained_variance']:.2f}"
            )
            if greedy >= settings.target:
                break
    return agent, update


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    torch.set_num_threads(1)
    for seed in parser.parse_args().seeds:
        start = time.process_time()
        agent, updates = train(seed, Settings())
        greedy = agent.greedy_return(seed=seed + 2000, episodes=100)
        print(
            f"seed {seed}: mean greedy return of 100 new episodes {greedy:.1f} "
            f"after {updates} updates and {time.process_time() - start:.1f} CPU-seconds"
        )


if __name__ == "__main__":
    main()
