"""Supervised fine-tuning: next-token prediction on texts, or on completions of prompts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_kernels._files import atomic_folder
from ppo_kernels.trainer.config import Config, InputError, check_settings
from ppo_kernels.trainer.data import Row, load_rows, render_conversation, shuffled_batches
from ppo_kernels.trainer.model import load_policy, load_tokenizer, resolve_device
from ppo_kernels.trainer.report import write_json
from ppo_kernels.trainer.runs import StepLog, start_run
from ppo_kernels.trainer.scorer import Scorer
from ppo_kernels.trainer.small import small_gpt2, word_tokenizer


@dataclass(frozen=True)
class SFTConfig:
    """Settings of `ppo-kernels sft`: keys of its YAML file, overridden by `--key value`."""

    model: str | None = None
    """Folder of a saved causal language model, or 'module:name' (or 'file.py:name') of a callable
    that returns one. When not given, a GPT-2 of the sizes below is trained from scratch on the
    commonest words of the texts."""
    model_class: str = "transformers:AutoModelForCausalLM"
    """'module:Class' whose from_pretrained loads the model folder."""
    tokenizer: str | None = None
    """Folder of the tokenizer, or 'module:name' of a callable that returns one; the model's folder
    when not given."""
    words: int = 3000
    """Words of a model from scratch."""
    width: int = 128
    """Hidden size of a model from scratch."""
    layers: int = 2
    """Layers of a model from scratch."""
    heads: int = 4
    """Attention heads of a model from scratch, a divisor of width."""
    positions: int = 64
    """Longest sequence of a model from scratch, prompt and completion together."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    device: str = "auto"
    """Torch device; 'auto' takes CUDA where there is one."""
    threads: int | None = None
    """CPU threads of torch; its own choice when not given. Small models are fastest with 1."""

    data: str | None = None
    """Text file with one text a line; or .jsonl, .csv, .parquet or a saved dataset with a column
    'text', or 'prompt' and 'completion', or 'messages', whose last one is the completion. Of
    prompts nothing is learnt."""
    eval_data: str | None = None
    """Data of the same form for the perplexity; when not given, a part of `data` is held out."""
    eval_fraction: float = 0.05
    """The part that is held out: every text with the same prompt, or the same text, on one side."""
    max_tokens: int = 512
    """Longer examples are cut."""

    output_dir: str = "runs/sft"
    """Folder of all that the run writes."""
    overwrite: bool = False
    """Replace the run that output_dir already holds."""
    seed: int = 0
    """Of weights, split, order and dropout."""

    steps: int = 600
    """Optimizer steps."""
    batch: int = 64
    """Examples per optimizer step."""
    micro_batch: int = 64
    """Examples per forward and backward pass. Smaller saves memory and does not change the loss."""
    lr: float = 2e-5
    """AdamW's peak learning rate, reached after a tenth of the steps. From scratch: about 2e-3."""
    weight_decay: float = 0.1
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Largest norm of a step's gradient."""

    def __post_init__(self) -> None:
        check_settings(
            self,
            {
                "an integer >= 1": (
                    {"words", "width", "layers", "heads", "positions", "max_tokens", "batch"},
                    lambda v: type(v) is int and v >= 1,
                ),
                "a number in (0, 1)": (
                    {"eval_fraction"},
                    lambda v: type(v) is float and 0 < v < 1,
                ),
                "a string": ({"data", "eval_data"}, lambda v: isinstance(v, str) and v != ""),
            },
        )
        if self.width % self.heads:
            raise InputError(f"heads: given {self.heads}, expected a divisor of width={self.width}")


class Example(NamedTuple):
    """A tokenized text; the tokens from `first` on are learnt."""

    tokens: list[int]
    first: int


class SFTResult(NamedTuple):
    """The trained model and its perplexity on held-out examples, before and after."""

    output_dir: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    perplexity_before: float
    perplexity: float


