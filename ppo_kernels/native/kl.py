"""kl_forward, kl_backward and shape_rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from . import Native, pointer, rows, rows_cols, two_leading_each

# The order of enum Estimator in csrc/math/kl.h.
ESTIMATORS = ("k1", "k2", "k3", "abs")


def kl_forward(
    native: Native,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    estimator: str,
    gradient: str,
    clamp: float,
) -> Tensor:
    kl = native.empty(logprobs.shape, _checks.compute_dtype(logprobs, ref_logprobs))
    logprobs, ref_logprobs, mask = two_leading_each(logprobs, ref_logprobs, mask)
    native.module.kl_forward(
        rows(logprobs), rows(ref_logprobs), rows(mask), *rows_cols(logprobs),
        ESTIMATORS.index(estimator), clamp, pointer(kl), native.target(),
    )  # fmt: skip
    return kl


def kl_backward(
    native: Native,
    grad_kl: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    gradient: str,
    clamp: float,
) -> Tensor:
    grad = native.empty(logprobs.shape, logprobs.dtype)
    grad_kl, logprobs, ref_logprobs, mask = two_leading_each(grad_kl, logprobs, ref_logprobs, mask)
    native.module.kl_backward(
        rows(grad_kl), rows(logprobs), rows(ref_logprobs), rows(mask), *rows_cols(logprobs),
        ESTIMATORS.index(gradient), clamp, pointer(grad), native.target(),
    )  # fmt: skip
    return grad


def shape_rewards(
    native: Native,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coefs: Tensor | None,
    kl_coef: float,
    estimator: str,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _checks.compute_dtype(scores, logprobs, ref_logprobs)
    rewards, kl = native.empty(logprobs.shape, dtype), native.empty(logprobs.shape, dtype)
    last = native.empty(scores.shape, torch.int64)
    fault = native.module.shape_rewards(
        rows(scores), rows(logprobs), rows(ref_logprobs), rows(mask), rows(cu_seqlens),
        rows(kl_coefs), *rows_cols(logprobs), scores.shape[0], ESTIMATORS.index(estimator),
        kl_coef, clamp, pointer(rewards), pointer(kl), pointer(last), native.target(),
    )  # fmt: skip
    if fault is not None:
        if kl_coefs is not None:
            _checks.number("kl_coef", kl_coefs.item(), low=0)
        assert cu_seqlens is not None
        _checks.cu_seqlens_contents(cu_seqlens, logprobs.shape[0])
    return rewards, kl, last
