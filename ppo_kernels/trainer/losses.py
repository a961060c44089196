"""The losses of a micro-batch."""

from typing import NamedTuple

from torch import Tensor

import ppo_kernels as pk
from ppo_kernels.trainer.config import Config
from ppo_kernels.trainer.experience import Experience
from ppo_kernels.trainer.model import ActorCritic


class Losses(NamedTuple):
    """The losses of a micro-batch; without a policy update only that of the values."""

    total: Tensor
    policy: pk.PPOLoss | None
    value: pk.ValueLoss


def micro_losses(
    actor: ActorCritic, micro: Experience, whole_mask: Tensor, config: Config, with_policy: bool
) -> Losses:
    """Return the losses of a micro-batch, with the denominators of its whole minibatch."""
    completions, length = whole_mask.shape
    tokens = whole_mask.sum().clamp(min=1)
    denominators: dict[str, float | Tensor] = {"token-mean": tokens, "token-sum": 1}
    policy = None
    if with_policy:
        states, values = actor.states_and_values(micro.sequences, micro.attention_mask, length)
        policy = actor.scorer.loss(
            states,
            micro.sequences[:, -length:],
            micro.logprobs,
            micro.advantages,
            micro.mask,
            temperature=config.temperature,
            variant=config.variant,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            aggregation=config.aggregation,
            denominator=denominators.get(config.aggregation, completions),
            norm_length=config.max_new_tokens if config.aggregation == "seq-sum-norm" else None,
            entropy=True,
            entropy_coef=config.entropy_coef,
        )
    else:
        values = actor.values(micro.sequences, micro.attention_mask, length)
    value = pk.value_loss(
        values,
        micro.values,
        micro.returns,
        micro.mask,
        clip=config.value_clip,
        denominator=tokens,
    )
    total = config.value_coef * value.loss
    return Losses(total if policy is None else policy.loss + total, policy, value)
