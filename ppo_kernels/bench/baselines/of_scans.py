"""Scans over the steps: a loop, and products of matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...testing import Inputs
from .baseline import Baseline, Function, peer, torch_and_inductor


def _loop(delta: Tensor, decay: float, mask: Tensor | None = None) -> Tensor:
    """y_t = delta_t + decay y_{t+1}, a step at a time; masked steps are skipped."""
    y = torch.zeros_like(delta[:, 0])
    steps = []
    for t in reversed(range(delta.shape[1])):
        new = delta[:, t] + decay * y
        y = new if mask is None else torch.where(mask[:, t], new, y)
        steps.append(y)
    result = torch.stack(steps[::-1], 1)
    return result if mask is None else torch.where(mask, result, 0)


def _gae_loop(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    mask_convention: str = "carry",
) -> tuple[Tensor, Tensor]:
    """The loop of RLHF trainers: masked steps are skipped (`carry`)."""
    rewards, values = rewards.float(), values.float()
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    steps = []
    for t in reversed(range(rewards.shape[1])):
        new = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        if mask is None:
            advantage, next_value = new, values[:, t]
        else:
            advantage = torch.where(mask[:, t], new, advantage)
            next_value = torch.where(mask[:, t], values[:, t], next_value)
        steps.append(advantage)
    advantages = torch.stack(steps[::-1], 1)
    returns = advantages + values
    if mask is not None:
        advantages, returns = (torch.where(mask, x, 0) for x in (advantages, returns))
    return advantages, returns


def _vtrace_loop(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    mask: Tensor,
    mask_convention: str = "carry",
) -> tuple[Tensor, Tensor]:
    """Thresholds of 1; masked steps are skipped."""
    ratio = (logprobs.float() - rollout_logprobs.float()).exp().clamp(max=1.0)
    rewards, values = rewards.float(), values.float()
    next_value = next_target = torch.zeros_like(rewards[:, 0])
    advantages, targets = [], []
    for t in reversed(range(rewards.shape[1])):
        r, v, rho, live = rewards[:, t], values[:, t], ratio[:, t], mask[:, t]
        advantage = rho * (r + gamma * next_target - v)
        error = rho * (r + gamma * next_value - v)
        target = v + error + gamma * rho * (next_target - next_value)
        advantages.append(torch.where(live, advantage, 0))
        targets.append(torch.where(live, target, 0))
        next_value = torch.where(live, v, next_value)
        next_target = torch.where(live, target, next_target)
    return torch.stack(advantages[::-1], 1), torch.stack(targets[::-1], 1)


def _chunked(delta: Tensor, decay: float, chunk: int = 64) -> Tensor:
    """y_t = delta_t + decay y_{t+1}, exactly, as products with a [chunk, chunk] matrix."""
    rows, steps = delta.shape
    if steps == 1:
        return delta
    count = -(-steps // chunk)
    blocks = F.pad(delta, (0, count * chunk - steps)).view(rows, count, chunk)
    powers = torch.arange(chunk, device=delta.device)
    distance = powers[:, None] - powers
    weights = torch.where(distance >= 0, torch.pow(decay, distance.clamp(min=0).double()), 0)
    inside = blocks @ weights.to(delta.dtype)
    # What enters a chunk from the right is the same recurrence over the chunks' first elements.
    carried = F.pad(_chunked(inside[..., 0], decay**chunk, chunk)[:, 1:], (0, 1))
    reach = torch.pow(decay, (chunk - powers).double()).to(delta.dtype)
    return (inside + carried[..., None] * reach).view(rows, -1)[:, :steps]


def _gae_chunked(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    mask_convention: str = "carry",
) -> tuple[Tensor, Tensor]:
    """Right where the live steps of a row are its first ones, as in a batch of responses."""
    rewards, values = rewards.float(), values.float()
    if mask is not None:
        rewards, values = torch.where(mask, rewards, 0), torch.where(mask, values, 0)
    delta = rewards + gamma * F.pad(values[:, 1:], (0, 1)) - values
    advantages = _chunked(delta, gamma * lam)
    returns = advantages + values
    if mask is not None:
        advantages, returns = (torch.where(mask, x, 0) for x in (advantages, returns))
    return advantages, returns


def _padded(gae: Function) -> Function:
    """Packed sequences as a padded batch and back."""

    def call(
        rewards: Tensor, values: Tensor, cu_seqlens: Tensor, gamma: float, lam: float
    ) -> tuple[Tensor, ...]:
        offsets = cu_seqlens.long()
        lengths = offsets.diff()
        row = torch.repeat_interleave(lengths)
        column = torch.arange(len(rewards), device=rewards.device) - offsets[row]
        shape = (len(lengths), int(lengths.max()))
        padded = [x.new_zeros(shape).index_put((row, column), x) for x in (rewards, values)]
        return tuple(x[row, column] for x in gae(*padded, gamma, lam))

    return call


def _returns_loop(
    rewards: Tensor, gamma: float, mask: Tensor, mask_convention: str = "carry"
) -> Tensor:
    return _loop(rewards.float(), gamma, mask)


def _returns_chunked(
    rewards: Tensor, gamma: float, mask: Tensor, mask_convention: str = "carry"
) -> Tensor:
    """Right where the live steps of a row are its first ones."""
    return torch.where(mask, _chunked(torch.where(mask, rewards.float(), 0), gamma), 0)


def _verl_gae(function: Function) -> Function:
    """Its function whitens the advantages besides; ours are recovered from the returns."""

    def call(
        rewards: Tensor,
        values: Tensor,
        gamma: float,
        lam: float,
        mask: Tensor,
        mask_convention: str = "carry",
    ) -> tuple[Tensor, Tensor]:
        live = mask.float()
        _, returns = function(rewards.float(), values.float(), live, gamma, lam)
        return live * (returns - values), live * returns

    return call


def _first_steps(inputs: Inputs, n: int) -> Inputs:
    return {k: v[:, :n] if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _scan(loop: Function, chunked: Function) -> dict[str, Baseline]:
    both = torch_and_inductor(chunked)
    return {
        "loop": Baseline(lambda device: loop, _first_steps),
        "chunked": both["eager"],
        "chunked compile": both["compile"],
    }


GAE = {
    **_scan(_gae_loop, _gae_chunked),
    "verl": Baseline(
        peer("verl.trainer.ppo.core_algos", "compute_gae_advantage_return", _verl_gae).load,
        _first_steps,
    ),
}
# Padding reads the longest length from the data, so what Inductor would get is cut in two.
GAE_PACKED = {
    "loop": Baseline(lambda device: _padded(_gae_loop)),
    "chunked": Baseline(lambda device: _padded(_gae_chunked)),
}
RETURNS = _scan(_returns_loop, _returns_chunked)
VTRACE = {"loop": Baseline(lambda device: _vtrace_loop, _first_steps)}
