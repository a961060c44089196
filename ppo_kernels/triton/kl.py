"""kl_forward, kl_backward and shape_rewards in Triton. The formulas are those of csrc/math/kl.h."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks, _faults
from ..native import two_leading_each
from ..native.kl import ESTIMATORS
from . import _configs
from ._launch import as_bytes, launch, strides
from ._math import BAD_COEFFICIENT, INF, clamp, exponential, isnan, report_fault
from ._tokens import (
    Tokens,
    load_live,
    load_mask,
    load_sequence,
    store_tokens,
    token_block,
)

_K1 = tl.constexpr(ESTIMATORS.index("k1"))
_K2 = tl.constexpr(ESTIMATORS.index("k2"))
_K3 = tl.constexpr(ESTIMATORS.index("k3"))

_UNSPECIALIZED = ("logprobs_b", "ref_b", "mask_b", "cols")


@triton.jit
def _value(d, ESTIMATOR: tl.constexpr):
    if ESTIMATOR == _K1:
        value = d
    elif ESTIMATOR == _K2:
        value = d * d * 0.5
    elif ESTIMATOR == _K3:
        _, _, value = exponential(-d)
    else:
        value = tl.where(d < 0.0, -d, d)
    return value


@triton.jit
def kl_slope(d, ESTIMATOR: tl.constexpr):
    if ESTIMATOR == _K1:
        slope = tl.full(d.shape, 1.0, d.dtype)
    elif ESTIMATOR == _K2:
        slope = d
    elif ESTIMATOR == _K3:
        _, above, _ = exponential(-d)
        slope = -above
    else:
        slope = tl.where(d < 0.0, -1.0, tl.where(d > 0.0, 1.0, 0.0)).to(d.dtype)
    return slope


@triton.jit
def _load_log_ratio(
    logprobs, logprobs_b, logprobs_t, ref, ref_b, ref_t, mask, mask_b, mask_t, tokens, cols,
    FLAT: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    i, inside = token_block(tokens, BLOCK)
    live = load_mask(mask, mask_b, mask_t, i, inside, cols, FLAT)
    d = load_live(logprobs, logprobs_b, logprobs_t, i, inside, live, cols, FLAT, DTYPE)
    d -= load_live(ref, ref_b, ref_t, i, inside, live, cols, FLAT, DTYPE)
    return i, inside, live, d


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def value_kernel(
    logprobs, logprobs_b, logprobs_t, ref, ref_b, ref_t, mask, mask_b, mask_t, tokens, cols,
    kl, limit: tl.float64,
    ESTIMATOR: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    i, inside, _, d = _load_log_ratio(
        logprobs, logprobs_b, logprobs_t, ref, ref_b, ref_t, mask, mask_b, mask_t, tokens, cols,
        FLAT, BLOCK, DTYPE,
    )  # fmt: skip
    store_tokens(kl, i, _value(clamp(d, limit.to(DTYPE)), ESTIMATOR), inside)


@triton.jit(do_not_specialize=(*_UNSPECIALIZED, "upstream_b"))
def slope_kernel(
    logprobs, logprobs_b, logprobs_t, ref, ref_b, ref_t, mask, mask_b, mask_t, tokens, cols,
    upstream, upstream_b, upstream_t, grad, limit: tl.float64,
    ESTIMATOR: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    i, inside, live, d = _load_log_ratio(
        logprobs, logprobs_b, logprobs_t, ref, ref_b, ref_t, mask, mask_b, mask_t, tokens, cols,
        FLAT, BLOCK, DTYPE,
    )  # fmt: skip
    g = load_live(upstream, upstream_b, upstream_t, i, inside, live, cols, FLAT, DTYPE)
    limit = limit.to(DTYPE)
    clamped = (d > limit) | (d < -limit)
    slope = tl.where(live & ~clamped, g * kl_slope(d, ESTIMATOR), 0.0)
    store_tokens(grad, i, slope, inside)


@triton.jit
def _load_coefficient(kl_coefs, kl_coef):
    """In fp64; NaN if it is not one."""
    if kl_coefs is not None:
        kl_coef = tl.load(kl_coefs).to(tl.float64)
        kl_coef = tl.where((kl_coef >= 0.0) & (kl_coef < INF), kl_coef, float("nan"))
    return kl_coef


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def penalty_kernel(
    logprobs, logprobs_b, logprobs_t, ref, ref_b, ref_t, mask, mask_b, mask_t, tokens, cols,
    rewards, kl, kl_coefs, kl_coef: tl.float64, limit: tl.float64,
    ESTIMATOR: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    i, inside, live, d = _load_log_ratio(
        logprobs, logprobs_b, logprobs_t, ref, ref_b, ref_t, mask, mask_b, mask_t, tokens, cols,
        FLAT, BLOCK, DTYPE,
    )  # fmt: skip
    value = _value(clamp(d, limit.to(DTYPE)), ESTIMATOR)
    coefficient = _load_coefficient(kl_coefs, kl_coef).to(DTYPE)
    store_tokens(kl, i, value, inside)
    store_tokens(rewards, i, tl.where(live, value * -coefficient, 0.0), inside)


@triton.jit(do_not_specialize=("mask_b", "tokens", "cols", "length", "sequences"))
def score_kernel(
    mask, mask_b, mask_t, tokens, cols, scores, scores_t, offsets, offsets_t, length, sequences,
    rewards, kl, last, faults, kl_coefs, kl_coef: tl.float64,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """After penalty_kernel, one program per sequence: its score, on its last live token."""
    k = tl.program_id(0)
    begin, end, wrong = load_sequence(offsets, offsets_t, k, sequences, tokens, length, faults)
    if kl_coefs is not None:
        coefficient = _load_coefficient(kl_coefs, kl_coef)
        if (k == 0) & (isnan(coefficient)):
            report_fault(faults, tl.full([], 0, tl.int64), BAD_COEFFICIENT)
    if k == sequences:
        return
    found = begin - 1
    while (end > begin) & (found < begin):
        i = end - BLOCK + tl.arange(0, BLOCK)
        live = load_mask(mask, mask_b, mask_t, i, i >= begin, cols, FLAT)
        found = tl.max(tl.where(live, i, begin - 1), axis=0)
        end -= BLOCK
    where = tl.where(found < begin, -1, found).to(tl.int64)
    tl.store(last + k, where)
    if where >= 0:
        score = tl.load(scores + k.to(tl.int64) * scores_t).to(tl.float64)
        penalty = _load_coefficient(kl_coefs, kl_coef) * tl.load(kl + where).to(tl.float64)
        reward = tl.where(wrong, float("nan"), score - penalty)
        tl.store(rewards + where, reward.to(rewards.dtype.element_ty))


class _Pass:
    """What the kernels are told about a call."""

    def __init__(
        self, logprobs: Tensor, ref: Tensor, mask: Tensor | None, estimator: str,
        dtype: torch.dtype, *others: Tensor,
    ) -> None:  # fmt: skip
        logprobs, ref, mask, *more = two_leading_each(logprobs, ref, as_bytes(mask), *others)
        self.tokens = Tokens(logprobs, ref, mask, *more)
        self.mask = (*self.tokens.where(mask), self.tokens.count, self.tokens.cols)
        self.inputs = (*self.tokens.where(logprobs), *self.tokens.where(ref), *self.mask)
        self.others = [entry for t in more for entry in self.tokens.where(t)]
        wide = dtype == torch.float64
        self.config = _configs.TOKENS_FP64 if wide else _configs.TOKENS
        self.constants = {
            "ESTIMATOR": ESTIMATORS.index(estimator),
            "FLAT": self.tokens.flat,
            "BLOCK": self.config.block,
            "DTYPE": tl.float64 if wide else tl.float32,
        }

    def launch(self, kernel: Any, *args: Any) -> None:
        programs = self.tokens.programs(self.config.block)
        launch(
            kernel, programs, *self.inputs, *self.others, *args,
            config=self.config, **self.constants,
        )  # fmt: skip


def kl_forward(
    logprobs: Tensor, ref: Tensor, mask: Tensor | None, estimator: str, gradient: str, clamp: float
) -> Tensor:
    dtype = _checks.compute_dtype(logprobs, ref)
    kl = logprobs.new_empty(logprobs.shape, dtype=dtype)
    _Pass(logprobs, ref, mask, estimator, dtype).launch(value_kernel, kl, clamp)
    return kl


def kl_backward(
    upstream: Tensor, logprobs: Tensor, ref: Tensor, mask: Tensor | None, gradient: str,
    clamp: float,
) -> Tensor:  # fmt: skip
    grad = logprobs.new_empty(logprobs.shape)
    dtype = _checks.compute_dtype(logprobs, ref)
    _Pass(logprobs, ref, mask, gradient, dtype, upstream).launch(slope_kernel, grad, clamp)
    return grad


def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kl_coefs: Tensor | None,
    kl_coef: float,
    estimator: str,
    clamp: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _checks.compute_dtype(scores, logprobs, ref)
    rewards, kl = (logprobs.new_empty(logprobs.shape, dtype=dtype) for _ in range(2))
    last = scores.new_empty(scores.shape, dtype=torch.int64)
    call = _Pass(logprobs, ref, mask, estimator, dtype)
    call.launch(penalty_kernel, rewards, kl, kl_coefs, kl_coef, clamp)
    sequences = scores.shape[0]
    launch(
        score_kernel, sequences + (cu_seqlens is not None), *call.mask,
        scores, strides(scores)[1], cu_seqlens, strides(cu_seqlens)[1], logprobs.shape[-1],
        sequences, rewards, kl, last, _faults.flag(logprobs.device), kl_coefs, kl_coef,
        config=_configs.COUNTS, FLAT=call.tokens.flat, BLOCK=_configs.COUNTS.block,
    )  # fmt: skip
    return rewards, kl, last
