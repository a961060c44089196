"""Calling a user's reward function and checking what it returns."""

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any

import torch

from ppo_kernels.trainer.config import InputError
from ppo_kernels.trainer.data import Row

RewardFunction = Callable[..., Any]


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
    result = reward(**_accepted(reward, arguments))
    if inspect.isawaitable(result):
        result = _wait_for(result)
    return _checked(result, len(completions), getattr(reward, "__qualname__", repr(reward)))


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
