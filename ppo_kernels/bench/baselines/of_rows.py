"""Rows of logits: log-probabilities and divergences, from logits or from hidden states."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ppo_kernels

from .baseline import Baseline, Function, UnavailableError, imported, peer, torch_and_inductor
from .of_tokens import clipped_loss


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
    fused = imported("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
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


def _loss_of_logits(
    logits: Tensor, tokens: Tensor, old_logprobs: Tensor, advantages: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    live = torch.ones_like(tokens, dtype=torch.bool)
    return clipped_loss(_logprobs(logits, tokens), old_logprobs, advantages, live)


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
