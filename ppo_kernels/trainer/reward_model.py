"""A sequence-classification model as a reward: loading, encoding texts, scoring them."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ppo_kernels.trainer.config import InputError


class Encoder:
    """Tokens of texts for a reward model: prompt, completion and the end of the sequence.

    Tokenizers of encoders (those with a class token) frame prompt + completion in their own way.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token_id is None:
            raise InputError("tokenizer: has neither a padding nor an end-of-sequence token")
        positions = getattr(model.config, "max_position_embeddings", None)
        self.longest = min(positions or 2**30, self.tokenizer.model_max_length)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[list[int]]:
        """Return token ids; of texts too long for the model, the last ones."""
        tokenizer = self.tokenizer
        if tokenizer.cls_token_id is not None:
            texts = [prompt + text for prompt, text in zip(prompts, completions, strict=True)]
            rows = tokenizer(texts, truncation=True, max_length=self.longest)["input_ids"]
            return cast(list[list[int]], rows)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        before = tokenizer(list(prompts))["input_ids"]
        after = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
        return [
            [*first, *second, *end][-self.longest :]
            for first, second in zip(before, after, strict=True)
        ]

    def pad(self, rows: Sequence[list[int]], device: torch.device) -> dict[str, Tensor]:
        """Return the model's arguments."""
        batch = self.tokenizer.pad({"input_ids": list(rows)}, return_tensors="pt")
        return {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}


class ModelReward:
    """The scores of a sequence-classification model with one output."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str = "reward model",
        batch: int = 64,
    ) -> None:
        self.model, self.name, self.batch = model.eval(), name, batch
        self.encoder = Encoder(model, tokenizer)
        model.config.pad_token_id = self.encoder.tokenizer.pad_token_id

    @classmethod
    def load(cls, folder: str, device: torch.device) -> "ModelReward":
        """Load a folder with model and tokenizer."""
        if not any(Path(folder).glob("*.safetensors")):
            raise InputError(
                f"reward: given {folder!r}, expected a folder with weights in safetensors"
            )
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, local_files_only=True, use_safetensors=True
        )
        if model.config.num_labels != 1:
            raise InputError(
                f"reward: given {folder!r}, a model with {model.config.num_labels} outputs, "
                "expected one"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cls(model.to(device), tokenizer, folder)

    def __repr__(self) -> str:
        return self.name

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        """Return one score per completion."""
        return self.scores(self.encoder(prompts, completions)).tolist()

    @torch.no_grad()
    def scores(self, rows: Sequence[list[int]]) -> Tensor:
        """Return the scores of encoded texts, the model being left as it was."""
        training, order = self.model.training, sorted(range(len(rows)), key=lambda i: len(rows[i]))
        scores = torch.empty(len(rows))
        self.model.eval()
        for start in range(0, len(order), self.batch):
            index = order[start : start + self.batch]
            scores[index] = forward(self.model, self.encoder, [rows[i] for i in index]).cpu()
        self.model.train(training)
        return scores


def forward(model: PreTrainedModel, encoder: Encoder, rows: Sequence[list[int]]) -> Tensor:
    """Return one float32 score per row, differentiable."""
    outputs: Any = model(**encoder.pad(rows, model.device))
    return cast(Tensor, outputs.logits[:, 0].float())
