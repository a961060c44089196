"""What the tests of the scans compare with, and the batches they run on.

The oracles are plain loops over Python floats, one sequence at a time, that first list the steps
which exist and then walk them: as Schulman et al. 2016 (arXiv:1506.02438) define the estimator, and
for V-trace as remark 1 of Espeholt et al. 2018 (arXiv:1802.01561), over targets, not differences.
"""

import math

import torch
from device import DEVICE, seeded
from hypothesis import strategies as st

from ppo_kernels.testing import executors

EXECUTORS = executors("gae", "discounted_returns", device=DEVICE)
COMPILED = [e for e in EXECUTORS if e != "torch"]
CHUNK = 1024  # of csrc/cpu/block_scan.h
CONVENTIONS = [None, "carry", "zero", "truncate"]
NAN = float("nan")
NUMBERS = ("rewards", "values", "next_values", "logprobs", "rollout_logprobs")
TOKENS = (*NUMBERS, "mask", "terminated", "truncated")


def oracle(
    rewards,
    values,
    gamma,
    lam,
    bootstrap=0.0,
    mask=None,
    convention=None,
    terminated=None,
    truncated=None,
    next_values=None,
):
    """Advantages of one sequence; lists of numbers in, list of numbers out."""
    steps, alive, after_the_end, number, flag = _existing(len(rewards), mask, convention, bootstrap)
    advantages = [0.0] * len(rewards)
    accumulated = 0.0
    for t, following in reversed(list(zip(steps, [*steps[1:], None], strict=False))):
        if flag(terminated, t):
            next_value, accumulated = 0.0, 0.0
        elif flag(truncated, t):
            next_value, accumulated = next_values[t], 0.0
        else:
            next_value = after_the_end if following is None else number(values, following)
        delta = number(rewards, t) + gamma * next_value - number(values, t)
        accumulated = delta + gamma * lam * accumulated
        if t in alive:
            advantages[t] = accumulated
    return advantages


def vtrace_oracle(
    logprobs,
    rollout_logprobs,
    rewards,
    values,
    gamma,
    lam=1.0,
    rho_clip=1.0,
    c_clip=1.0,
    pg_rho_clip=1.0,
    bootstrap=0.0,
    mask=None,
    convention=None,
    terminated=None,
    truncated=None,
    next_values=None,
):
    """Advantages and returns of one sequence; lists of numbers in, lists of numbers out."""
    steps, alive, after_the_end, number, flag = _existing(len(rewards), mask, convention, bootstrap)
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    next_value = next_target = after_the_end
    for t in reversed(steps):
        if flag(terminated, t):
            next_value = next_target = 0.0
        elif flag(truncated, t):
            next_value = next_target = next_values[t]
        reward, value = number(rewards, t), number(values, t)
        log_ratio = number(logprobs, t) - number(rollout_logprobs, t)

        def ratio(clip, log_ratio=log_ratio):
            return math.exp(log_ratio) if clip is None else min(clip, math.exp(log_ratio))

        error = ratio(rho_clip) * (reward + gamma * next_value - value)
        target = value + error + gamma * lam * ratio(c_clip) * (next_target - next_value)
        if t in alive:
            advantages[t] = ratio(pg_rho_clip) * (reward + gamma * next_target - value)
            returns[t] = target
        next_value, next_target = value, target
    return advantages, returns


def _existing(count, mask, convention, bootstrap):
    """The steps, those that are live, what follows them, how to read a number and a flag of one."""
    steps = list(range(count))
    live = steps if mask is None else [t for t in steps if mask[t]]
    if convention == "carry":
        steps = live
    elif convention == "truncate":
        if not live or live[-1] != steps[-1]:
            bootstrap = 0.0
        steps = steps[: live[-1] + 1] if live else []
    alive = set(live)

    def number(x, t):
        return x[t] if t in alive else 0.0

    def flag(x, t):
        return x is not None and t in alive and bool(x[t])

    return steps, alive, bootstrap, number, flag


