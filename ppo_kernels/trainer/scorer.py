"""Log-probabilities and losses of tokens under a policy, if possible without its logits."""

import inspect
import logging
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import ppo_kernels as pk

# What rounding may change in logits, relative to the largest of them.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
log = logging.getLogger(__name__)


class Transform(NamedTuple):
    """What a model does to the product of its last hidden states and its output embeddings."""

    logit_scale: float
    softcap: float | None

    @classmethod
    def of(cls, policy: PreTrainedModel) -> "Transform":
        """Read it under the names that configurations of transformers have for it."""
        config = policy.config.get_text_config()
        factor = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        return cls(factor / divisor, getattr(config, "final_logit_softcapping", None))


class Scorer:
    """A policy, whose forbidden tokens have the probability 0, as they have in sampling.

    It works on the last hidden states, a few rows of logits at a time, where these logits are the
    model's own, which is tried once. Otherwise it works on the model's logits.

    Attributes:
        reason: Why it works on the model's logits, or None.
    """

    def __init__(self, policy: PreTrainedModel, forbidden: Tensor) -> None:
        self.policy, self.forbidden = policy, forbidden
        self.head = cast(nn.Linear, policy.get_output_embeddings())
        self.transform = Transform.of(policy)
        self.reason = self._why_logits()
        if self.reason:
            log.warning("the loss is computed from all logits: %s", self.reason)

    def states(
        self, sequences: Tensor, attention_mask: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return what the other methods take, and the last hidden states.

        Both `[B, length, ...]`, where the last `length` tokens are predicted.
        """
        inputs = inputs_of(self.policy, sequences, attention_mask)
        where = slice(-length - 1, -1)
        if self.reason is None:
            hidden = self._last_hidden(inputs)[:, where]
            return hidden, hidden
        if "logits_to_keep" in inspect.signature(self.policy.forward).parameters:
            inputs["logits_to_keep"] = length + 1
        outputs = self.policy(**inputs, output_hidden_states=True, use_cache=False)
        logits = outputs.logits[:, where]
        if len(self.forbidden):
            logits.index_fill_(-1, self.forbidden, -torch.inf)
        return logits, outputs.hidden_states[-1][:, where]

    def logprobs(self, states: Tensor, tokens: Tensor, **settings: Any) -> Tensor:
        """Return the log-probabilities of tokens `[B, length]`."""
        if self.reason:
            return pk.logprobs_from_logits(states, tokens, **settings)
        settings |= self._head_settings()
        return pk.logprobs_from_hidden(states, self.head.weight, tokens, **settings)

    def loss(
        self, states: Tensor, tokens: Tensor, *constants: Tensor, **settings: Any
    ) -> pk.PPOLoss:
        """Return PPO's loss of tokens `[B, length]`."""
        if self.reason:
            return pk.ppo_loss_from_logits(states, tokens, *constants, **settings)
        settings |= self._head_settings()
        return pk.ppo_loss_from_hidden(states, self.head.weight, tokens, *constants, **settings)

    def _head_settings(self) -> dict[str, Any]:
        bias: Tensor | None = self.head.bias
        if len(self.forbidden):
            if bias is None:
                bias = self.head.weight.new_zeros(self.head.out_features)
            bias = bias.index_fill(0, self.forbidden, -torch.inf)
        return {"bias": bias, **self.transform._asdict()}

    def _last_hidden(self, inputs: dict[str, Any]) -> Tensor:
        trunk = cast(PreTrainedModel, self.policy.base_model)
        return cast(Tensor, trunk(**inputs, use_cache=False).last_hidden_state)

    @torch.no_grad()
    def _why_logits(self) -> str | None:
        if not isinstance(self.head, nn.Linear):
            return f"its output embeddings are a {type(self.head).__name__}, not a linear layer"
        if self.transform.softcap and len(self.forbidden):
            return "its cap on the logits would give forbidden tokens a probability"
        inputs = {"input_ids": torch.arange(min(8, self.head.out_features))[None]}
        inputs["input_ids"] = inputs["input_ids"].to(self.head.weight.device)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        hidden = self._last_hidden(inputs)
        if hidden.dtype != self.head.weight.dtype:
            return f"it has {hidden.dtype} states and {self.head.weight.dtype} output embeddings"
        own = self.policy(**inputs, use_cache=False).logits.double()
        logits = self.head(hidden).double() * self.transform.logit_scale
        if self.transform.softcap:
            logits = self.transform.softcap * torch.tanh(logits / self.transform.softcap)
        error = float("inf")
        if own.shape == logits.shape:
            error = float((own - logits).abs().max() / own.abs().max().clamp(min=1e-30))
        if error > TOLERANCE[hidden.dtype]:
            return "its logits are not the product of last hidden states and output embeddings"
        return None


def inputs_of(model: nn.Module, sequences: Tensor, attention_mask: Tensor) -> dict[str, Any]:
    """Return the arguments of a forward pass over sequences that are padded on the left."""
    inputs: dict[str, Any] = {"input_ids": sequences, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        # the first real token has position 0 wherever it stands
        inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return inputs
