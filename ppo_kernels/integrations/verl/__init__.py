"""verl's losses, estimates and log-probabilities, by our kernels: ``verl.patch()``.

``verl.register()`` only adds policy losses, for ``policy_loss.loss_mode=ppo_kernels_gspo``. verl's
work is done by Ray workers, other processes: `plugin` says how it gets there. Masks are 0 and 1, as
verl's are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._patching import Host, Replacement
from .functional import (
    FUSED,
    LINEAR,
    TORCH,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    fused_linear_forward,
    linear_cross_entropy,
    logprobs_from_logits,
    logprobs_from_logits_v2,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
)
from .losses import (
    CORE,
    agg_loss,
    compute_gae_advantage_return,
    compute_policy_loss_cispo,
    compute_policy_loss_geo_mean,
    compute_policy_loss_gpg,
    compute_policy_loss_gspo,
    compute_policy_loss_kl_cov,
    compute_policy_loss_sapo,
    compute_policy_loss_vanilla,
    compute_value_loss,
    kl_penalty,
    kl_penalty_forward,
)

_SELECTED = "what lies under the mask is selected away, NaN too"
_LOSS = f"{_SELECTED}; nothing live gives 0, not NaN"
_ROWS = "half-precision logits are not exponentiated or summed in half precision"
_POLICY_LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "vanilla": (compute_policy_loss_vanilla, _LOSS),
    "gspo": (compute_policy_loss_gspo, _LOSS),
    "sapo": (compute_policy_loss_sapo, _LOSS),
    "gpg": (compute_policy_loss_gpg, _LOSS),
    "cispo": (compute_policy_loss_cispo, _LOSS),
    "kl_cov": (compute_policy_loss_kl_cov, f"{_LOSS}; with rollout correction it is verl's"),
    "geo_mean": (compute_policy_loss_geo_mean, _LOSS),
}
# By module; calls and changes are for the documentation.
_FUNCTIONS: dict[str, list[tuple[Callable[..., Any], str, str]]] = {
    TORCH: [
        (logprobs_from_logits, "logprobs_from_logits", f"{_ROWS}; fp32 on a GPU"),
        (logprobs_from_logits_v2, "logprobs_from_logits", _ROWS),
        (entropy_from_logits, "logprobs_from_logits", f"{_ROWS}; -inf logits give no NaN"),
        (entropy_from_logits_with_chunking, "logprobs_from_logits", "-inf logits give no NaN"),
        (masked_sum, "masked_sum", "several axes at once are verl's"),
        (masked_mean, "masked_mean", "several axes at once are verl's"),
        (masked_var, "masked_mean", _SELECTED),
        (masked_whiten, "whiten", "masked values give 0"),
    ],
    CORE: [
        (compute_gae_advantage_return, "gae, whiten", "sums in float64; masked tokens get 0"),
        (agg_loss, "masked_sum, masked_mean", _LOSS),
        *((function, "clipped_loss", changes) for function, changes in _POLICY_LOSSES.values()),
        (compute_value_loss, "value_loss", _LOSS),
        (kl_penalty, "kl_penalty", "k3 does not cancel near 0"),
        (kl_penalty_forward, "kl_penalty", "k3 does not cancel near 0"),
    ],
}
HOST = Host(
    "verl",
    ["0.9"],
    [
        *(
            Replacement(f"{module}:{function.__name__}", function, calls, changes)
            for module, functions in _FUNCTIONS.items()
            for function, calls, changes in functions
        ),
        Replacement(
            f"{LINEAR}:linear_cross_entropy",
            linear_cross_entropy,
            "logprobs_from_hidden",
            "runs on a CPU too; reduced or vocabulary-parallel it is verl's",
            signature_of=f"{LINEAR}:LinearCrossEntropy.forward",
        ),
        Replacement(
            f"{FUSED}:FusedLinearForPPO.forward",
            fused_linear_forward,
            "logprobs_from_hidden",
            "half-precision logits are never rounded; gradients are summed in fp32",
        ),
    ],
    registries=[f"{CORE}:POLICY_LOSS_REGISTRY", f"{CORE}:ADV_ESTIMATOR_REGISTRY"],
)
patch, unpatch = HOST.patch, HOST.unpatch


def register() -> list[str]:
    """Adds our policy losses to verl's registry as `ppo_kernels_NAME`; returns these names."""
    from verl.trainer.ppo.core_algos import register_policy_loss

    for name, (function, _) in _POLICY_LOSSES.items():
        register_policy_loss(f"ppo_kernels_{name}")(function)
    return [f"ppo_kernels_{name}" for name in _POLICY_LOSSES]
