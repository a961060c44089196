"""What the functions of several hosts need."""

from __future__ import annotations

from functools import reduce
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import logprobs_from_logits


def entropies(logits: Tensor) -> Tensor:
    """Entropy of every row, in fp32 or better."""
    any_token = torch.zeros((), dtype=torch.int64, device=logits.device).expand(logits.shape[:-1])
    return logprobs_from_logits(logits, any_token, entropy=True).entropy


def promoted(*tensors: Tensor | None, by_sequence: bool = False) -> torch.dtype:
    """What the hosts' arithmetic makes of them; of sequences they count in fp32."""
    dtypes = [t.dtype for t in tensors if t is not None]
    return reduce(torch.promote_types, dtypes + [torch.float32] * by_sequence)


def number(value: Any) -> float | None:
    """A number or a one-element constant as a float; None for anything else."""
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 and not value.requires_grad else None
    return float(value) if isinstance(value, Real) else None


def sequences_with_tokens(mask: Tensor) -> Tensor:
    """How many there are, but at least 1."""
    return (mask != 0).any(-1).sum().clamp(min=1)
