"""Fresh samples and their scores, before and after training."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ppo_kernels.trainer.config import Config
from ppo_kernels.trainer.data import Row
from ppo_kernels.trainer.rewards import RewardFunction, score
from ppo_kernels.trainer.rollout import Sampler


class Samples(NamedTuple):
    """Completions of the evaluation prompts and their scores."""

    prompts: list[str]
    completions: list[str]
    scores: list[float]

    @property
    def mean(self) -> float:
        """Mean score."""
        return sum(self.scores) / len(self.scores)


def evaluate(
    sampler: Sampler, reward: RewardFunction, prompts: Sequence[Row], config: Config
) -> Samples | None:
    """Score fresh samples, from random numbers of their own: evaluating changes no training."""
    if config.eval_samples == 0:
        return None
    rows = [prompts[i % len(prompts)] for i in range(config.eval_samples)]
    completions: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + 1)
        for start in range(0, len(rows), config.rollouts):
            batch = rows[start : start + config.rollouts]
            completions += sampler([row["prompt"] for row in batch]).completions
    scores = score(reward, rows, completions).tolist()
    return Samples([row["prompt"] for row in rows], completions, scores)
