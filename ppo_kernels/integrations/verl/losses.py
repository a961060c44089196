"""verl's losses, advantages and KL penalties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import clipped_loss, gae, value_loss, whiten
from ... import kl_penalty as kl
from ... import masked_mean as mean_of_live
from ... import masked_sum as sum_of_live
from ...metrics import PolicyMetrics
from .._common import promoted, sequences_with_tokens
from .._patching import original
from .functional import checked_count

CORE = "verl.trainer.ppo.core_algos"


def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: Tensor,
    lam: Tensor,
) -> tuple[Tensor, Tensor]:
    """Whitened advantages, and returns; masked tokens do not exist, and get 0."""
    checked_count(response_mask)
    dtype = promoted(token_level_rewards, values, response_mask)
    with torch.no_grad():
        made = gae(
            token_level_rewards, values, gamma=float(gamma), lam=float(lam), mask=response_mask,
            mask_convention="carry",
        )  # fmt: skip
        advantages = whiten(made.advantages, response_mask, eps=1e-8)
    return advantages.to(dtype), made.returns.to(dtype)


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> Tensor:
    """One number of the losses of all tokens."""
    frame = _frame(
        loss_agg_mode, loss_mask, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    count: Any = frame["denominator"]
    if loss_agg_mode == "token-mean" and count is None:
        loss = mean_of_live(loss_mat, loss_mask)
    elif loss_agg_mode in ("token-mean", "token-sum"):
        loss = sum_of_live(loss_mat, loss_mask) / count
    else:
        count = sequences_with_tokens(loss_mask) if count is None else count
        if loss_agg_mode == "seq-mean-token-mean":
            loss = mean_of_live(loss_mat, loss_mask, -1).sum() / count
        else:
            loss = sum_of_live(loss_mat, loss_mask) / count / frame.get("norm_length", 1)
    return loss.to(_loss_dtype(frame, loss_mat, loss_mask))


def _frame(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: Any = None,
    global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> dict[str, Any]:
    """How our losses aggregate as verl's `loss_agg_mode` does."""
    if mode == "token-sum":
        return {"aggregation": mode, "denominator": 1 / dp_size}
    if mode == "token-mean":
        name, count = "(global) batch_num_tokens", batch_num_tokens
    elif mode in ("seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        name, count = "global_batch_size", global_batch_size
    else:
        raise ValueError(f"Invalid loss_agg_mode: {mode}")
    if count is None and dp_size > 1:
        raise ValueError(f"{name} is required when dp_size > 1")
    if isinstance(count, Tensor):
        count = count.to(mask.device).reshape(())
    frame: dict[str, Any] = {
        "aggregation": mode,
        "denominator": None if count is None else count / dp_size,
    }
    if mode == "seq-mean-token-sum-norm":
        length = mask.shape[-1] if loss_scale_factor is None else loss_scale_factor
        frame |= {"aggregation": "seq-sum-norm", "norm_length": float(length)}
    return frame


def _loss_dtype(frame: dict[str, Any], *tensors: Tensor | None) -> torch.dtype:
    return promoted(*tensors, by_sequence=frame["aggregation"].startswith("seq"))


def _policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    weights: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, PolicyMetrics]:
    """`weights` are verl's rollout correction; its metrics are those without."""
    args = (old_log_prob, advantages, response_mask)
    if weights is None:
        loss, metrics = clipped_loss(log_prob, *args, **settings)
    else:
        loss, _ = clipped_loss(
            log_prob, old_log_prob, advantages * weights, response_mask, **settings
        )
        metrics = clipped_loss(log_prob.detach(), *args, **settings).metrics
    dtype = _loss_dtype(settings, log_prob, old_log_prob, advantages, response_mask, weights)
    return loss.to(dtype), metrics


def _numbers(**metrics: Tensor | float) -> dict[str, Any]:
    """Metrics as numbers, waiting for the device once."""
    tensors = [torch.as_tensor(value, dtype=torch.float64) for value in metrics.values()]
    device = next((t.device for t in tensors if t.is_cuda), tensors[0].device)
    values = torch.stack([t.to(device) for t in tensors]).tolist()
    return {f"actor/{name}": value for name, value in zip(metrics, values, strict=True)}


