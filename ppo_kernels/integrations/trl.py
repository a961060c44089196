"""TRL's log-probabilities and entropies, by our kernels: ``trl.patch()``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import logprobs_from_hidden, logprobs_from_logits
from ._common import entropies
from ._patching import Host, Replacement, original

_UTILS, _FUSED = "trl.trainer.utils", "trl.kernels.chunked_logprob:ChunkedLogProbFunction"


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> Tensor:
    """Log-probability of one token per row; several per row (index [..., K]) are TRL's."""
    if temperature <= 0:
        raise ValueError("temperature must be positive")
    if index.shape != logits.shape[:-1]:
        host = original(f"{_UTILS}:selective_log_softmax")
        return host(logits, index, temperature=temperature, row_mask=row_mask)
    logprobs = logprobs_from_logits(logits, index, temperature=temperature, mask=row_mask)
    return _as_trl(logprobs, logits)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of every row; `chunk_size` has no use here."""
    return _as_trl(entropies(logits), logits)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both from one read of the logits."""
    if temperature <= 0:
        raise ValueError("temperature must be positive")
    logprobs, entropy = logprobs_from_logits(
        logits, index, temperature=temperature, mask=row_mask, entropy=True
    )
    entropy = entropy if entropy_requires_grad else entropy.detach()
    return _as_trl(logprobs, logits), _as_trl(entropy, logits)


def _as_trl(result: Tensor, logits: Tensor) -> Tensor:
    """TRL returns fp32 where its Triton kernels run, else what the logits are."""
    return result if logits.is_cuda else result.to(logits.dtype)


class ChunkedLogProbFunction:
    """TRL's fused LM head: log-probabilities and entropies without the logits of all tokens.

    Its other outputs (`log_sum_sq_probs`, `mean_logits`, `is_top1`) and weights that DeepSpeed
    ZeRO-3 has partitioned are TRL's.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Any, ...]:
        """Log-probabilities, entropies if they are among `outputs`, and three times None."""
        if set(outputs) - {"log_probs", "entropy"} or logit_scale <= 0 or hasattr(weight, "ds_id"):
            return original(_FUSED).apply(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping,
                logit_scale, outputs,
            )  # fmt: skip
        # A head in another dtype than the states is cast, as TRL does.
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = bias if bias is None else bias.to(hidden.dtype)
        settings: dict[str, Any] = {
            "bias": bias,
            "temperature": temperature,
            "softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
        }
        if "entropy" not in outputs:
            logprobs = logprobs_from_hidden(hidden, weight, targets, **settings)
            return logprobs, None, None, None, None
        made = logprobs_from_hidden(hidden, weight, targets, entropy=True, **settings)
        return made.logprobs, made.entropy, None, None, None


_ROUNDED = "half-precision logits are not divided, exponentiated or summed in half precision"
HOST = Host(
    "trl",
    ["1.16"],
    [
        Replacement(
            f"{_UTILS}:selective_log_softmax",
            selective_log_softmax,
            "logprobs_from_logits",
            f"{_ROUNDED}; several tokens per row are TRL's",
        ),
        Replacement(
            f"{_UTILS}:entropy_from_logits",
            entropy_from_logits,
            "logprobs_from_logits",
            f"{_ROUNDED}; -inf logits give the entropy of the others, not NaN",
        ),
        Replacement(
            f"{_UTILS}:selective_log_softmax_and_entropy",
            selective_log_softmax_and_entropy,
            "logprobs_from_logits",
            "as both",
        ),
        Replacement(
            _FUSED,
            ChunkedLogProbFunction,
            "logprobs_from_hidden",
            "half-precision logits are never rounded; `log_sum_sq_probs`, `mean_logits`, `is_top1` "
            "and heads partitioned by ZeRO-3 are TRL's",
            signature_of=f"{_FUSED}.forward",
        ),
    ],
)
patch, unpatch = HOST.patch, HOST.unpatch
