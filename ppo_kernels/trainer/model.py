"""The policy, its value function and its frozen reference."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ppo_kernels.trainer.config import Config, InputError
from ppo_kernels.trainer.objects import import_object
from ppo_kernels.trainer.scorer import Scorer, inputs_of

T = TypeVar("T")


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


def add_adapters(policy: PreTrainedModel, config: Config) -> None:
    """Freeze the weights and add low-rank adapters, which change nothing yet."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(
            f"lora_rank: given {config.lora_rank}, which needs peft: "
            "pip install 'ppo-kernels[lora]'"
        ) from error
    settings: dict[str, Any] = {  # peft takes any number for alpha, whatever its types say
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "target_modules": config.lora_targets or "all-linear",
    }
    try:
        policy.add_adapter(LoraConfig(**settings))
    except ValueError as error:
        raise InputError(f"lora_targets: given {config.lora_targets!r}: {error}") from error


def frozen_copy(policy: PreTrainedModel) -> PreTrainedModel:
    """Return the policy as it is now, without gradients."""
    return cast(PreTrainedModel, copy.deepcopy(policy).eval().requires_grad_(False))


class Reference(Scorer):
    """The policy as it was at the start: a frozen copy, or the policy without its adapters."""

    def __init__(self, policy: PreTrainedModel, forbidden: Tensor) -> None:
        self.has_adapters = getattr(policy, "_hf_peft_config_loaded", False)
        super().__init__(policy if self.has_adapters else frozen_copy(policy), forbidden)

    def states(
        self, sequences: Tensor, attention_mask: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """As of a Scorer."""
        with self._at_the_start():
            return super().states(sequences, attention_mask, length)

    @contextmanager
    def _at_the_start(self) -> Iterator[None]:
        if not self.has_adapters:
            yield
            return
        self.policy.disable_adapters()
        try:
            yield
        finally:
            self.policy.enable_adapters()


class ActorCritic(nn.Module):
    """A policy and a linear value head, on the policy's own trunk or on a copy of it.

    Both stay in evaluation mode throughout: with dropout, the ratio of a policy to itself is not 1.
    """

    def __init__(self, policy: PreTrainedModel, forbidden: list[int], separate: bool) -> None:
        super().__init__()
        self.policy = policy
        self._no_split_modules = getattr(policy, "_no_split_modules", None)  # where to shard
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

    def forward(self, work: Callable[..., T], *arguments: Any) -> T:
        """Return `work(self, *arguments)`.

        All that touches weights runs in here, where a sharded model has its outer ones whole.
        """
        return work(self, *arguments)

    def states_and_values(
        self, sequences: Tensor, attention_mask: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Return the scorer's states and the values, both of the last `length` tokens."""
        states, hidden = self.scorer.states(sequences, attention_mask, length)
        if self.value_trunk is not None:
            hidden = self._value_hidden(sequences, attention_mask, length)
        return states, self.value_head(hidden.float())[..., 0]

    def values(self, sequences: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        """Return the values alone; no gradient reaches a trunk that is the policy's."""
        if self.value_trunk is not None:
            hidden = self._value_hidden(sequences, attention_mask, length)
        else:
            with torch.no_grad():
                _, hidden = self.scorer.states(sequences, attention_mask, length)
        return self.value_head(hidden.float())[..., 0]

    def _value_hidden(self, sequences: Tensor, attention_mask: Tensor, length: int) -> Tensor:
        assert self.value_trunk is not None
        inputs = inputs_of(self.value_trunk, sequences, attention_mask)
        outputs = self.value_trunk(**inputs, use_cache=False)
        return outputs.last_hidden_state[:, -length - 1 : -1]
