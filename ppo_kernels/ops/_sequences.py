"""What the ops over sequences share: checks of their arguments, and the steps of a reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks

CONVENTIONS = ("carry", "zero", "truncate")


def check_sequences(
    rewards: Tensor,
    mask: Tensor | None,
    mask_convention: str | None,
    cu_seqlens: Tensor | None,
    terminated: Tensor | None,
    gamma: float,
) -> None:
    _checks.tensor("rewards", rewards, _checks.FLOATS)
    if cu_seqlens is not None:
        _checks.cu_seqlens(cu_seqlens, rewards, "rewards")
    elif rewards.dim() != 2:
        raise ValueError(
            f"rewards: expected shape [B, T], or [N] with cu_seqlens, got {list(rewards.shape)}"
        )
    _checks.mask(mask, rewards, "rewards")
    if mask is not None and mask_convention is None:
        known = ", ".join(CONVENTIONS)
        raise ValueError(f"mask_convention: expected one of {known} with a mask, got None")
    if mask is None and mask_convention is not None:
        raise ValueError(f"mask_convention: expected None without a mask, got {mask_convention!r}")
    if mask is not None:
        _checks.choice("mask_convention", mask_convention, CONVENTIONS)
    flags("terminated", terminated, rewards)
    _checks.number("gamma", gamma, low=0, high=1)


def flags(name: str, value: Tensor | None, rewards: Tensor) -> None:
    """A flag per step, of any dtype: nonzero = yes."""
    if value is not None:
        _checks.tensor(name, value, _checks.MASKS)
        _checks.shape(name, value, rewards.shape, "as rewards")
        _checks.device(name, value, rewards, "as rewards")


def check_values(
    rewards: Tensor, values: Tensor, truncated: Tensor | None, next_values: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The values of the steps, and those that follow the last ones if there is such a column."""
    _checks.tensor("values", values, _checks.FLOATS)
    bootstrap = None
    if values.dim() == 2 and rewards.dim() == 2 and values.shape[1] == rewards.shape[1] + 1:
        bootstrap, values = values[:, -1], values[:, :-1]
    if values.shape != rewards.shape:
        shape = list(rewards.shape)
        longer = f" or [{shape[0]}, {shape[1] + 1}]" if len(shape) == 2 else ""
        raise ValueError(
            f"values: expected shape {shape}{longer} (as rewards), got {list(values.shape)}"
        )
    _checks.device("values", values, rewards, "as rewards")
    if truncated is None and next_values is not None:
        raise ValueError("truncated: expected together with next_values, got None")
    if truncated is not None:
        flags("truncated", truncated, rewards)
        if next_values is None:
            raise ValueError("next_values: expected together with truncated, got None")
        check_tokens("next_values", next_values, rewards)
    return values, bootstrap


def check_tokens(name: str, value: Tensor, rewards: Tensor) -> None:
    """A number per step."""
    _checks.tensor(name, value, _checks.FLOATS)
    _checks.shape(name, value, rewards.shape, "as rewards")
    _checks.device(name, value, rewards, "as rewards")


def check_lambda(
    name: str, value: float | Tensor, rewards: Tensor, cu_seqlens: Tensor | None
) -> None:
    if not isinstance(value, Tensor):
        _checks.number(name, value, low=0, high=1)
        return
    sequences = rewards.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _checks.tensor(name, value, _checks.FLOATS)
    _checks.shape(name, value, (sequences,), "one per sequence")
    _checks.device(name, value, rewards, "as rewards")
    _checks.constant(name, value)


class Steps:
    """What the loop of a reference walks over: sequences as rows, numbers in float64, 0 if masked.

    Attributes:
        live: The steps that count, [S, longest], as all here.
        visited: Those the loop does not skip.
        cut: Steps after which nothing accumulated enters.
        rewards, values: Of every step.
        nothing: A zero per sequence.
        backwards: The number of each step and its TD error r_t + gamma v'_t - v_t, last first.
    """

    def __init__(
        self,
        rewards: Tensor,
        values: Tensor | None,
        next_values: Tensor | None,
        bootstrap: Tensor | None,
        mask: Tensor | None,
        convention: str | None,
        cu_seqlens: Tensor | None,
        terminated: Tensor | None,
        truncated: Tensor | None,
        gamma: float,
    ) -> None:
        self._unpacked = unpacked = _Unpacked(cu_seqlens, rewards)
        exists = unpacked.exists
        self.live = live = exists if mask is None else exists & unpacked.rows(mask != 0)
        self.visited = live if convention == "carry" else exists

        self.nothing = exists.new_zeros(exists.shape[0], dtype=torch.float64)
        r, v = self.numbers(rewards), self.numbers(values)
        ended = live if gamma == 0 else self._said(terminated)
        cut_short = self._said(truncated) & ~ended
        self.cut = ended | cut_short
        next_value = self.nothing if bootstrap is None else bootstrap.double()
        if convention == "truncate":
            next_value = torch.where((live & unpacked.last).any(1), next_value, 0.0)

        after_truncation = self.numbers(next_values)
        self.rewards, self.values = r, v
        self.backwards: list[tuple[int, Tensor]] = []
        for t in reversed(range(r.shape[1])):
            following = torch.where(cut_short[:, t], after_truncation[:, t], next_value)
            td_error = r[:, t] - v[:, t] + gamma * torch.where(ended[:, t], 0.0, following)
            self.backwards.append((t, td_error))
            next_value = torch.where(self.visited[:, t], v[:, t], next_value)

    def numbers(self, tokens: Tensor | None) -> Tensor:
        if tokens is None:
            return torch.zeros_like(self.live, dtype=torch.float64)
        return torch.where(self.live, self._unpacked.rows(tokens), 0.0).double()

    def tokens(self, backwards: list[Tensor], plus: Tensor | float, dtype: torch.dtype) -> Tensor:
        """Columns, last first, in the layout of the tokens, 0 where masked."""
        rows = torch.stack(backwards[::-1], 1) + plus if backwards else self.rewards + self.values
        return self._unpacked.tokens(torch.where(self.live, rows, 0.0)).to(dtype)

    def _said(self, flag: Tensor | None) -> Tensor:
        never = torch.zeros_like(self.live)
        return never if flag is None else self.live & self._unpacked.rows(flag != 0)


class _Unpacked:
    """The sequences as rows: padded ones as they are, packed ones spread over [S, longest]."""

    def __init__(self, cu_seqlens: Tensor | None, like: Tensor) -> None:
        self.packed = cu_seqlens is not None
        if cu_seqlens is None:
            self.exists = torch.ones_like(like, dtype=torch.bool)
            self.last = torch.arange(like.shape[1], device=like.device) == like.shape[1] - 1
            return
        total = like.shape[0]
        offsets = cu_seqlens.long().contiguous()
        lengths = offsets.diff()
        # A graph cannot depend on the data: traced, every sequence might be as long as the batch.
        tracing = torch.compiler.is_compiling()
        longest = total if tracing else max(lengths.tolist(), default=0)
        step = torch.arange(longest, device=like.device)
        self.exists = step < lengths[:, None]
        self.last = step == lengths[:, None] - 1
        self.index = (offsets[:-1, None] + step).clamp(max=total - 1)
        token = torch.arange(total, device=like.device)
        self.sequence = torch.searchsorted(offsets, token, right=True) - 1
        self.step = token - offsets[self.sequence]

    def rows(self, tokens: Tensor) -> Tensor:
        return tokens[self.index] if self.packed else tokens

    def tokens(self, rows: Tensor) -> Tensor:
        return rows[self.sequence, self.step] if self.packed else rows
