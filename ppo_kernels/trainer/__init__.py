"""A thin PPO trainer for causal language models; needs the extra `ppo-kernels[trainer]`."""

from typing import TYPE_CHECKING, Any

from ppo_kernels.trainer.config import Config, InputError, UnstableError

if TYPE_CHECKING:
    from ppo_kernels.trainer.ppo import Result, train

__all__ = ["Config", "InputError", "Result", "UnstableError", "train"]


def __getattr__(name: str) -> Any:
    """Import the loop, and with it transformers, at its first use."""
    if name in ("Result", "train"):
        from ppo_kernels.trainer import ppo

        return getattr(ppo, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
