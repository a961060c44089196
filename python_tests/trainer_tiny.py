"""A model, a tokenizer, prompts and a reward small enough to train in seconds."""

import random

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(12)]
PROMPTS = [{"prompt": " ".join(random.Random(i).choices(WORDS, k=1 + i % 4))} for i in range(32)]


def tokenizer():
    """Word level, with <pad>, <unk>, <bos> at the start and <eos>."""
    names = ["<pad>", "<unk>", "<bos>", "<eos>"]
    vocabulary = {word: i for i, word in enumerate(names + WORDS)}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    special = {f"{name[1:-1]}_token": name for name in names}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def model(seed=0, vocab_size=16, dropout=0.1):
    """A random GPT-2 with one layer; dropout as in the original."""
    torch.manual_seed(seed)
    settings = {name: dropout for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    settings |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=32, n_embd=32, n_layer=1, n_head=2, **settings
    )
    return GPT2LMHeadModel(config)


def reward(completions, **_):
    """Share of the longest completion's words that are w0."""
    return [completion.split().count("w0") / 8 for completion in completions]


async def async_reward(completions, **_):
    """The same as a coroutine."""
    return reward(completions)


def short_reward(completions, **_):
    """One score too few."""
    return [0.0] * (len(completions) - 1)


not_a_model = dict