def sft(
    config: SFTConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Sequence[Row] | None = None,
    eval_data: Sequence[Row] | None = None,
) -> SFTResult:
    """Train as `config` says; objects given here take the place of what it names.

    A model given here is trained in place.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = resolve_device(config.device)
    if data is None:
        if config.data is None:
            raise InputError("data: not given, and it has no default")
        data = load_rows(config.data, "data", "text")
    if eval_data is None and config.eval_data is not None:
        eval_data = load_rows(config.eval_data, "eval_data", "text")
    check_rows(data, "data")
    if eval_data is None:
        data, eval_data = split_rows(data, config.eval_fraction, config.seed)
    check_rows(eval_data, "eval_data")

    model, tokenizer = _model_and_tokenizer(config, model, tokenizer, data)
    model.to(device=device, dtype=getattr(torch, config.dtype))  # type: ignore[call-arg]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = min(config.max_tokens, limit or config.max_tokens)
    examples = encode(data, tokenizer, longest, "data")
    held_out = encode(eval_data, tokenizer, longest, "eval_data")

    folder = start_run(config, ("log.jsonl", "summary.json", "model"))
    before = perplexity(model, tokenizer, held_out, config.micro_batch)
    with StepLog(folder / "log.jsonl", config.steps, "sft") as log:
        fit(model, tokenizer, examples, config, log)
    after = perplexity(model, tokenizer, held_out, config.micro_batch)
    with atomic_folder(folder / "model") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    summary = {
        "examples": len(examples),
        "held_out": len(held_out),
        "perplexity_before": before,
        "perplexity": after,
    }
    write_json(folder / "summary.json", summary)
    return SFTResult(folder, model, tokenizer, before, after)


def _model_and_tokenizer(
    config: SFTConfig,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Sequence[Row],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if model is None and config.model is None:
        if tokenizer is not None or config.tokenizer is not None:
            raise InputError("tokenizer: a model from scratch makes its own; expected none")
        words = word_tokenizer((text for row in data for text in _texts(row)), config.words)
        sizes = {"width": config.width, "layers": config.layers, "heads": config.heads}
        return small_gpt2(words, positions=config.positions, **sizes), words
    source = Config(model=config.model, model_class=config.model_class, tokenizer=config.tokenizer)
    return model or load_policy(source), tokenizer or load_tokenizer(source)


FORMS = ({"text"}, {"prompt", "completion"}, {"messages"})


def check_rows(rows: Sequence[Row], key: str) -> None:
    """Raise InputError unless every row has one of the forms."""
    if not rows:
        raise InputError(f"{key}: given no text, expected at least one")
    for number, row in enumerate(rows, 1):
        form = next((form for form in FORMS if form <= set(row)), None)
        if form is None:
            raise InputError(
                f"{key}: row {number} has the columns {sorted(row)}, expected 'text', or 'prompt' "
                "and 'completion', or 'messages'"
            )
        if form != {"messages"}:
            for name in form:
                if not isinstance(row[name], str):
                    raise InputError(f"{key}: row {number} has no text under {name!r}: {row!r}")
        elif not row["messages"] or not isinstance(row["messages"], list):
            raise InputError(f"{key}: row {number} has no messages: {row!r}")


def _texts(row: Row) -> list[str]:
    if "text" in row:
        return [row["text"]]
    if "messages" in row:
        return [message["content"] for message in row["messages"]]
    return [row["prompt"], row["completion"]]


def split_rows(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Return training and held-out rows; equal prompts, or equal texts, are on one side."""
    key_of = [_normal(row["prompt"] if "prompt" in row else _texts(row)[0]) for row in rows]
    keys = sorted(set(key_of))
    count = max(1, round(fraction * len(keys)))
    if count >= len(keys):
        raise InputError(f"data: given {len(keys)} different texts, too few to hold some out")
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
    out = {keys[i] for i in order[:count]}
    return (
        [row for row, key in zip(rows, key_of, strict=True) if key not in out],
        [row for row, key in zip(rows, key_of, strict=True) if key in out],
    )


