"""Kept sets: for each position the token ids that its sampler could have drawn."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks


class KeptSet(NamedTuple):
    """For each position the token ids that could have been sampled, as by top-k or top-p.

    Position i, in the row-major order of the tokens, kept ``ids[offsets[i] : offsets[i + 1]]``.
    A slice of the offsets is the sets of a slice of the positions, with the same ids.

    Attributes:
        offsets: [positions + 1], int32 or int64; they do not decrease.
        ids: [any], int32 or int64, in any order, none twice at one position.
    """

    offsets: Tensor
    ids: Tensor


class Sets(NamedTuple):
    """Of positions [N], each its own: ids[begin] to ids[end - 1]."""

    begins: Tensor
    ends: Tensor
    ids: Tensor


def sets_of(offsets: Tensor, ids: Tensor) -> Sets:
    return Sets(offsets[:-1], offsets[1:], ids)


def check(kept: KeptSet, tokens: Tensor) -> None:
    if not isinstance(kept, KeptSet):
        raise TypeError(f"kept: expected a KeptSet, got {type(kept).__name__}")
    for name, value in zip(("kept.offsets", "kept.ids"), kept, strict=True):
        _checks.tensor(name, value, _checks.INDICES)
        _checks.device(name, value, tokens, "as tokens")
    expected = (tokens.numel() + 1,)
    _checks.shape("kept.offsets", kept.offsets, expected, "the positions of tokens, and one")
    if kept.ids.dim() != 1:
        raise ValueError(f"kept.ids: expected one dimension, got {list(kept.ids.shape)}")


def contents(live: Tensor, vocab: int, begins: Tensor, ends: Tensor, ids: Tensor) -> None:
    """Raise what is wrong with the sets of the positions [N]; kernels find the same."""
    bad = bad_sets(live, vocab, begins, ends, ids, repeated=True)
    if bad.any():
        _checks.raise_kept_fault(int(bad.nonzero()[0]), vocab, begins, ends, ids)


def bad_sets(
    live: Tensor, vocab: int, begins: Tensor, ends: Tensor, ids: Tensor, *, repeated: bool
) -> Tensor:
    """Which positions [N] have bad offsets or, if they are live, ids out of range or repeated."""
    bad = (begins < 0) | (ends < begins) | (ends > ids.shape[0])
    if live.numel() == 0:
        return bad
    owner, owned = _owners(begins, ends, ids)
    owned = owned & live[owner]
    wrong = owned & ((ids < 0) | (ids >= vocab))
    if repeated:
        nobodys = -1 - torch.arange(ids.shape[0], device=ids.device)
        key, order = torch.where(owned, owner * vocab + ids, nobodys).sort()
        wrong = wrong.scatter(0, order[1:], wrong[order[1:]] | (key[1:] == key[:-1]))
    count = torch.zeros(bad.shape, dtype=torch.int64, device=bad.device)
    return bad | (count.index_add(0, owner, wrong.long()) > 0)


def allowed(kept: KeptSet, live: Tensor, vocab: int) -> Tensor:
    """[..., V]: whether a token is in the set of its position; where that is masked, all are."""
    begins, ends, ids = kept.offsets[:-1], kept.offsets[1:], kept.ids
    table = ~live[..., None].expand(*live.shape, vocab).contiguous()
    if live.numel() and ids.shape[0]:
        owner, owned = _owners(begins, ends, ids)
        owned = owned & live.flatten()[owner] & (ids >= 0) & (ids < vocab)
        flat = torch.where(owned, owner * vocab + ids, live.numel() * vocab)
        table = F.pad(table.flatten(), (0, 1)).index_fill(0, flat, True)[:-1].view_as(table)
    return table


def _owners(begins: Tensor, ends: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The position that each id belongs to, and whether there is one; of at least one position."""
    index = torch.arange(ids.shape[0], device=ids.device)
    owner = torch.searchsorted(ends.long().contiguous(), index, right=True)
    owner, found = owner.clamp(max=ends.shape[0] - 1), owner < ends.shape[0]
    return owner, found & (begins[owner] <= index)