def close(got, expected, dtype=torch.float32):
    """Within one ulp of fp32, and in fp64 of the rounding of the largest magnitude."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = expected.abs().max().item() if expected.numel() else 0.0
    rtol = 2**-23 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=1e-12 * max(scale, 1.0))


# ---- batches -------------------------------------------------------------------------------------


def batch(seed, lengths, dtype=torch.float64, density=0.7, flag_rate=0.15):
    """Sequences of random numbers, masks and flags; what is masked or unused is NaN."""
    g = seeded(seed)
    sequences = []
    for n in lengths:

        def normal(n=n):
            return torch.randn(n, generator=g, dtype=torch.float64).to(dtype)

        def chosen(rate, n=n):
            return torch.rand(n, generator=g) < rate

        mask, truncated = chosen(density), chosen(flag_rate)
        sequences.append(
            {
                "rewards": normal(),
                "values": normal(),
                "next_values": torch.where(truncated, normal(), NAN),
                "mask": mask,
                "terminated": chosen(flag_rate),
                "truncated": truncated,
                "bootstrap": normal(1)[0],
            }
        )
    return sequences


def hide(sequences):
    """The same batch with NaN under the mask."""
    return [
        s | {k: torch.where(s["mask"], s[k], NAN) for k in NUMBERS if k in s} for s in sequences
    ]


def pad(rows, width, fill):
    return torch.stack(
        [torch.cat([x, torch.full((width - len(x),), fill, dtype=x.dtype)]) for x in rows]
    )


def packed(sequences, keys):
    lengths = [len(s["rewards"]) for s in sequences]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return {k: torch.cat([s[k] for s in sequences]) for k in keys} | {"cu_seqlens": offsets}


def padded(sequences, keys):
    """Right padding: NaN under a mask that is 0 there."""
    width = max(len(s["rewards"]) for s in sequences)
    fill = dict.fromkeys(NUMBERS, NAN)
    rows = {k: pad([s[k] for s in sequences], width, fill.get(k, k != "mask")) for k in keys}
    ones = [torch.ones(len(s["rewards"]), dtype=torch.bool) for s in sequences]
    return {"mask": pad(ones, width, False)} | rows


def rows_of(x, sequences):
    """Per-sequence results of a packed [N] or padded [B, T] tensor."""
    lengths = [len(s["rewards"]) for s in sequences]
    if x.dim() == 1:
        return list(x.split(lengths))
    return [row[:n] for row, n in zip(x, lengths, strict=True)]


options = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32),
        "lengths": st.lists(st.integers(0, 40), min_size=1, max_size=6),
        "convention": st.sampled_from(CONVENTIONS),
        "terminated": st.booleans(),
        "truncated": st.booleans(),
        "gamma": st.sampled_from([0.0, 0.9, 0.99, 1.0]),
        "lam": st.sampled_from([0.0, 0.5, 0.95, 1.0]),
        "value_lam": st.sampled_from([None, 0.0, 0.7, 1.0]),
    }
)


def arguments(o, sequences, layout=packed, numbers=("rewards", "values")):
    """The keyword arguments of gae, and each sequence's arguments of the oracle."""
    keys = list(numbers)
    keys += ["mask"] if o["convention"] else []
    keys += ["terminated"] if o["terminated"] else []
    keys += ["truncated", "next_values"] if o["truncated"] else []
    kwargs = layout(hide(sequences) if o["convention"] else sequences, keys)
    kwargs |= {"gamma": o["gamma"], "lam": o["lam"], "value_lam": o["value_lam"]}
    if o["convention"]:
        kwargs["mask_convention"] = o["convention"]
    exact = [
        {k: s[k].tolist() for k in keys}
        | {"gamma": o["gamma"], "lam": o["lam"], "convention": o["convention"]}
        for s in sequences
    ]
    return kwargs, exact
