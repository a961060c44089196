"""Sampling completions, and the mask that says which of their tokens count."""

import copy
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ppo_kernels.trainer.config import Config, InputError


class Rollout(NamedTuple):
    """Left-padded prompts followed by their completions, all on the policy's device."""

    sequences: Tensor  # [B, P + R]
    attention_mask: Tensor  # [B, P + R], 1 on the prompt and the completion up to its end
    response_mask: Tensor  # [B, R] bool, the end-of-sequence token included
    ended: Tensor  # [B] bool, False where the completion was cut at max_new_tokens
    completions: list[str]  # without special tokens, and up to a stop string

    @property
    def responses(self) -> Tensor:
        """The completions' tokens, `[B, R]`."""
        return self.sequences[:, -self.response_mask.shape[1] :]


class Sampler:
    """Samples completions of prompts from softmax(logits / temperature) and nothing else.

    Filters such as top-k would make the sampled distribution differ from the one whose ratios PPO
    bounds, so a model folder's own generation settings are not used. Forbidden tokens are excluded
    here and have logits of -inf in every later forward pass, so the two distributions are the same.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: Config,
        synced: bool = False,
    ) -> None:
        self.policy = policy
        self.synced = synced  # processes that are done wait for the others: weights are sharded
        self.tokenizer = copy.deepcopy(tokenizer)  # padding below is none of the user's business
        self.tokenizer.padding_side = "left"
        own = policy.generation_config.eos_token_id if policy.generation_config else None
        self.eos_ids = sorted(
            {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}
        )
        if not self.eos_ids:
            raise InputError("tokenizer: has no end-of-sequence token, and the model names none")
        self.pad_id = tokenizer.pad_token_id
        if self.pad_id is None:
            self.pad_id = self.eos_ids[0]
            self.tokenizer.pad_token_id = self.pad_id
        self.forbidden = self._forbidden_ids(config.forbidden_tokens)
        self.stop = config.stop or []
        self.settings = GenerationConfig(
            do_sample=True,
            temperature=config.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=config.max_new_tokens,
            eos_token_id=self.eos_ids,
            pad_token_id=self.pad_id,
            suppress_tokens=self.forbidden or None,
        )

    def _forbidden_ids(self, names: list[str] | None) -> list[int]:
        rows = self.policy.get_output_embeddings().weight.shape[0]
        beyond_vocabulary = set(range(len(self.tokenizer), rows))  # rows that only pad the matrix
        if names is None:
            return sorted(
                (beyond_vocabulary | set(self.tokenizer.all_special_ids)) - set(self.eos_ids)
            )
        known = self.tokenizer.get_vocab()
        for name in names:
            if name not in known:
                raise InputError(f"forbidden_tokens: given {name!r}, which the vocabulary lacks")
        return sorted(beyond_vocabulary | {known[name] for name in names})

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Rollout:
        """Sample one completion of each prompt."""
        batch = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(
            self.policy.device
        )
        # what the given settings leave open is taken from the policy's own, so those go too
        own, self.policy.generation_config = self.policy.generation_config, self.settings
        prompt_length = batch["input_ids"].shape[1]
        stop = StopStrings(self.stop, self.tokenizer, prompt_length) if self.stop else None
        # generate drops a mask of ones, then takes the pads of completions that ended for a mistake
        log = logging.getLogger("transformers.modeling_utils")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            sequences = self.policy.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                generation_config=self.settings,
                stopping_criteria=StoppingCriteriaList([stop] if stop else []),
                synced_gpus=self.synced,
            )
        finally:
            self.policy.generation_config = own
            log.setLevel(level)
        responses = sequences[:, prompt_length:]
        mask, ended = response_mask(responses, self.eos_ids, stop.lengths if stop else None)
        completions = self.tokenizer.batch_decode(
            [tokens[live] for tokens, live in zip(responses, mask, strict=True)],
            skip_special_tokens=True,
        )
        return Rollout(
            sequences,
            torch.cat([batch["attention_mask"], mask.to(batch["attention_mask"].dtype)], dim=1),
            mask,
            ended,
            [stop.cut(text) for text in completions] if stop else completions,
        )


class StopStrings(StoppingCriteria):
    """Ends the completions whose text has one of the strings."""

    def __init__(
        self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase, prompt_length: int
    ) -> None:
        self.strings, self.tokenizer, self.prompt_length = strings, tokenizer, prompt_length
        self.lengths: Tensor | None = None  # [B], tokens up to the string; 0 where none came yet

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        """Return `[B]`, whether each completion has ended."""
        if self.lengths is None:
            self.lengths = input_ids.new_zeros(len(input_ids))
        running = (self.lengths == 0).nonzero()[:, 0]
        texts = self.tokenizer.batch_decode(
            input_ids[running, self.prompt_length :], skip_special_tokens=True
        )
        found = [any(string in text for string in self.strings) for text in texts]
        self.lengths[running[torch.tensor(found, dtype=torch.bool)]] = (
            input_ids.shape[1] - self.prompt_length
        )
        return self.lengths > 0

    def cut(self, text: str) -> str:
        """Return the text before the first of the strings."""
        return text[: min((text.index(s) for s in self.strings if s in text), default=None)]


def response_mask(
    responses: Tensor, eos_ids: Sequence[int], stopped: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `[B, R]`, true up to and including the end, and `[B]`, whether there is one.

    The end is the first end-of-sequence token or, if earlier, where `stopped`, `[B]` tokens, is
    not 0.
    """
    is_end = torch.isin(responses, torch.tensor(eos_ids, device=responses.device))
    if stopped is not None:
        at = torch.arange(1, responses.shape[1] + 1, device=responses.device)
        is_end |= at == stopped[:, None]
    ends_before = is_end.cumsum(-1) - is_end.long()
    return ends_before == 0, is_end.any(-1)