def _clips(config: Any) -> dict[str, Any]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return {
        "clip_low": config.clip_ratio if low is None else low,
        "clip_high": config.clip_ratio if high is None else high,
    }


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The clipped loss, always with dual clip; log-ratios are clamped to 20."""
    loss, metrics = _policy_loss(
        old_log_prob, log_prob, advantages, response_mask, rollout_is_weights,
        **_clips(config), dual_clip=config.get("clip_ratio_c", 3.0), log_ratio_clamp=20.0,
        **_frame(loss_agg_mode, response_mask, **config.global_batch_info),
    )  # fmt: skip
    return loss, _numbers(
        pg_clipfrac=metrics.clip_fraction,
        ppo_kl=metrics.kl_k1,
        pg_clipfrac_lower=metrics.dual_clip_fraction,
    )


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """GSPO; verl's bound of 10 on a sequence's log-ratio shows only where dual clip would."""
    loss, metrics = _policy_loss(
        old_log_prob, log_prob, advantages, response_mask, rollout_is_weights,
        variant="gspo", **_clips(config), dual_clip=_E10,
        **_frame(loss_agg_mode, response_mask, **config.global_batch_info),
    )  # fmt: skip
    return loss, _numbers(
        pg_clipfrac=metrics.clip_fraction, ppo_kl=metrics.kl_k1, pg_clipfrac_lower=0.0
    )


_E10 = float(torch.tensor(10.0).exp())


def compute_policy_loss_sapo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """SAPO; whatever `loss_agg_mode` says, a mean of means as in verl."""
    loss, metrics = _policy_loss(
        old_log_prob, log_prob, advantages, response_mask, rollout_is_weights,
        variant="sapo", tau_pos=float(config.tau_pos), tau_neg=float(config.tau_neg),
        log_ratio_clamp=20.0,
        **_frame("seq-mean-token-mean", response_mask, **config.global_batch_info),
    )  # fmt: skip
    return loss, _numbers(pg_clipfrac=0.0, ppo_kl=metrics.kl_k1, pg_clipfrac_lower=0.0)


def compute_policy_loss_gpg(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """GPG, which has no ratio."""
    loss, _ = _policy_loss(
        log_prob.detach(), log_prob, advantages, response_mask, rollout_is_weights,
        variant="gpg", **_frame(loss_agg_mode, response_mask, **config.global_batch_info),
    )  # fmt: skip
    return loss, {}


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """CISPO; log-ratios are clamped to 20."""
    loss, metrics = _policy_loss(
        old_log_prob, log_prob, advantages, response_mask, rollout_is_weights,
        variant="cispo", **_clips(config), log_ratio_clamp=20.0,
        **_frame(loss_agg_mode, response_mask, **config.global_batch_info),
    )  # fmt: skip
    return loss, _numbers(
        pg_clipfrac=metrics.clip_fraction, ppo_kl=metrics.kl_k1, pg_clipfrac_lower=0.0
    )


def compute_policy_loss_kl_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """KL-Cov; with rollout correction, which weighs the penalty too, it is verl's."""
    settings = config.policy_loss
    share = 0.0002 if settings.kl_cov_ratio is None else settings.kl_cov_ratio
    if rollout_is_weights is not None or not 0 < share <= 1:
        host = original(f"{CORE}:compute_policy_loss_kl_cov")
        result: tuple[Tensor, dict[str, Any]] = host(
            old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config,
            rollout_is_weights,
        )  # fmt: skip
        return result
    loss, _ = _policy_loss(
        old_log_prob, log_prob, advantages, response_mask, None, variant="kl-cov", cov_ratio=share,
        kl_coef=1.0 if settings.ppo_kl_coef is None else settings.ppo_kl_coef,
        **_frame(loss_agg_mode, response_mask, **config.global_batch_info),
    )  # fmt: skip
    moved = mean_of_live((log_prob.detach() - old_log_prob).abs(), response_mask)
    return loss, _numbers(ppo_kl=moved)


def compute_policy_loss_geo_mean(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """GMPO: a mean over all rows, those without a token included, as in verl."""
    clips = _clips(config)
    weighted = advantages
    if rollout_is_weights is not None:
        log_weights = (rollout_is_weights + 1e-10).log()
        weighted = advantages * mean_of_live(log_weights, response_mask, -1).exp()[:, None]
    # In verl a token without advantage has no ratio.
    moving = torch.where(advantages == 0, old_log_prob, log_prob)
    loss, _ = clipped_loss(
        moving, old_log_prob, weighted, response_mask, variant="gmpo", **clips,
        aggregation="seq-mean-token-mean", denominator=float(log_prob.shape[0]),
    )  # fmt: skip
    with torch.no_grad():
        x = log_prob - old_log_prob
        clipped = (x < -clips["clip_low"]) | (x > clips["clip_high"])
        shares = [
            mean_of_live((clipped & side).float(), response_mask)
            for side in (advantages > 0, advantages < 0)
        ]
        ppo_kl = mean_of_live(-x, response_mask)
    numbers = _numbers(pg_clipfrac=shares[0], ppo_kl=ppo_kl, pg_clipfrac_lower=shares[1])
    return loss.to(promoted(log_prob, advantages, by_sequence=True)), numbers


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: float,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: int | None = None,
    global_batch_size: int | None = None,
    loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Half the clipped squared error, and the share of clipped tokens."""
    frame = _frame(
        loss_agg_mode, response_mask, dp_size, batch_num_tokens, global_batch_size,
        loss_scale_factor,
    )  # fmt: skip
    loss, metrics = value_loss(
        vpreds, values, returns, response_mask, clip=cliprange_value, **frame
    )
    dtype = _loss_dtype(frame, vpreds, returns, response_mask)
    return loss.to(dtype), metrics.clip_fraction.float()


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """KL of each token; "+" gives any estimator the gradient of k2."""
    if not kl_penalty.endswith("+"):
        return kl_penalty_forward(logprob, ref_logprob, kl_penalty)
    value = kl_penalty_forward(logprob.detach(), ref_logprob, kl_penalty[:-1])
    flowing = kl(logprob, ref_logprob, estimator="k2").to(value.dtype)
    return flowing - flowing.detach() + value


def kl_penalty_forward(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """KL of each token; k3 with log-ratios clamped to 20 and its value to 10."""
    names = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
    estimator = names.get(kl_penalty, kl_penalty)
    if estimator not in ("k1", "k2", "k3", "abs"):
        # The error that verl raises too: no estimator is missing here that it has.
        raise NotImplementedError(f"kl_penalty: no estimator {kl_penalty!r}")
    clamp = 20.0 if estimator == "k3" else None
    value = kl(logprob, ref_logprob, estimator=estimator, log_ratio_clamp=clamp)
    value = value.clamp(max=10) if estimator == "k3" else value
    return value.to(promoted(logprob, ref_logprob))
