"""Fast, exact PPO kernels for language models, as torch custom ops, with a thin trainer."""

try:
    import torch  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "ppo_kernels needs torch >= 2.6; install it with: pip install torch"
    ) from _error

from ._op import op_counts, reset_op_counts, use_backend
from .ops.logprob import LogProbs, logprobs_from_logits

__version__ = "0.1.0"
__all__ = [
    "LogProbs",
    "logprobs_from_logits",
    "op_counts",
    "reset_op_counts",
    "use_backend",
]
