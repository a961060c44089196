"""Numbers of tokens: losses, penalties, moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .baseline import Function, imported, peer, torch_and_inductor


def _floats(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() for t in tensors)


def clipped_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """With the metrics of `PolicyMetrics`, without waiting for the device."""
    logprobs, old_logprobs, advantages = _floats(logprobs, old_logprobs, advantages)
    count = mask.sum()

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum() / count

    log_ratio = torch.where(mask, logprobs - old_logprobs, 0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    losses = torch.max(unclipped, -advantages * ratio.clamp(0.8, 1.2))
    loss = mean(losses)
    log_ratio, ratio, unclipped = log_ratio.detach(), ratio.detach(), unclipped.detach()
    ratios = mean(ratio)
    metrics = {
        "tokens": count,
        "unclipped_loss": mean(unclipped),
        "clip_fraction_high": mean(((ratio > 1.2) & (advantages > 0)).float()),
        "clip_fraction_low": mean(((ratio < 0.8) & (advantages < 0)).float()),
        "kl_k1": -mean(log_ratio),
        "kl_k3": mean(ratio - 1 - log_ratio),
        "ratio_mean": ratios,
        "ratio_max": torch.where(mask, ratio, -torch.inf).max(),
        "ratio_min": torch.where(mask, ratio, torch.inf).min(),
        "ess": ratios.square() / mean(ratio.square()),
    }
    return loss, metrics


def _verl_clipped_loss(function: Function) -> Function:
    config = imported("verl.workers.config", "ActorConfig")(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_c=1e6
    )

    def call(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        new, old, advantages, live = _floats(logprobs, old_logprobs, advantages, mask)
        return function(old, new, advantages, live, config=config)

    return call


CLIPPED_LOSS = {
    **torch_and_inductor(clipped_loss),
    "verl": peer("verl.trainer.ppo.core_algos", "compute_policy_loss_vanilla", _verl_clipped_loss),
}


def _value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """With the metrics of `ValueMetrics`, without waiting for the device."""
    values, old_values, returns = _floats(values, old_values, returns)
    count = mask.sum()

    def mean(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0).sum() / count

    clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
    error = (values - returns).square()
    clipped_error = (clipped - returns).square()
    loss = 0.5 * mean(torch.max(error, clipped_error))
    residual = (values - returns).detach()
    return_mean, residual_mean = mean(returns), mean(residual)
    metrics = {
        "tokens": count,
        "clip_fraction": mean((clipped_error > error).float()),
        "value_mean": mean(values.detach()),
        "return_mean": return_mean,
        "error_mean": residual_mean,
        "explained_variance": 1
        - mean((residual - residual_mean).square()) / mean((returns - return_mean).square()),
    }
    return loss, metrics


def _verl_value_loss(function: Function) -> Function:
    def call(
        values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        new, old, returns, live = _floats(values, old_values, returns, mask)
        loss, fraction = function(new, returns, old, live, 0.2)
        return loss, {"clip_fraction": fraction}

    return call


VALUE_LOSS = {
    **torch_and_inductor(_value_loss),
    "verl": peer("verl.trainer.ppo.core_algos", "compute_value_loss", _verl_value_loss),
}


def _importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, kind: str, high: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """With the metrics of `ImportanceMetrics`, without waiting for the device."""
    count = mask.sum()
    log_ratio = torch.where(mask, old_logprobs.float() - rollout_logprobs.float(), 0)
    ratio = log_ratio.exp()
    bounded = log_ratio.sum(-1, keepdim=True).exp() if kind == "tis-sequence" else ratio
    weights = torch.where(mask, bounded.clamp(max=high), 0)
    total = weights.sum()
    metrics = {
        "tokens": count,
        "weight_mean": total / count,
        "limited_fraction": (mask & (bounded > high)).sum() / count,
        "kl_k1": -log_ratio.sum() / count,
        "kl_k3": (ratio - 1 - log_ratio).sum() / count,
        "ess": total.square() / (count * weights.square().sum()),
    }
    return weights, metrics


def _verl_importance_weights(function: Function) -> Function:
    def call(
        old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, kind: str, high: float
    ) -> tuple[Tensor, dict[str, Any]]:
        old, rollout, live = _floats(old_logprobs, rollout_logprobs, mask)
        level = "sequence" if kind == "tis-sequence" else "token"
        return function(old - rollout, live, rollout_is=level, rollout_is_threshold=high)

    return call


IMPORTANCE_WEIGHTS = {
    **torch_and_inductor(_importance_weights),
    "verl": peer(
        "verl.trainer.ppo.rollout_corr_helper",
        "compute_rollout_correction_weights",
        _verl_importance_weights,
    ),
}


def _kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str) -> Tensor:
    log_ratio = torch.where(mask, logprobs.float() - ref_logprobs.float(), 0)
    return log_ratio if estimator == "k1" else torch.expm1(-log_ratio) + log_ratio


def _verl_kl_penalty(function: Function) -> Function:
    def call(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, estimator: str) -> Tensor:
        return torch.where(mask, function(logprobs.float(), ref_logprobs.float(), estimator), 0)

    return call


KL_PENALTY = {
    **torch_and_inductor(_kl_penalty),
    "verl": peer("verl.trainer.ppo.core_algos", "kl_penalty", _verl_kl_penalty),
}


def _shape_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> tuple[Tensor, Tensor]:
    kl = torch.where(mask, logprobs.float() - ref_logprobs.float(), 0)
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = (mask * positions).argmax(1, keepdim=True)
    return (-kl_coef * kl).scatter_add(1, last, scores.to(kl.dtype)[:, None]), kl


SHAPE_REWARDS = torch_and_inductor(_shape_rewards)


# ---- moments ------------------------------------------------------------------------------------


def _masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0).sum(dtype=torch.float32)


def _masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return _masked_sum(x, mask) / mask.sum()


def _whiten(x: Tensor, mask: Tensor) -> Tensor:
    x, count = x.float(), mask.sum()
    mean = _masked_sum(x, mask) / count
    variance = _masked_sum((x - mean).square(), mask) / (count - 1)
    return torch.where(mask, (x - mean) * torch.rsqrt(variance + 1e-8), 0)


def _verl_masked(function: Function) -> Function:
    return lambda x, mask: function(x.float(), mask)


def _verl_whiten(function: Function) -> Function:
    return lambda x, mask: torch.where(mask, function(x.float(), mask), 0)


MASKED_SUM = {
    **torch_and_inductor(_masked_sum),
    "verl": peer("verl.utils.torch_functional", "masked_sum", _verl_masked),
}
MASKED_MEAN = {
    **torch_and_inductor(_masked_mean),
    "verl": peer("verl.utils.torch_functional", "masked_mean", _verl_masked),
}
WHITEN = {
    **torch_and_inductor(_whiten),
    "verl": peer("verl.utils.torch_functional", "masked_whiten", _verl_whiten),
}
