"""OpenRLHF's losses, estimates and log-probabilities, by our kernels: ``openrlhf.patch()``.

OpenRLHF trains in Ray workers, other processes: patch there, for example by Ray's
``runtime_env={"worker_process_setup_hook": "ppo_kernels.integrations.openrlhf.patch"}``.
Masks are 0 and 1, as OpenRLHF's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import (
    clipped_loss,
    discounted_returns,
    gae,
    importance_weights,
    kl_penalty,
    logprobs_from_logits,
    masked_sum,
    shape_rewards,
    value_loss,
)
from .. import masked_mean as mean_of_live
from ._common import entropies, promoted, sequences_with_tokens
from ._patching import Host, Replacement, original

_LOSS, _UTILS = "openrlhf.models.loss", "openrlhf.models.utils"
_MAKER = "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker"

# ---- openrlhf.models.utils -----------------------------------------------------------------------


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """KL of each token, clamped to 10; its gradient that of the estimator, or of the true KL."""
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"Unknown kl_estimator: {kl_estimator}")
    # k3 is above its bound of 10 long before 80, where it is still finite.
    value = kl_penalty(log_probs, log_probs_base, estimator=kl_estimator, log_ratio_clamp=_CLAMP)
    value = value.clamp(-10, 10).float()
    if not unbiased_gradient:
        return value
    flowing = kl_penalty(log_probs, log_probs_base, estimator="k2").float()
    if log_probs_old is not None:
        ratio = (log_probs.detach().float() - log_probs_old.detach().float()).exp()
        flowing = flowing * ratio.clamp(max=10.0)
    return value.detach() + flowing - flowing.detach()


_CLAMP = 80.0


def compute_reward(
    r: Tensor,
    kl_coef: float,
    kl: Tensor,
    action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    """A penalty on every token, and the reward on the last one of its row."""
    if reward_clip_range:
        r = r.clamp(*reward_clip_range)
    nothing = kl.new_zeros(()).expand(kl.shape)
    coefficient = max(float(kl_coef), 0.0)
    made = shape_rewards(r, kl, nothing, action_mask, kl_coef=coefficient)
    return made.rewards.to(kl.dtype)


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the labels; as in OpenRLHF the logits are divided in place."""
    if temperature != 1.0:
        logits.div_(temperature)
    return logprobs_from_logits(logits, labels).to(logits.dtype)


