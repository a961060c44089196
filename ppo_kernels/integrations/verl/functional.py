"""verl's log-probabilities, entropies and masked statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import logprobs_from_hidden, whiten
from ... import logprobs_from_logits as token_logprobs
from ... import masked_mean as mean_of_live
from ... import masked_sum as sum_of_live
from .._common import entropies, promoted
from .._patching import original

TORCH = "verl.utils.torch_functional"
LINEAR = "verl.utils.kernel.linear_cross_entropy"
FUSED = "verl.utils.experimental.torch_functional"


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probabilities of the labels; in place backward on a GPU, as with flash-attn."""
    logprobs = token_logprobs(logits, labels, inplace_backward=inplace_backward and logits.is_cuda)
    return logprobs if logits.is_cuda else logprobs.to(logits.dtype)


def logprobs_from_logits_v2(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the labels."""
    return token_logprobs(logits, labels).to(logits.dtype)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of every row."""
    return entropies(logits).to(logits.dtype)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Entropy of every row, in fp32; `chunk_size` has no use here."""
    return entropies(logits).float()


def masked_sum(values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
    """Sum of the live values; over several axes at once it is verl's."""
    if not _regular(values, mask, axis):
        result: Tensor = original(f"{TORCH}:masked_sum")(values, mask, axis)
        return result
    return sum_of_live(values, mask, axis).to(promoted(values, mask))


def masked_mean(values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
    """Mean of the live values; over several axes at once it is verl's."""
    if not _regular(values, mask, axis):
        result: Tensor = original(f"{TORCH}:masked_mean")(values, mask, axis)
        return result
    return mean_of_live(values, mask, axis).to(_mean_dtype(values, mask))


def masked_var(values: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of the live values."""
    if not _regular(values, mask, None):
        result: Tensor = original(f"{TORCH}:masked_var")(values, mask, unbiased)
        return result
    count = checked_count(mask) if unbiased else None
    wide = values.double()
    variance = mean_of_live((wide - mean_of_live(wide, mask)).square(), mask)
    if count is not None:
        variance = variance * (count / (count - 1))
    return variance.to(_mean_dtype(values, mask))


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Live values at mean 0 and variance 1, masked ones 0."""
    if not _regular(values, mask, None):
        result: Tensor = original(f"{TORCH}:masked_whiten")(values, mask, shift_mean)
        return result
    checked_count(mask)
    return whiten(values, mask, shift_mean=shift_mean, eps=1e-8).to(values.dtype)


def _regular(values: Any, mask: Any, axis: Any) -> bool:
    return (
        isinstance(mask, Tensor)
        and values.shape == mask.shape
        and values.is_floating_point()
        and (axis is None or isinstance(axis, int))
    )


def _mean_dtype(values: Tensor, mask: Tensor) -> torch.dtype:
    """Of verl's quotient: its sum and its count are both scalars, of which the wider wins."""
    count = mask.dtype if mask.is_floating_point() else torch.float32
    return torch.promote_types(promoted(values, mask), count)


def checked_count(mask: Tensor) -> Tensor:
    """How many are live, at least 2."""
    count = (mask != 0).sum()
    if count == 0:
        raise ValueError("At least one element in the mask has to be 1.")
    if count == 1:
        raise ValueError("The sum of the mask is one, which can cause a division by zero.")
    return count


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    reduction: str | None = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies [tokens]; reduced or vocabulary-parallel, they are verl's."""
    if reduction is None or reduction.lower() != "none" or dist_process_group is not None:
        result: tuple[Tensor, Tensor] = original(f"{LINEAR}:linear_cross_entropy")(
            hidden, weight, labels, temperature, reduction, dist_process_group
        )
        return result
    made = logprobs_from_hidden(
        hidden.flatten(0, -2), weight, labels.flatten(), temperature=temperature, entropy=True
    )
    return made.logprobs, made.entropy


def fused_linear_forward(
    self: Any,
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`FusedLinearForPPO.forward`; with its backend "liger" it is verl's."""
    if self.impl_backend != "torch":
        result: tuple[Tensor, Tensor] = original(f"{FUSED}:FusedLinearForPPO.forward")(
            self, hidden_states, vocab_weights, input_ids, temperature
        )
        return result
    made = logprobs_from_hidden(
        hidden_states, vocab_weights, input_ids.long(), temperature=temperature, entropy=True
    )
    return made.logprobs, made.entropy.to(hidden_states.dtype)
