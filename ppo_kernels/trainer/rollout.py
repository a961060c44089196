"""Sampling completions, and the mask that says which of their tokens count."""

import copy
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ppo_kernels.trainer.config import Config, InputError


class Rollout(NamedTuple):
    """Left-padded prompts followed by their completions, all on the policy's device."""

    sequences: Tensor  # [B, P + R]
    attention_mask: Tensor  # [B, P + R], 1 on the prompt and the completion up to its end
    response_mask: Tensor  # [B, R] bool, the end-of-sequence token included
    ended: Tensor  # [B] bool, False where the completion was cut at max_new_tokens
    completions: list[str]

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
        self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config
    ) -> None:
        self.policy = policy
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
        # generate drops a mask of ones, then takes the pads of completions that ended for a mistake
        log = logging.getLogger("transformers.modeling_utils")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            sequences = self.policy.generate(  # type: ignore[operator]
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                generation_config=self.settings,
            )
        finally:
            self.policy.generation_config = own
            log.setLevel(level)
        responses = sequences[:, batch["input_ids"].shape[1] :]
        mask, ended = response_mask(responses, self.eos_ids)
        return Rollout(
            sequences,
            torch.cat([batch["attention_mask"], mask.to(batch["attention_mask"].dtype)], dim=1),
            mask,
            ended,
            self.tokenizer.batch_decode(
                [tokens[live] for tokens, live in zip(responses, mask, strict=True)],
                skip_special_tokens=True,
            ),
        )


def response_mask(responses: Tensor, eos_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return `[B, R]`, true up to and including the first end, and `[B]`, whether there is one."""
    is_eos = torch.isin(responses, torch.tensor(eos_ids, device=responses.device))
    ends_before = is_eos.cumsum(-1) - is_eos.long()
    return ends_before == 0, is_eos.any(-1)
