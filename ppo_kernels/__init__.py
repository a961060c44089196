"""Fast, exact PPO kernels for language models, as torch custom ops, with a thin trainer."""

try:
    import torch  # noqa: F401
except ImportError as _error:
    raise ImportError(
        "ppo_kernels needs torch >= 2.6; install it with: pip install torch"
    ) from _error

from ._faults import check
from ._kept import KeptSet
from ._op import op_counts, reset_op_counts, use_backend
from .metrics import ImportanceMetrics, PolicyMetrics, ValueMetrics, reduce_metrics
from .ops.categorical_kl import categorical_kl
from .ops.categorical_kl_hidden import categorical_kl_from_hidden
from .ops.clipped_loss import ClippedLoss, clipped_loss
from .ops.gae import GAE, gae
from .ops.importance import ImportanceWeights, importance_weights
from .ops.kept import kept_set
from .ops.kl import kl_penalty
from .ops.logprob import LogProbs, logprobs_from_logits
from .ops.logprob_hidden import logprobs_from_hidden
from .ops.moments import masked_mean, masked_sum, whiten
from .ops.ppo_loss import PPOLoss, ppo_loss_from_hidden, ppo_loss_from_logits
from .ops.returns import discounted_returns
from .ops.rewards import ShapedRewards, shape_rewards
from .ops.value_loss import ValueLoss, value_loss
from .ops.vtrace import VTrace, vtrace

__version__ = "0.1.0"
__all__ = [
    "GAE",
    "ClippedLoss",
    "ImportanceMetrics",
    "ImportanceWeights",
    "KeptSet",
    "LogProbs",
    "PPOLoss",
    "PolicyMetrics",
    "ShapedRewards",
    "VTrace",
    "ValueLoss",
    "ValueMetrics",
    "categorical_kl",
    "categorical_kl_from_hidden",
    "check",
    "clipped_loss",
    "discounted_returns",
    "gae",
    "importance_weights",
    "kept_set",
    "kl_penalty",
    "logprobs_from_hidden",
    "logprobs_from_logits",
    "masked_mean",
    "masked_sum",
    "op_counts",
    "ppo_loss_from_hidden",
    "ppo_loss_from_logits",
    "reduce_metrics",
    "reset_op_counts",
    "shape_rewards",
    "use_backend",
    "value_loss",
    "vtrace",
    "whiten",
]
