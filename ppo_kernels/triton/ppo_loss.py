"""ppo_loss_from_logits and ppo_loss_from_hidden, made of the Triton kernels of rows and tokens."""

from typing import Any

from torch import Tensor

from ..native import ppo_loss
from ..native.ppo_loss import Kernels
from . import kl, logprob, losses, moments
from .hidden import rows_of


def ppo_loss_from_logits(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return ppo_loss.from_logits(_kernels(logits), False, logits, *args)


def ppo_loss_from_logits_(logits: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return ppo_loss.from_logits(_kernels(logits), True, logits, *args)


def ppo_loss_from_hidden(hidden: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return ppo_loss.from_hidden(_kernels(hidden), hidden, *args)


def _kernels(like: Tensor) -> Kernels:
    return Kernels(
        rows_of(like),
        logprob.logprob_backward_into,
        losses.clipped_loss,
        kl.kl_forward,
        kl.kl_backward,
        moments.masked_sum,
    )