def masked_mean(tensor: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    """Mean of the live elements."""
    if mask is None or mask.shape != tensor.shape or not tensor.is_floating_point():
        result: Tensor = original(f"{_UTILS}:masked_mean")(tensor, mask, dim)
        return result
    return mean_of_live(tensor, mask, dim).to(promoted(tensor, mask))


def masked_normalize(tensor: Tensor, mask: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Live elements at mean 0 and variance 1 along `dim`; the variance at least `eps`."""
    wide = tensor.double()
    centered = wide - mean_of_live(wide, mask, dim).unsqueeze(dim)
    variance = mean_of_live(centered.square(), mask, dim).unsqueeze(dim)
    scaled = centered * variance.clamp(min=eps).rsqrt()
    return torch.where(mask != 0, scaled, 0.0).to(promoted(tensor, mask))


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy of every row."""
    return entropies(logits).to(logits.dtype)


# ---- openrlhf.models.loss ------------------------------------------------------------------------


def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
) -> Tensor:
    """One number of the losses of all tokens."""
    if token_level_loss:
        if batch_num_tokens is None:
            made = mean_of_live(loss, loss_mask)
        else:
            made = masked_sum(loss, loss_mask) / batch_num_tokens * dp_size
    else:
        total = mean_of_live(loss, loss_mask, -1).sum()
        if global_batch_size is None:
            made = total / sequences_with_tokens(loss_mask)
        else:
            made = total / global_batch_size * dp_size
    return made.to(promoted(loss, loss_mask, by_sequence=not token_level_loss))


def _frame(token_level: bool, dp_size: int, tokens: Any, sequences: Any) -> dict[str, Any]:
    """How our losses aggregate as `aggregate_loss` does."""
    count = tokens if token_level else sequences
    return {
        "aggregation": "token-mean" if token_level else "seq-mean-token-mean",
        "denominator": None if count is None else count / dp_size,
    }


class PolicyLoss(nn.Module):
    """OpenRLHF's policy loss with what it measures."""

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        self.clip_eps_low, self.clip_eps_high = clip_eps_low, clip_eps_high
        self.dual_clip = dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = is_correction_threshold

    # Of the host's instances too, once patched: it uses nothing of self but these attributes.
    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Any, ...]:
        """Loss, clip fraction, KL of the step, KL to the sampler, and the share filtered.

        GSPO, and corrections gated by a divergence, are OpenRLHF's.
        """
        corrected = self.is_correction_level != "off"
        if self.policy_loss_type != "ppo" or (corrected and self.is_correction_gating != "ratio"):
            result: tuple[Any, ...] = original(f"{_LOSS}:PolicyLoss.forward")(
                self, log_probs, old_log_probs, advantages, action_mask, rollout_log_probs, dp_size,
                batch_num_tokens, global_batch_size,
            )  # fmt: skip
            return result
        settings = {
            "clip_low": self.clip_eps_low,
            "clip_high": self.clip_eps_high,
            "dual_clip": self.dual_clip,
            "log_ratio_clamp": 20.0,
            **_frame(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
        }
        vllm_kl = filtered = None
        args = (old_log_probs, advantages, action_mask)
        if corrected:
            weights, vllm_kl, filtered = _correction(
                old_log_probs, rollout_log_probs, action_mask, self.is_correction_level == "seq",
                self.is_correction_mode, self.is_correction_threshold,
            )  # fmt: skip
            loss, _ = clipped_loss(
                log_probs, old_log_probs, advantages * weights, action_mask, **settings
            )
            metrics = clipped_loss(log_probs.detach(), *args, **settings).metrics
        else:
            loss, metrics = clipped_loss(log_probs, *args, **settings)
        with torch.no_grad():
            ppo_kl = mean_of_live(old_log_probs - log_probs, action_mask)
        tokens = (log_probs, old_log_probs, action_mask)
        loss = loss.to(
            promoted(
                *tokens,
                advantages,
                rollout_log_probs if corrected else None,
                by_sequence=not self.token_level_loss,
            )
        )
        ppo_kl = ppo_kl.to(promoted(*tokens))
        return loss, metrics.clip_fraction.float(), ppo_kl, vllm_kl, filtered


def _correction(
    old_log_probs: Tensor,
    rollout_log_probs: Any,
    mask: Tensor | None,
    by_sequence: bool,
    mode: str,
    threshold: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of tokens, KL to the sampler, and the share of tokens or sequences filtered."""
    low, high = threshold
    kind = "mask-geometric" if by_sequence else "icepop" if mode == "mask" else "tis"
    weights, measured = importance_weights(
        old_log_probs.detach(), rollout_log_probs, mask, kind=kind, low=low, high=high
    )
    filtered = measured.limited_fraction.float()
    if by_sequence:
        kept = weights != 0
        ratio = (old_log_probs.detach() - rollout_log_probs).exp()
        weights = torch.where(kept, ratio, 0.0)
        filtered = 1 - kept.any(-1).float().mean()
    kl = measured.kl_k1.to(promoted(old_log_probs, rollout_log_probs, mask))
    return weights, kl, filtered


class ValueLoss(nn.Module):
    """OpenRLHF's value loss."""

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps, self.token_level_loss = clip_eps, token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> Tensor:
        """Half the squared error, clipped if `clip_eps` is given."""
        loss, _ = value_loss(
            values, old_values, returns, action_mask, clip=self.clip_eps,
            **_frame(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size),
        )  # fmt: skip
        by_sequence = not self.token_level_loss
        return loss.to(promoted(values, returns, action_mask, by_sequence=by_sequence))


# ---- openrlhf.trainer.ppo_utils.experience_maker -------------------------------------------------


def get_advantages_and_returns(
    self: Any,
    values: Tensor,
    rewards: Tensor,
    action_mask: Tensor | None,
    gamma: float,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    """GAE; masked tokens count as zeros, time passes over them, and they get 0."""
    with torch.no_grad():
        advantages, returns = gae(rewards, values, gamma=gamma, lam=lambd, **_masked(action_mask))
    dtype = promoted(rewards, values)
    return advantages.to(dtype), returns.to(dtype)


def get_cumulative_returns(
    self: Any, rewards: Tensor, action_mask: Tensor | None, gamma: float
) -> Tensor:
    """Discounted sums of rewards; masked tokens as in GAE."""
    with torch.no_grad():
        return discounted_returns(rewards, gamma=gamma, **_masked(action_mask)).to(rewards.dtype)


def _masked(mask: Tensor | None) -> dict[str, Any]:
    return {} if mask is None else {"mask": mask, "mask_convention": "zero"}


# ---- what is replaced ----------------------------------------------------------------------------

_SELECTED = "what lies under the mask is selected away, NaN too; nothing live gives 0, not NaN"
HOST = Host(
    "openrlhf",
    ["0.11"],
    [
        *(
            Replacement(f"{_UTILS}:{function.__name__}", function, calls, changes)
            for function, calls, changes in (
                (compute_approx_kl, "kl_penalty", "k3 does not cancel near 0"),
                (
                    compute_reward,
                    "shape_rewards",
                    "masked tokens get 0; so does the reward of a row without a live token",
                ),
                (
                    log_probs_from_logits,
                    "logprobs_from_logits",
                    "half-precision logits are not exponentiated or summed in half precision",
                ),
                (masked_mean, "masked_mean", _SELECTED),
                (masked_normalize, "masked_mean", _SELECTED.split(";", maxsplit=1)[0]),
                (
                    compute_entropy,
                    "logprobs_from_logits",
                    "not compiled; -inf logits give the entropy of the others, not NaN",
                ),
            )
        ),
        Replacement(
            f"{_LOSS}:aggregate_loss", aggregate_loss, "masked_sum, masked_mean", _SELECTED
        ),
        Replacement(
            f"{_LOSS}:PolicyLoss.forward",
            PolicyLoss.forward,
            "clipped_loss, importance_weights",
            f"{_SELECTED}; GSPO and corrections gated by a divergence are OpenRLHF's",
        ),
        Replacement(f"{_LOSS}:ValueLoss.forward", ValueLoss.forward, "value_loss", _SELECTED),
        Replacement(
            f"{_MAKER}.get_advantages_and_returns",
            get_advantages_and_returns,
            "gae",
            "sums in float64; masked tokens get 0",
        ),
        Replacement(
            f"{_MAKER}.get_cumulative_returns",
            get_cumulative_returns,
            "discounted_returns",
            "sums in float64; masked tokens get 0",
        ),
    ],
)
patch, unpatch = HOST.patch, HOST.unpatch
