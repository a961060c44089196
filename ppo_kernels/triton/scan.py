"""scan_forward and scan_backward in Triton: x_t = d_t + c_t x_{t+1}, in fp64, and its adjoint.

How a sequence is scanned in parallel is in `scan_chunks`, where its steps are in `scan_steps`, and
the kernel of V-trace in `scan_vtrace`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _checks, _faults
from . import _configs
from ._launch import as_bytes, launch, strides
from ._math import BAD_LAMBDA, BAD_VALUE_LAMBDA
from .scan_chunks import carries_kernel, is_chunk_end, next_lane, scan_block, store_boundaries
from .scan_steps import (
    UNSPECIALIZED,
    count_kernel,
    cuts,
    is_set,
    lambdas,
    lane_places,
    live_kernel,
    neighbour,
    offsets_kernel,
    read,
    td_errors,
)
from .scan_vtrace import vtrace_kernel


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    rewards, rewards_b, rewards_t, values, values_b, values_t,
    next_values, next_values_b, next_values_t, bootstrap, bootstrap_s,
    value_lams, value_lams_s, value_lam: tl.float64, advantages, returns, faults,
    sums, factors, indices, carries, slots,
    mask, mask_b, mask_t, terminated, terminated_b, terminated_t,
    truncated, truncated_b, truncated_t, lams, lams_s,
    offsets, where, limit, padded, rows, cols, blocks, width, rows_at_once, own, sequences,
    search_steps, gamma: tl.float64, lam: tl.float64,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TRUNCATE: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    """Advantages and returns, or, given `sums`, what chunks hand on."""
    row, col, sequence, step, k, length, exists, written, lost = lane_places(
        offsets, where, limit, padded, rows, cols, blocks, width, rows_at_once, own, sequences,
        search_steps, BLOCK, 1,
    )  # fmt: skip
    live = exists
    if mask is not None:
        live = is_set(mask, mask_b, mask_t, row, col, exists)
    ended, cut_short = cuts(
        terminated, terminated_b, terminated_t, truncated, truncated_b, truncated_t, row, col,
        live, BLOCK,
    )  # fmt: skip
    discount = tl.zeros([BLOCK], tl.float64) + gamma
    is_last = k == length - 1
    v, delta = td_errors(
        rewards, rewards_b, rewards_t, values, values_b, values_t,
        next_values, next_values_b, next_values_t, bootstrap, bootstrap_s, mask, mask_b, mask_t,
        where, step, row, col, cols, sequence, exists, live, ended, cut_short, is_last, lost,
        discount, BLOCK, TRUNCATE,
    )  # fmt: skip
    cut = ended | cut_short | is_last | lost | ~exists
    chunk_end = is_chunk_end(k, CHUNK, 1)
    c = discount * lambdas(lams, lams_s, lam, sequence, exists & ~lost, faults, BAD_LAMBDA, BLOCK)
    advantage, factor = scan_block(
        tl.where(lost | ~(c >= 0.0), float("nan"), delta), c, cut, chunk_end, step, carries,
        BLOCK, CHUNK, 1, False,
    )  # fmt: skip
    target = advantage
    if sums is not None:
        store_boundaries(sums, factors, indices, advantage, factor, step, k, written, CHUNK, 1)
    if CHAINS == 2:
        c = discount * lambdas(
            value_lams,
            value_lams_s,
            value_lam,
            sequence,
            exists & ~lost,
            faults,
            BAD_VALUE_LAMBDA,
            BLOCK,
        )
        if carries is not None:
            carries += slots
        target, factor = scan_block(
            tl.where(lost | ~(c >= 0.0), float("nan"), delta), c, cut, chunk_end, step, carries,
            BLOCK, CHUNK, 1, False,
        )  # fmt: skip
        if sums is not None:
            store_boundaries(
                sums + slots, factors + slots, indices + slots, target, factor, step, k, written,
                CHUNK, 1,
            )  # fmt: skip
    if sums is None:
        token = row * cols + col
        if advantages is not None:
            tl.store(advantages + token, tl.where(live, advantage, 0.0), mask=written)
        tl.store(returns + token, tl.where(live, target + v, 0.0), mask=written)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    grad_advantages, ga_b, ga_t, grad_returns, gr_b, gr_t,
    value_lams, value_lams_s, value_lam: tl.float64,
    grad_rewards, grad_values, grad_next_values, grad_bootstrap,
    sums, factors, indices, carries, slots,
    mask, mask_b, mask_t, terminated, terminated_b, terminated_t,
    truncated, truncated_b, truncated_t, lams, lams_s,
    offsets, where, limit, padded, rows, cols, blocks, width, rows_at_once, own, sequences,
    search_steps, gamma: tl.float64, lam: tl.float64,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, TRUNCATE: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    """The gradients, or, given `sums`, what chunks hand on.

    D_t = dL/ddelta_t = g_t + c_{t-1} D_{t-1}; every gradient is one or two terms of D.
    """
    row, col, sequence, step, k, length, exists, written, lost = lane_places(
        offsets, where, limit, padded, rows, cols, blocks, width, rows_at_once, own, sequences,
        search_steps, BLOCK, -1,
    )  # fmt: skip
    live = exists
    if mask is not None:
        live = is_set(mask, mask_b, mask_t, row, col, exists)
    precedes = exists & (k > 0) & ~lost
    live_before = precedes
    before = neighbour(where, step, row, col, cols, precedes, -1)
    if mask is not None:
        live_before = is_set(mask, mask_b, mask_t, row, before, precedes)
    ended_before, cut_short_before = cuts(
        terminated, terminated_b, terminated_t, truncated, truncated_b, truncated_t, row, before,
        live_before, BLOCK,
    )  # fmt: skip
    discount = tl.zeros([BLOCK], tl.float64) + gamma
    cut = ended_before | cut_short_before | ~precedes | (discount == 0.0)
    chunk_end = is_chunk_end(k, CHUNK, -1)
    g = tl.where(lost, float("nan"), tl.zeros([BLOCK], tl.float64))
    to_returns = g
    if grad_advantages is not None:
        g += read(grad_advantages, ga_b, ga_t, row, col, live)
    if grad_returns is not None:
        to_returns += read(grad_returns, gr_b, gr_t, row, col, live)
    if CHAINS == 1:
        g += to_returns
    c = discount * lambdas(lams, lams_s, lam, sequence, exists & ~lost, None, BAD_LAMBDA, BLOCK)
    d, factor = scan_block(g, c, cut, chunk_end, step, carries, BLOCK, CHUNK, -1, False)
    if sums is not None:
        store_boundaries(sums, factors, indices, d, factor, step, k, written, CHUNK, -1)
    if CHAINS == 2:
        c = discount * lambdas(
            value_lams,
            value_lams_s,
            value_lam,
            sequence,
            exists & ~lost,
            None,
            BAD_VALUE_LAMBDA,
            BLOCK,
        )
        if carries is not None:
            carries += slots
        d_returns, factor = scan_block(
            to_returns, c, cut, chunk_end, step, carries, BLOCK, CHUNK, -1, False
        )
        d += d_returns
        if sums is not None:
            store_boundaries(
                sums + slots, factors + slots, indices + slots, d_returns, factor, step, k,
                written, CHUNK, -1,
            )  # fmt: skip
    if sums is None:
        token = row * cols + col
        ended, cut_short = cuts(
            terminated, terminated_b, terminated_t, truncated, truncated_b, truncated_t, row, col,
            live, BLOCK,
        )  # fmt: skip
        through = tl.where(discount == 0.0, 0.0, discount * d)
        if grad_rewards is not None:
            tl.store(grad_rewards + token, tl.where(live, d, 0.0), mask=written)
        if grad_values is not None:
            # What the step before looked at was this value, unless it was cut.
            of_before = tl.where(cut, 0.0, next_lane(through, tl.arange(0, BLOCK), 1, BLOCK))
            grad = (to_returns - d) + of_before
            tl.store(grad_values + token, tl.where(live, grad, 0.0), mask=written)
        if grad_next_values is not None:
            tl.store(grad_next_values + token, tl.where(cut_short, through, 0.0), mask=written)
        if grad_bootstrap is not None:
            used = (live if TRUNCATE else exists) & ~(ended | cut_short)
            tl.store(
                grad_bootstrap + sequence, tl.where(used, through, 0.0),
                mask=written & (k == length - 1),
            )  # fmt: skip


# ---- host ----------------------------------------------------------------------------------------


class _Call:
    """What all kernels are told about a call, and how they are launched.

    Of `chains` scans; `varying`: with a coefficient for each step.
    """

    def __init__(
        self,
        like: Tensor,
        tensors: tuple[Tensor | None, ...],
        gamma: float,
        lam: float,
        convention: str,
        chains: int = 1,
        varying: bool = False,
    ) -> None:
        mask, terminated, truncated, cu_seqlens, lams = tensors
        self.config, self.like = _configs.SCAN, like
        block, self.chunk = self.config.block, self.config.segment
        self.tokens = like.numel()
        packed = cu_seqlens is not None
        rows, cols = (1, self.tokens) if packed else (like.shape[0], like.shape[1])
        self.sequences = rows if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.slots = self.tokens // self.chunk + 1
        self.chains = chains
        # As many boundaries as the longest sequence can have.
        self.boundaries = max(cols - 1, 0) // self.chunk
        where = limit = offsets = None
        mask = as_bytes(mask)
        if self.tokens and mask is not None and convention == "carry":
            where, limit = self._live_steps(mask, rows, cols)
            mask = None
        if self.tokens and (packed or where is not None):
            offsets = self._offsets(like, cu_seqlens, where, limit, cols)
        self.programs, places = _blocks(rows, cols, block, block - self.chunk)
        if offsets is not None:
            self.programs = triton.cdiv(self.tokens, block - self.chunk)
            places = (1, block, 1, block - self.chunk)
        terminated, truncated = as_bytes(terminated), as_bytes(truncated)
        self.setting = (
            mask, *strides(mask), terminated, *strides(terminated), truncated, *strides(truncated),
            lams, _stride(lams),
            offsets, where, limit, int(not packed), rows, cols, *places,
            max(self.sequences, 1),
            self.sequences.bit_length(), gamma, lam,
        )  # fmt: skip
        self.tiles = {"BLOCK": block, "CHUNK": self.chunk}
        self.truncate, self.varying = convention == "truncate", varying
        # Positions that no lane visits.
        self.leaves_gaps = where is not None

    def _live_steps(self, mask: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
        """The flat positions of the live tokens, in order, and their number."""
        block = self.config.block
        programs, places = _blocks(rows, cols, block, block)
        counts = mask.new_empty(programs, dtype=torch.int32)
        before = mask.new_empty(programs + 1, dtype=torch.int64)
        dtype = torch.int32 if self.tokens < 2**31 else torch.int64
        where = mask.new_empty(self.tokens, dtype=dtype)
        about = (mask, *strides(mask), rows, cols, *places)
        launch(live_kernel, programs, *about, counts, None, None, config=self.config, BLOCK=block)
        launch(count_kernel, 1, counts, before, programs, config=self.config, BLOCK=block)
        launch(live_kernel, programs, *about, None, before, where, config=self.config, BLOCK=block)
        return where, before[-1]

    def _offsets(
        self, like: Tensor, cu_seqlens: Tensor | None, where: Tensor | None,
        limit: Tensor | None, cols: int,
    ) -> Tensor:  # fmt: skip
        block = self.config.block
        # Without sequences (bad offsets, as there are tokens) an empty one.
        offsets = like.new_empty(max(self.sequences, 1) + 1, dtype=torch.int64)
        launch(
            offsets_kernel, triton.cdiv(offsets.numel(), block), cu_seqlens,
            _stride(cu_seqlens), where, limit, offsets, _faults.flag(like.device),
            self.sequences, self.tokens, cols, self.tokens.bit_length(),
            config=self.config, BLOCK=block,
        )  # fmt: skip
        return offsets

    def run(
        self, kernel: Any, direction: int, inputs: tuple[Any, ...], outputs: tuple[Any, ...],
        **constants: Any,
    ) -> None:  # fmt: skip
        if not self.tokens:
            return
        constants |= self.tiles | {"TRUNCATE": self.truncate}
        carries = None
        if self.boundaries:
            sums, factors, indices = self._summaries(self.like, self.slots)
            launch(
                kernel, self.programs, *inputs, *(None,) * len(outputs),
                sums, factors, indices, None, self.slots, *self.setting,
                config=self.config, **constants,
            )  # fmt: skip
            carries = self._carries(sums, factors, indices, self.slots, self.boundaries, direction)
        launch(
            kernel, self.programs, *inputs, *outputs, None, None, None, carries, self.slots,
            *self.setting, config=self.config, **constants,
        )  # fmt: skip

    def _summaries(self, like: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """Per slot: the value at a boundary, the factor of what is beyond, its number.

        The number is 0, which hands on nothing, where no boundary has the slot.
        """
        sums, factors = like.new_empty((2, self.chains, slots), dtype=torch.float64)
        return sums, factors, like.new_zeros((self.chains, slots), dtype=torch.int64)

    def _carries(
        self, sums: Tensor, factors: Tensor, indices: Tensor, slots: int, longest: int,
        direction: int,
    ) -> Tensor:  # fmt: skip
        """The scan of what chunks hand on; `longest` of them belong to one sequence."""
        blocks = triton.cdiv(slots, self.config.block - self.chunk)
        next_slots = slots // self.chunk + 1
        constants = self.tiles | {"DIRECTION": direction, "VARYING": self.varying}
        carries = None
        if longest > self.chunk:
            upper = self._summaries(sums, next_slots)
            launch(
                carries_kernel, blocks * self.chains, sums, factors, indices, *upper, None, None,
                blocks, slots, next_slots, config=self.config, **constants,
            )  # fmt: skip
            carries = self._carries(*upper, next_slots, (longest - 1) // self.chunk, direction)
        results = torch.empty_like(sums)
        launch(
            carries_kernel, blocks * self.chains, sums, factors, indices, None, None, None,
            carries, results, blocks, slots, next_slots, config=self.config, **constants,
        )  # fmt: skip
        return results


def _blocks(rows: int, cols: int, block: int, own: int) -> tuple[int, tuple[int, ...]]:
    """Programs for [rows, cols]; blocks of a row, their width, rows of a program, columns it owns.

    Rows that fit into a block are never split.
    """
    if cols > block:
        blocks = triton.cdiv(cols, own)
        return rows * blocks, (blocks, block, 1, own)
    width = max(cols, 1)
    return triton.cdiv(rows, block // width), (1, width, block // width, width)


def _stride(t: Tensor | None) -> int:
    return 0 if t is None else t.stride(0)


def scan_forward(
    rewards: Tensor,
    values: Tensor | None,
    next_values: Tensor | None,
    bootstrap: Tensor | None,
    *setting: Any,
) -> tuple[Tensor, Tensor]:
    *tensors, value_lams, gamma, lam, value_lam, convention, chains = setting
    dtype = _checks.compute_dtype(rewards, values, next_values, bootstrap)
    call = _Call(rewards, tuple(tensors), gamma, lam, convention, chains)
    new = rewards.new_zeros if call.leaves_gaps else rewards.new_empty
    returns = new(rewards.shape, dtype=dtype)
    advantages = None if values is None else new(rewards.shape, dtype=dtype)
    inputs = (
        rewards, *strides(rewards), values, *strides(values), next_values, *strides(next_values),
        bootstrap, _stride(bootstrap), value_lams, _stride(value_lams), value_lam,
    )  # fmt: skip
    outputs = (advantages, returns, _faults.flag(rewards.device))
    call.run(forward_kernel, 1, inputs, outputs, CHAINS=chains)
    return rewards.new_empty(0, dtype=dtype) if advantages is None else advantages, returns


def scan_backward(
    grad_advantages: Tensor | None, grad_returns: Tensor | None, *args: Any
) -> tuple[Tensor, ...]:
    *tensors, value_lams, gamma, lam, value_lam, convention, chains, needs = args
    grad = grad_advantages if grad_advantages is not None else grad_returns
    assert grad is not None
    call = _Call(grad, tuple(tensors), gamma, lam, convention, chains)
    new = grad.new_zeros if call.leaves_gaps else grad.new_empty
    results = [new(grad.shape) if needed else grad.new_empty(0) for needed in needs[:3]]
    results.append(grad.new_zeros(call.sequences if needs[3] else 0))
    inputs = (
        grad_advantages, *strides(grad_advantages), grad_returns, *strides(grad_returns),
        value_lams, _stride(value_lams), value_lam,
    )  # fmt: skip
    outputs = tuple(t if needed else None for needed, t in zip(needs, results, strict=True))
    call.run(backward_kernel, -1, inputs, outputs, CHAINS=chains)
    return tuple(results)


def vtrace(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor | None,
    bootstrap: Tensor | None,
    *setting: Any,
) -> tuple[Tensor, Tensor]:
    *tensors, gamma, lam, rho_clip, c_clip, pg_rho_clip, convention = setting
    dtype = _checks.compute_dtype(logprobs, rollout_logprobs, rewards, values, next_values)
    call = _Call(rewards, tuple(tensors), gamma, lam, convention, varying=True)
    new = rewards.new_zeros if call.leaves_gaps else rewards.new_empty
    advantages, returns = (new(rewards.shape, dtype=dtype) for _ in range(2))
    inputs = (
        logprobs, *strides(logprobs), rollout_logprobs, *strides(rollout_logprobs),
        rewards, *strides(rewards), values, *strides(values), next_values, *strides(next_values),
        bootstrap, _stride(bootstrap), rho_clip, c_clip, pg_rho_clip,
    )  # fmt: skip
    call.run(vtrace_kernel, 1, inputs, (advantages, returns, _faults.flag(rewards.device)))
    return advantages, returns
