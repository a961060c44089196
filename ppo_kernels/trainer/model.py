"""The policy, its value function and its frozen reference."""

import copy
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ppo_kernels.trainer.config import Config, InputError
from ppo_kernels.trainer.objects import import_object
from ppo_kernels.trainer.scorer import Scorer, inputs_of


def resolve_device(name: str) -> torch.device:
    """Return the device that `config.device` names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device: given {name!r}, which torch cannot use: {reason}") from error


def load_policy(config: Config) -> PreTrainedModel:
    """Load the folder, or call the callable, that `config.model` names."""
    assert config.model is not None
    if Path(config.model).is_dir():
        if not any(Path(config.model).glob("*.safetensors")):
            raise InputError(
                f"model: given {config.model!r}, expected a folder with weights in safetensors"
            )
        model_class = import_object(config.model_class, "model_class")
        return model_class.from_pretrained(
            config.model, local_files_only=True, use_safetensors=True
        )
    if ":" not in config.model:
        raise InputError(f"model: given {config.model!r}, expected a folder or 'module:name'")
    policy = import_object(config.model, "model")()
    if not isinstance(policy, PreTrainedModel):
        raise InputError(
            f"model: {config.model} returned {type(policy).__name__}, expected a PreTrainedModel"
        )
    return policy


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `config.tokenizer` names, or the one in the model's folder."""
    source = config.tokenizer or config.model
    if source is not None and Path(source).is_dir():
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    if source is None or source == config.model:
        raise InputError("tokenizer: given nothing, and model is no folder that could hold one")
    if ":" not in source:
        raise InputError(f"tokenizer: given {source!r}, expected a folder or 'module:name'")
    return import_object(source, "tokenizer")()


def check_positions(policy: PreTrainedModel, longest_prompt: int, max_new_tokens: int) -> None:
    """Refuse completions that would outgrow the model's position embeddings."""
    limit = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest_prompt + max_new_tokens > limit:
        raise InputError(
            f"max_new_tokens: given {max_new_tokens}, but prompts have up to {longest_prompt} "
            f"tokens and the model {limit} positions"
        )


def frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """Return the reference: the policy as it is now, without gradients."""
    return cast(PreTrainedModel, copy.deepcopy(policy).eval().requires_grad_(False))


class ActorCritic(nn.Module):
    """A policy and a linear value head, on the policy's own trunk or on a copy of it.

    Both stay in evaluation mode throughout: with dropout, the ratio of a policy to itself is not 1.
    """

    def __init__(self, policy: PreTrainedModel, forbidden: list[int], separate: bool) -> None:
        super().__init__()
        self.policy = policy
        trunk = cast(PreTrainedModel, policy.base_model)
        self.value_trunk = copy.deepcopy(trunk) if separate else None
        hidden_size = policy.config.get_text_config().hidden_size
        self.value_head = nn.Linear(hidden_size, 1, device=policy.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.forbidden: Tensor
        self.register_buffer(
            "forbidden", torch.tensor(forbidden, dtype=torch.long, device=policy.device)
        )
        self.eval()
        self.scorer = Scorer(policy, self.forbidden)

    def forward(
        self, sequences: Tensor, attention_mask: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return the scorer's states and the values, both of the last `length` tokens."""
        states, hidden = self.scorer.states(sequences, attention_mask, length)
        if self.value_trunk is not None:
            trunk = self.value_trunk
            outputs = trunk(**inputs_of(trunk, sequences, attention_mask), use_cache=False)
            hidden = outputs.last_hidden_state[:, -length - 1 : -1]
        return states, self.value_head(hidden.float())[..., 0]
