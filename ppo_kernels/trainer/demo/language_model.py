"""A tiny word-level language model, trained from scratch on the review sentences."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from torch.nn.utils import clip_grad_norm_
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import ppo_kernels as pk
from ppo_kernels._files import atomic_folder
from ppo_kernels.trainer.logs import progress_bar

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"


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
    tokenizer = build_tokenizer(texts, recipe)
    model = fit(tokenizer, texts, recipe)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2))
    return True


def build_tokenizer(texts: list[str], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the commonest lower-case words and punctuation marks."""
    tokenizer = Tokenizer(WordLevel(unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[a-z0-9]+(?:'[a-z]+)*|[^\sa-z0-9]"), behavior="removed", invert=True
    )
    trainer = WordLevelTrainer(
        vocab_size=recipe.words, special_tokens=[PAD, UNK, BOS, EOS], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=True,
    )


def fit(tokenizer: PreTrainedTokenizerFast, texts: list[str], recipe: Recipe) -> GPT2LMHeadModel:
    """Train from scratch to predict the next word; unknown words are never a target."""
    torch.manual_seed(recipe.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=recipe.width,
            n_layer=recipe.layers,
            n_head=recipe.heads,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rows = encode(tokenizer, texts, recipe.tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.lr, total_steps=recipe.steps, pct_start=0.1
    )
    with progress_bar(recipe.steps, "language model") as bar:
        for _ in range(recipe.steps):
            tokens = rows[torch.randint(len(rows), (recipe.batch,))]
            targets, live = tokens[:, 1:], tokens != tokenizer.pad_token_id
            wanted = live[:, 1:] & (targets != tokenizer.unk_token_id)
            logits = model(input_ids=tokens, attention_mask=live.long()).logits[:, :-1]
            logprobs = pk.logprobs_from_logits(logits, targets, mask=wanted)
            loss = -pk.masked_mean(logprobs, wanted)
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
            bar.update()
    return model.eval()


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> torch.Tensor:
    """Return `[N, length]`: each text from its begin to its end, padded on the right, or cut."""
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    rows = [[*ids, eos][:length] for ids in tokenizer(texts)["input_ids"]]
    return torch.tensor([row + [pad] * (length - len(row)) for row in rows])
