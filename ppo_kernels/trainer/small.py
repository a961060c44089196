"""A small GPT-2 and a word-level tokenizer, to be trained from scratch."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<bos>", "<eos>"


def word_tokenizer(texts: Iterable[str], words: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the commonest lower-case words and punctuation marks."""
    tokenizer = Tokenizer(WordLevel(unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"[a-z0-9]+(?:'[a-z]+)*|[^\sa-z0-9]"), behavior="removed", invert=True
    )
    trainer = WordLevelTrainer(
        vocab_size=words, special_tokens=[PAD, UNK, BOS, EOS], show_progress=False
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


def small_gpt2(
    tokenizer: PreTrainedTokenizerFast, *, width: int, layers: int, heads: int, positions: int
) -> GPT2LMHeadModel:
    """Return a GPT-2 with random weights for the tokenizer."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=positions,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
