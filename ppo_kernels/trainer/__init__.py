"""A thin RLHF trainer for causal language models; needs the extra `ppo-kernels[trainer]`."""

import importlib
from typing import TYPE_CHECKING, Any

from ppo_kernels.trainer.config import Config, InputError, UnstableError

if TYPE_CHECKING:
    from ppo_kernels.trainer.evaluation import EvalConfig, Evaluation, evaluate_policy
    from ppo_kernels.trainer.fine_tuning import SFTConfig, SFTResult, sft
    from ppo_kernels.trainer.generation import Completion, GenerateConfig, generate
    from ppo_kernels.trainer.ppo import Result, train
    from ppo_kernels.trainer.rating import RateConfig, Rated, rate
    from ppo_kernels.trainer.reward import RewardConfig, RewardResult, train_reward
    from ppo_kernels.trainer.rewards import Weighted

_WHERE = {
    "EvalConfig": "evaluation",
    "Evaluation": "evaluation",
    "evaluate_policy": "evaluation",
    "Completion": "generation",
    "GenerateConfig": "generation",
    "generate": "generation",
    "Result": "ppo",
    "train": "ppo",
    "RateConfig": "rating",
    "Rated": "rating",
    "rate": "rating",
    "RewardConfig": "reward",
    "RewardResult": "reward",
    "train_reward": "reward",
    "Weighted": "rewards",
    "SFTConfig": "fine_tuning",
    "SFTResult": "fine_tuning",
    "sft": "fine_tuning",
}
__all__ = [
    "Completion",
    "Config",
    "EvalConfig",
    "Evaluation",
    "GenerateConfig",
    "InputError",
    "RateConfig",
    "Rated",
    "Result",
    "RewardConfig",
    "RewardResult",
    "SFTConfig",
    "SFTResult",
    "UnstableError",
    "Weighted",
    "evaluate_policy",
    "generate",
    "rate",
    "sft",
    "train",
    "train_reward",
]


def __getattr__(name: str) -> Any:
    """Import a command, and with it transformers, at its first use."""
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
