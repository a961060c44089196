"""From rollouts to what the update learns from: log-probabilities, advantages, returns."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

import ppo_kernels as pk
from ppo_kernels.trainer.config import Config
from ppo_kernels.trainer.distributed import World
from ppo_kernels.trainer.model import ActorCritic
from ppo_kernels.trainer.rollout import Rollout
from ppo_kernels.trainer.scorer import Scorer


class Experience(NamedTuple):
    """One step's rollouts of all processes, and all that the update treats as constant.

    Each `[B, ...]`.
    """

    sequences: Tensor
    attention_mask: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    scores: Tensor  # [B], of the reward, without the penalty for a missing end
    rewards: Tensor  # [B, R], what advantages and returns were made of
    kl: Tensor  # [B, R], per token
    ended: Tensor  # [B]

    def rows(self, index: Tensor) -> "Experience":
        """Select completions."""
        return Experience(*(field[index] for field in self))


@torch.no_grad()
def score_tokens(
    actor: ActorCritic, reference: Scorer, rollout: Rollout, config: Config
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-probabilities, values and reference log-probabilities of all responses.

    They come from forward passes like those of the update; log-probabilities taken from the sampler
    would differ in their last bits, and ratios with them.
    """
    length = rollout.response_mask.shape[1]
    parts = []
    for rows in torch.arange(len(rollout.sequences)).split(config.micro_batch):
        inputs = rollout.sequences[rows], rollout.attention_mask[rows], length
        tokens = rollout.responses[rows]
        settings = {"mask": rollout.response_mask[rows], "temperature": config.temperature}
        states, values = actor.states_and_values(*inputs)
        logprobs = actor.scorer.logprobs(states, tokens, **settings)
        ref_logprobs = reference.logprobs(reference.states(*inputs)[0], tokens, **settings)
        parts.append((logprobs, values, ref_logprobs))
    logprobs, values, ref_logprobs = (torch.cat(part) for part in zip(*parts, strict=True))
    return logprobs, values, ref_logprobs


@torch.no_grad()
def make_experience(
    learner: nn.Module,
    reference: Scorer,
    rollout: Rollout,
    scores: Tensor,
    *,
    kl_coef: float,
    config: Config,
    world: World,
) -> Experience:
    """Return per-token advantages and returns of all processes, with what they belong to."""
    per_token = learner(score_tokens, reference, rollout, config)
    logprobs, values, ref_logprobs = (world.gather(part) for part in per_token)
    mask, ended, scores = map(world.gather, (rollout.response_mask, rollout.ended, scores))
    prompt_length = rollout.sequences.shape[1] - rollout.response_mask.shape[1]
    sequences, attention_mask = (
        torch.cat(
            [
                world.gather(part[:, :prompt_length], left=True),
                world.gather(part[:, prompt_length:]),
            ],
            dim=1,
        )
        for part in (rollout.sequences, rollout.attention_mask)
    )
    bound = math.inf if config.score_clip is None else config.score_clip
    rewards, kl = pk.shape_rewards(
        scores.clamp(-bound, bound) - config.missing_eos_penalty * ~ended,
        logprobs,
        ref_logprobs,
        mask,
        kl_coef=kl_coef,
        estimator=config.kl_estimator,
    )
    if config.whiten_rewards:
        rewards = pk.whiten(rewards, mask, shift_mean=False, eps=config.whiten_eps)
    advantages, returns = pk.gae(
        rewards, values, gamma=config.gamma, lam=config.lam, mask=mask, mask_convention="truncate"
    )
    if config.whiten_advantages:
        advantages = pk.whiten(advantages, mask, eps=config.whiten_eps)
    return Experience(
        *(sequences, attention_mask, mask, logprobs, values, advantages, returns),
        *(scores, rewards, kl, ended),
    )
