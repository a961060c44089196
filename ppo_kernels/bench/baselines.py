"""What users would otherwise call: torch as a careful user writes it, Inductor, public packages.

Each function takes the arguments of ours and returns the same outputs in the same order; what it
returns in a dict besides (metrics) is computed but not compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ppo_kernels

from ..testing import Inputs

Function = Callable[..., Any]


class UnavailableError(Exception):
    """Why a baseline cannot run here."""


@dataclass(frozen=True)
class Baseline:
    """Something to compare with.

    Attributes:
        load: From a device, the function to call. Raises UnavailableError with the reason.
        shorten: For a loop over the steps: the first `n` steps of the arguments.
    """

    load: Callable[[torch.device], Function]
    shorten: Callable[[Inputs, int], Inputs] | None = None


def torch_and_inductor(function: Function) -> dict[str, Baseline]:
    def compiled(device: torch.device) -> Function:
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return {"eager": Baseline(lambda device: function), "compile": Baseline(compiled)}


def _import(module: str, name: str) -> Function:
    package = module.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        reason = "is not installed" if missing == package else f"needs {missing}, not installed"
        raise UnavailableError(f"{package} {reason}") from error
    except Exception as error:
        raise UnavailableError(f"{module}.{name}: {type(error).__name__}: {error}") from error


def peer(module: str, name: str, adapt: Callable[[Function], Function]) -> Baseline:
    """A function of a public package, if that is installed."""
    return Baseline(lambda device: adapt(_import(module, name)))


# ---- log-probabilities --------------------------------------------------------------------------


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.log_softmax(logits, -1, dtype=torch.float32).gather(-1, tokens[:, None])[:, 0]


def _logprobs_lse(logits: Tensor, tokens: Tensor) -> Tensor:
    """Without a [tokens, vocab] tensor in forward."""
    z = logits.float()
    return z.gather(-1, tokens[:, None])[:, 0] - z.logsumexp(-1)


def _logprobs_entropy(logits: Tensor, tokens: Tensor, entropy: bool) -> tuple[Tensor, Tensor]:
    logprobs = F.log_softmax(logits, -1, dtype=torch.float32)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], entropies


def _logprobs_kept(logits: Tensor, tokens: Tensor, kept: ppo_kernels.KeptSet) -> Tensor:
    owner = torch.repeat_interleave(kept.offsets.diff(), output_size=kept.ids.shape[0])
    others = torch.ones_like(logits, dtype=torch.bool)
    others[owner, kept.ids] = False
    return _logprobs(logits.masked_fill(others, -torch.inf), tokens)


def _logprobs_gathered(logits: Tensor, tokens: Tensor, kept: ppo_kernels.KeptSet) -> Tensor:
    """Of sets of one size."""
    own = logits.gather(1, kept.ids.view(len(tokens), -1).long()).float()
    return logits.gather(-1, tokens[:, None])[:, 0].float() - own.logsumexp(-1)


def _batched(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """As a [8, T, V] batch: TRL and verl walk over the first dimension in Python."""
    rows = 8 if len(tokens) % 8 == 0 else 1
    return logits.view(rows, -1, logits.shape[-1]), tokens.view(rows, -1)


def _batched_rows(function: Function) -> Function:
    return lambda logits, tokens: function(*_batched(logits, tokens)).view(-1)


def _trl_entropy(function: Function) -> Function:
    def call(logits: Tensor, tokens: Tensor, entropy: bool) -> tuple[Tensor, ...]:
        return tuple(part.view(-1) for part in function(*_batched(logits, tokens)))

    return call


LOGPROBS = {
    **torch_and_inductor(_logprobs),
    "eager logsumexp": Baseline(lambda device: _logprobs_lse),
    "trl": peer("trl.trainer.utils", "selective_log_softmax", _batched_rows),
    "verl": peer("verl.utils.torch_functional", "logprobs_from_logits", _batched_rows),
}
LOGPROBS_ENTROPY = {
    **torch_and_inductor(_logprobs_entropy),
    "trl": peer("trl.trainer.utils", "selective_log_softmax_and_entropy", _trl_entropy),
}


LOGPROBS_KEPT = {
    "eager": Baseline(lambda device: _logprobs_kept),
    "eager gathered": Baseline(lambda device: _logprobs_gathered),
}


def _categorical_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    logp, logq = (x.float().log_softmax(-1) for x in (logits, ref_logits))
    return (logp.exp() * (logp - logq)).sum(-1)


CATEGORICAL_KL = torch_and_inductor(_categorical_kl)


def _hidden(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return _logprobs(hidden @ weight.mT, tokens)


def _hidden_kl(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor) -> Tensor:
    """In fp32: logits rounded to half precision are too coarse for their differences."""
    logits = hidden.float() @ weight.float().mT
    return _categorical_kl(logits, ref_hidden.float() @ ref_weight.float().mT)


def _checkpointed(function: Function, *of_rows: str, rows: int = 256) -> Baseline:
    """A loop over some rows of these arguments at a time, whose logits backward makes again."""

    def call(**inputs: Tensor) -> Tensor:
        parts = []
        for begin in range(0, len(inputs["hidden"]), rows):
            cut = {k: inputs[k][begin : begin + rows] for k in of_rows}
            part = partial(function, **(inputs | cut))
            parts.append(checkpoint(part, use_reentrant=False))
        return torch.cat(parts)

    return Baseline(lambda device: call)


def _trl_hidden(function: Any) -> Function:
    return lambda hidden, weight, tokens: function.apply(
        hidden, weight, None, tokens, 1.0, 32768, None, 1.0, ()
    )[0]


def _trl_hidden_kl(function: Any) -> Function:
    """Its beta of 1 is the divergence of the student, the policy, from the teacher."""
    return lambda hidden, weight, ref_hidden, ref_weight: function.apply(
        hidden, weight, None, ref_hidden, ref_weight, None, 1.0
    )[0]


def _verl_hidden(function: Any) -> Function:
    """Which makes the entropy too."""
    return lambda hidden, weight, tokens: function.apply(hidden, weight, tokens)[0]


def _linear_cross_entropy(chunked: bool) -> Baseline:
    def load(device: torch.device) -> Function:
        if not hasattr(F, "linear_cross_entropy"):
            raise UnavailableError(f"torch {torch.__version__} has no F.linear_cross_entropy")
        options = torch.nn.LinearCrossEntropyOptions() if chunked else None
        return lambda hidden, weight, tokens: (
            -F.linear_cross_entropy(hidden, weight, tokens, reduction="none", options=options)
        )

    return Baseline(load)


def _liger(device: torch.device) -> Function:
    if device.type == "cpu":
        raise UnavailableError("liger_kernel's kernels run on GPUs only")
    fused = _import("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
    return lambda hidden, weight, tokens: -fused(hidden, weight, tokens, reduction="none")


def _full_logits(device: torch.device) -> Function:
    def function(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Any:
        logits = hidden @ weight.mT
        return ppo_kernels.logprobs_from_logits(
            logits, tokens, inplace_backward=logits.requires_grad
        )

    return function


HIDDEN = {
    **torch_and_inductor(_hidden),
    "checkpointed": _checkpointed(_hidden, "hidden", "tokens"),
    "linear_cross_entropy": _linear_cross_entropy(chunked=False),
    "linear_cross_entropy chunked": _linear_cross_entropy(chunked=True),
    "ours from all logits": Baseline(_full_logits),
    "liger": Baseline(_liger),
    "trl": peer("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", _trl_hidden),
    "verl": peer(
        "verl.utils.experimental.torch_functional", "FusedLinearForPPOFunction", _verl_hidden
    ),
}
HIDDEN_KL = {
    **torch_and_inductor(_hidden_kl),
    "checkpointed": _checkpointed(_hidden_kl, "hidden", "ref_hidden"),
    "trl": peer("trl.kernels.chunked_divergence", "ChunkedDivergenceFunction", _trl_hidden_kl),
}


# ---- losses and penalties -----------------------------------------------------------------------


def _floats(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.float() for t in tensors)


def _clipped_loss(
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
    config = _import("verl.workers.config", "ActorConfig")(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_c=1e6
    )

    def call(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        new, old, advantages, live = _floats(logprobs, old_logprobs, advantages, mask)
        return function(old, new, advantages, live, config=config)

    return call


CLIPPED_LOSS = {
    **torch_and_inductor(_clipped_loss),
    "verl": peer("verl.trainer.ppo.core_algos", "compute_policy_loss_vanilla", _verl_clipped_loss),
}


def _loss_of_logits(
    logits: Tensor, tokens: Tensor, old_logprobs: Tensor, advantages: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    live = torch.ones_like(tokens, dtype=torch.bool)
    return _clipped_loss(_logprobs(logits, tokens), old_logprobs, advantages, live)


def _loss_of_hidden(
    hidden: Tensor, weight: Tensor, tokens: Tensor, old_logprobs: Tensor, advantages: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    return _loss_of_logits(hidden @ weight.mT, tokens, old_logprobs, advantages)


def _in_parts(
    logits: Tensor, tokens: Tensor, old_logprobs: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    logprobs = ppo_kernels.logprobs_from_logits(logits, tokens)
    loss, metrics = ppo_kernels.clipped_loss(logprobs, old_logprobs, advantages)
    return loss, metrics.stats


def _in_parts_of_hidden(
    hidden: Tensor, weight: Tensor, tokens: Tensor, old_logprobs: Tensor, advantages: Tensor
) -> tuple[Tensor, Tensor]:
    logprobs = ppo_kernels.logprobs_from_hidden(hidden, weight, tokens)
    loss, metrics = ppo_kernels.clipped_loss(logprobs, old_logprobs, advantages)
    return loss, metrics.stats


LOSS_OF_LOGITS = {
    **torch_and_inductor(_loss_of_logits),
    "ours in parts": Baseline(lambda device: _in_parts),
}
LOSS_OF_HIDDEN = {
    **torch_and_inductor(_loss_of_hidden),
    "ours in parts": Baseline(lambda device: _in_parts_of_hidden),
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


# ---- scans --------------------------------------------------------------------------------------


def _loop(delta: Tensor, decay: float, mask: Tensor | None = None) -> Tensor:
    """y_t = delta_t + decay y_{t+1}, a step at a time; masked steps are skipped."""
    y = torch.zeros_like(delta[:, 0])
    steps = []
    for t in reversed(range(delta.shape[1])):
        new = delta[:, t] + decay * y
        y = new if mask is None else torch.where(mask[:, t], new, y)
        steps.append(y)
    result = torch.stack(steps[::-1], 1)
    return result if mask is None else torch.where(mask, result, 0)


def _gae_loop(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    mask_convention: str = "carry",
) -> tuple[Tensor, Tensor]:
    """The loop of RLHF trainers: masked steps are skipped (`carry`)."""
    rewards, values = rewards.float(), values.float()
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    steps = []
    for t in reversed(range(rewards.shape[1])):
        new = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        if mask is None:
            advantage, next_value = new, values[:, t]
        else:
            advantage = torch.where(mask[:, t], new, advantage)
            next_value = torch.where(mask[:, t], values[:, t], next_value)
        steps.append(advantage)
    advantages = torch.stack(steps[::-1], 1)
    returns = advantages + values
    if mask is not None:
        advantages, returns = (torch.where(mask, x, 0) for x in (advantages, returns))
    return advantages, returns


def _vtrace_loop(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    mask: Tensor,
    mask_convention: str = "carry",
) -> tuple[Tensor, Tensor]:
    """Thresholds of 1; masked steps are skipped."""
    ratio = (logprobs.float() - rollout_logprobs.float()).exp().clamp(max=1.0)
    rewards, values = rewards.float(), values.float()
    next_value = next_target = torch.zeros_like(rewards[:, 0])
    advantages, targets = [], []
    for t in reversed(range(rewards.shape[1])):
        r, v, rho, live = rewards[:, t], values[:, t], ratio[:, t], mask[:, t]
        advantage = rho * (r + gamma * next_target - v)
        error = rho * (r + gamma * next_value - v)
        target = v + error + gamma * rho * (next_target - next_value)
        advantages.append(torch.where(live, advantage, 0))
        targets.append(torch.where(live, target, 0))
        next_value = torch.where(live, v, next_value)
        next_target = torch.where(live, target, next_target)
    return torch.stack(advantages[::-1], 1), torch.stack(targets[::-1], 1)


def _chunked(delta: Tensor, decay: float, chunk: int = 64) -> Tensor:
    """y_t = delta_t + decay y_{t+1}, exactly, as products with a [chunk, chunk] matrix."""
    rows, steps = delta.shape
    if steps == 1:
        return delta
    count = -(-steps // chunk)
    blocks = F.pad(delta, (0, count * chunk - steps)).view(rows, count, chunk)
    powers = torch.arange(chunk, device=delta.device)
    distance = powers[:, None] - powers
    weights = torch.where(distance >= 0, torch.pow(decay, distance.clamp(min=0).double()), 0)
    inside = blocks @ weights.to(delta.dtype)
    # What enters a chunk from the right is the same recurrence over the chunks' first elements.
    carried = F.pad(_chunked(inside[..., 0], decay**chunk, chunk)[:, 1:], (0, 1))
    reach = torch.pow(decay, (chunk - powers).double()).to(delta.dtype)
    return (inside + carried[..., None] * reach).view(rows, -1)[:, :steps]


def _gae_chunked(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    mask_convention: str = "carry",
) -> tuple[Tensor, Tensor]:
    """Right where the live steps of a row are its first ones, as in a batch of responses."""
    rewards, values = rewards.float(), values.float()
    if mask is not None:
        rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    delta = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages = _chunked(delta, gamma * lam)
    returns = advantages + values
    if mask is not None:
        advantages, returns = (torch.where(mask, x, 0) for x in (advantages, returns))
    return advantages, returns


def _padded(gae: Function) -> Function:
    """Packed sequences as a padded batch and back."""

    def call(
        rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, ...]:
        offsets = cu_seqlens.long()
        lengths = offsets.diff()
        row = torch.repeat_interleave(lengths)
        column = torch.arange(len(rewards), device=rewards.device) - offsets[row]
        shape = (len(lengths), int(lengths.max()))
        padded = [x.new_zeros(shape).index_put((row, column), x) for x in (rewards, values)]
        return tuple(x[row, column] for x in gae(*padded, gamma, lam))

    return call


def _returns_loop(
    rewards: Tensor, gamma: float, mask: Tensor, mask_convention: str = "carry"
) -> Tensor:
    return _loop(rewards.float(), gamma, mask)


def _returns_chunked(
    rewards: Tensor, gamma: float, mask: Tensor, mask_convention: str = "carry"
) -> Tensor:
    """Right where the live steps of a row are its first ones."""
    return torch.where(mask, _chunked(torch.where(mask, rewards.float(), 0), gamma), 0)


def _verl_gae(function: Function) -> Function:
    """Its function whitens the advantages besides; ours are recovered from the returns."""

    def call(
        rewards: Tensor,
        values: Tensor,
        gamma: float,
        lam: float,
        mask: Tensor,
        mask_convention: str = "carry",
    ) -> tuple[Tensor, Tensor]:
        live = mask.float()
        _, returns = function(rewards.float(), values.float(), live, gamma, lam)
        return live * (returns - values), live * returns

    return call


def _first_steps(inputs: Inputs, n: int) -> Inputs:
    return {k: v[:, :n] if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _scan(loop: Function, chunked: Function) -> dict[str, Baseline]:
    both = torch_and_inductor(chunked)
    return {
        "loop": Baseline(lambda device: loop, _first_steps),
        "chunked": both["eager"],
        "chunked compile": both["compile"],
    }


GAE = {
    **_scan(_gae_loop, _gae_chunked),
    "verl": Baseline(
        peer("verl.trainer.ppo.core_algos", "compute_gae_advantage_return", _verl_gae).load,
        _first_steps,
    ),
}
# Padding reads the longest length from the data, so what Inductor would get is cut in two.
GAE_PACKED = {
    "loop": Baseline(lambda device: _padded(_gae_loop)),
    "chunked": Baseline(lambda device: _padded(_gae_chunked)),
}
RETURNS = _scan(_returns_loop, _returns_chunked)
VTRACE = {"loop": Baseline(lambda device: _vtrace_loop, _first_steps)}
