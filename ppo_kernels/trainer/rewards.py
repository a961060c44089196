"""Rewards: what settings name, several with weights, and checking what they return."""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from ppo_kernels.trainer.config import InputError
from ppo_kernels.trainer.data import Row
from ppo_kernels.trainer.objects import import_object
from ppo_kernels.trainer.rules import RULES

RewardFunction = Callable[..., Any]


class Weighted:
    """The sum of rewards, each times its weight: `Weighted([(helpful, 1.0), (short, 0.2)])`."""

    def __init__(self, parts: Sequence[tuple[RewardFunction, float]]) -> None:
        self.parts = list(parts)

    def __repr__(self) -> str:
        return " + ".join(f"{weight} {reward_name(reward)}" for reward, weight in self.parts)

    def __call__(self, completions: list[str], **columns: list[Any]) -> list[float]:
        """Return one number per completion."""
        total = torch.zeros(len(completions), dtype=torch.float64)
        for reward, weight in self.parts:
            total += weight * call(reward, {**columns, "completions": completions}).double()
        return total.tolist()


def load_reward(named: str | Mapping[str, float], device: torch.device) -> RewardFunction:
    """Return the reward, or the weighted sum of rewards, that the setting `reward` names."""
    if isinstance(named, str):
        return _load_one(named, device)
    return Weighted([(_load_one(name, device), weight) for name, weight in named.items()])


def _load_one(name: str, device: torch.device) -> RewardFunction:
    if Path(name).is_dir():
        from ppo_kernels.trainer.reward_model import ModelReward

        return ModelReward.load(name, device)
    kind, _, argument = name.partition(":")
    if kind in RULES:
        return RULES[kind](argument)
    if ":" not in name:
        raise InputError(
            f"reward: given {name!r}, expected 'module:name', 'file.py:name', an existing folder, "
            f"or one of the rules {', '.join(RULES)} with its argument after a colon"
        )
    return import_object(name, "reward")


def reward_name(reward: RewardFunction) -> str:
    """Return what a reward is called in reports and errors."""
    return getattr(reward, "__qualname__", None) or repr(reward)


def score(reward: RewardFunction, rows: Sequence[Row], completions: list[str]) -> torch.Tensor:
    """Return one float32 score per completion.

    The convention is TRL's: `reward(prompts=, completions=, **columns) -> list[float]`, where the
    columns are the prompt file's other columns; it may be a coroutine function. A function without
    `**kwargs` receives only the arguments it names.
    """
    arguments: dict[str, list[Any]] = {
        key: [row[key] for row in rows] for key in rows[0] if key != "prompt"
    }
    arguments |= {"prompts": [row["prompt"] for row in rows], "completions": completions}
    return call(reward, arguments)


def call(reward: RewardFunction, arguments: dict[str, list[Any]]) -> torch.Tensor:
    """Return the scores of a reward that is given those of the arguments that it takes."""
    result = reward(**_accepted(reward, arguments))
    if inspect.isawaitable(result):
        result = _wait_for(result)
    return _checked(result, len(arguments["completions"]), reward_name(reward))


def _accepted(reward: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(reward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {key: value for key, value in arguments.items() if key in parameters}


def _wait_for(result: Awaitable[Any]) -> Any:
    async def wait() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as pool:  # a notebook already runs a loop in this thread
        return pool.submit(asyncio.run, wait()).result()


def _checked(result: Any, count: int, name: str) -> torch.Tensor:
    if hasattr(result, "tolist"):  # arrays and tensors
        result = result.tolist()
    if isinstance(result, str) or not isinstance(result, Sequence):
        raise InputError(
            f"reward {name}: returned {type(result).__name__}, expected a list of {count} numbers"
        )
    if len(result) != count:
        raise InputError(
            f"reward {name}: returned {len(result)} scores, expected {count}, one per completion"
        )
    for i, value in enumerate(result):
        if not isinstance(value, Real):
            raise InputError(
                f"reward {name}: score {i} is {value!r} ({type(value).__name__}), expected a number"
            )
        if not math.isfinite(value):
            raise InputError(f"reward {name}: score {i} is {value!r}, expected a finite number")
    return torch.tensor([float(value) for value in result], dtype=torch.float32)