def _normal(text: str) -> str:
    return " ".join(text.split()).casefold()


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, longest: int, key: str
) -> list[Example]:
    """Tokenize rows; prompts on their own, as they are in sampling, and the end after all."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if all("text" in row for row in rows):
        texts = tokenizer([row["text"] for row in rows])["input_ids"]
        return [Example([*ids, *end][:longest], 1) for ids in texts]
    prompts, completions = zip(
        *(_parts(row, tokenizer, f"{key}: row {number}") for number, row in enumerate(rows, 1)),
        strict=True,
    )
    before = tokenizer(list(prompts))["input_ids"]
    after = tokenizer(list(completions), add_special_tokens=False)["input_ids"]
    examples = []
    for number, (given, learnt) in enumerate(zip(before, after, strict=True), 1):
        if not 1 <= len(given) < longest:
            raise InputError(
                f"{key}: row {number} has a prompt of {len(given)} tokens, expected 1 to "
                f"{longest - 1}, so that a completion fits"
            )
        examples.append(Example([*given, *learnt, *end][:longest], len(given)))
    return examples


def _parts(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, str]:
    if "messages" in row:
        *given, last = row["messages"]
        return render_conversation(given, tokenizer, where), last["content"]
    return row.get("prompt", ""), row.get("completion", row.get("text", ""))


class Batch(NamedTuple):
    """Examples padded on the right, and which of the tokens after the first are learnt."""

    tokens: Tensor
    live: Tensor
    wanted: Tensor


def collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Pad examples; unknown words are never learnt, or the model would say them."""
    width = max(2, *(len(example.tokens) for example in examples))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    tokens = torch.full((len(examples), width), pad)
    live, wanted = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    for i, (ids, first) in enumerate(examples):
        tokens[i, : len(ids)] = torch.tensor(ids)
        live[i, : len(ids)] = 1
        wanted[i, first : len(ids)] = True
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
        wanted &= tokens != tokenizer.unk_token_id
    return Batch(tokens, live, wanted[:, 1:])


def token_logprobs(scorer: Scorer, batch: Batch) -> Tensor:
    """Return the log-probabilities of the tokens after the first, 0 where none is wanted."""
    tokens, live, wanted = (part.to(scorer.policy.device) for part in batch)
    states, _ = scorer.states(tokens, live, tokens.shape[1] - 1)
    return scorer.logprobs(states, tokens[:, 1:], mask=wanted)


@torch.no_grad()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    batch: int,
) -> float:
    """Return exp of the mean negative log-probability of all learnt tokens."""
    scorer = _scorer(model)
    total, count = 0.0, 0
    for start in range(0, len(examples), batch):
        part = collate(examples[start : start + batch], tokenizer)
        total -= float(token_logprobs(scorer, part).sum())
        count += int(part.wanted.sum())
    return math.exp(min(total / max(count, 1), 700.0))


def _scorer(model: PreTrainedModel) -> Scorer:
    model.eval()  # the scorer tries whether logits follow from hidden states: without dropout
    return Scorer(model, torch.empty(0, dtype=torch.long, device=model.device))


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: SFTConfig,
    log: StepLog,
) -> None:
    """Minimise the mean negative log-probability of a batch's learnt tokens."""
    scorer = _scorer(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.steps, pct_start=0.1
    )
    batches = shuffled_batches(examples, config.batch, config.seed)
    model.train()
    for _ in range(config.steps):
        chosen = next(batches)
        parts = [
            collate(chosen[start : start + config.micro_batch], tokenizer)
            for start in range(0, len(chosen), config.micro_batch)
        ]
        count = max(1, sum(int(part.wanted.sum()) for part in parts))
        loss = 0.0
        for part in parts:
            part_loss = -token_logprobs(scorer, part).sum() / count
            part_loss.backward()
            loss += part_loss.item()
        norm = clip_grad_norm_(model.parameters(), config.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        log.write({"loss": loss, "grad_norm": norm.item()})
    model.eval()
