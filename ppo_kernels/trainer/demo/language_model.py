"""A tiny word-level language model, trained from scratch on the review sentences."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from ppo_kernels._files import atomic_folder
from ppo_kernels.trainer import fine_tuning
from ppo_kernels.trainer.runs import StepLog
from ppo_kernels.trainer.small import small_gpt2, word_tokenizer


@dataclass(frozen=True)
class Recipe:
    """What the model is made of; a cached model with another recipe is not used."""

    words: int = 3000
    width: int = 128
    layers: int = 2
    heads: int = 4
    tokens: int = 24
    """Longest training text, its begin and end included."""
    steps: int = 600
    batch: int = 64
    lr: float = 2e-3
    seed: int = 0


def ensure_language_model(folder: Path, texts: list[str], recipe: Recipe) -> bool:
    """Train the model into `folder` unless the folder holds it already; return whether it did."""
    made_by = folder / "recipe.json"
    if made_by.exists() and json.loads(made_by.read_text()) == asdict(recipe):
        return False
    tokenizer = word_tokenizer(texts, recipe.words)
    model = fit(tokenizer, texts, recipe)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2))
    return True


def fit(tokenizer: PreTrainedTokenizerFast, texts: list[str], recipe: Recipe) -> GPT2LMHeadModel:
    """Train from scratch to predict the next word."""
    torch.manual_seed(recipe.seed)
    sizes = {"width": recipe.width, "layers": recipe.layers, "heads": recipe.heads}
    model = small_gpt2(tokenizer, positions=64, **sizes)
    examples = fine_tuning.encode(
        [{"text": text} for text in texts], tokenizer, recipe.tokens, "texts"
    )
    settings = fine_tuning.SFTConfig(
        steps=recipe.steps,
        batch=recipe.batch,
        micro_batch=recipe.batch,
        lr=recipe.lr,
        seed=recipe.seed,
    )
    with StepLog(None, recipe.steps, "language model") as log:
        fine_tuning.fit(model, tokenizer, examples, settings, log)
    return model
