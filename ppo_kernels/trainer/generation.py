"""Sampling completions of prompts with a trained policy."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_kernels.trainer.config import Config, InputError, check_settings
from ppo_kernels.trainer.data import Row, check_prompts, load_prompts, render_prompts
from ppo_kernels.trainer.model import (
    check_positions,
    load_policy,
    load_tokenizer,
    resolve_device,
)
from ppo_kernels.trainer.report import write_text
from ppo_kernels.trainer.rollout import Sampler


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of `ppo-kernels generate`: keys of its YAML file, overridden by `--key value`."""

    model: str | None = None
    """Folder of a saved causal language model, or 'module:name' (or 'file.py:name') of a callable
    that returns one."""
    model_class: str = "transformers:AutoModelForCausalLM"
    """'module:Class' whose from_pretrained loads the model folder."""
    tokenizer: str | None = None
    """Folder of the tokenizer, or 'module:name' of a callable that returns one; the model's folder
    when not given."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    device: str = "auto"
    """Torch device; 'auto' takes CUDA where there is one."""
    threads: int | None = None
    """CPU threads of torch; its own choice when not given. Small models are fastest with 1."""

    prompts: str | None = None
    """Text file with one prompt a line; or .jsonl, .csv, .parquet or a saved dataset with a column
    'prompt', a text or a list of messages."""
    max_prompt_tokens: int = 512
    """Longer prompts are refused, never cut."""
    samples_per_prompt: int = 1
    """Completions of each prompt."""
    max_new_tokens: int = 32
    """Longest completion, its end-of-sequence token included."""
    temperature: float = 1.0
    """Of sampling."""
    stop: list[str] | None = None
    """Strings that end a completion; its text ends before them."""
    forbidden_tokens: list[str] | None = None
    """Tokens never sampled; when not given, the tokenizer's special tokens other than the end of a
    sequence."""
    batch: int = 64
    """Completions sampled at a time."""
    seed: int = 0
    """The same seed repeats the completions on the same machine and thread count."""
    output: str | None = None
    """File of the completions, .jsonl; standard output when not given."""
    overwrite: bool = False
    """Replace the file that is there already."""

    def __post_init__(self) -> None:
        check_settings(
            self,
            {
                "an integer >= 1": (
                    {"samples_per_prompt", "batch"},
                    lambda v: type(v) is int and v >= 1,
                ),
                "a string": ({"output"}, lambda v: isinstance(v, str) and v != ""),
            },
        )


class Completion(NamedTuple):
    """One sampled completion, and whether it came to its end by itself."""

    row: Row
    completion: str
    ended: bool


def generate(
    config: GenerateConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[Row] | None = None,
) -> list[Completion]:
    """Sample as `config` says; objects given here take the place of what it names."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.output and Path(config.output).exists() and not config.overwrite:
        raise InputError(
            f"output: given {config.output!r}, which exists; expected a new one, or overwrite: true"
        )
    torch.manual_seed(config.seed)
    for key, given in (("model", model), ("prompts", prompts)):
        if given is None and getattr(config, key) is None:
            raise InputError(f"{key}: not given, and it has no default")
    source = policy_source(config)
    tokenizer = tokenizer or load_tokenizer(source)
    rows = render_prompts(
        load_prompts(str(config.prompts)) if prompts is None else prompts, tokenizer
    )
    longest = check_prompts(rows, tokenizer, config.max_prompt_tokens)
    policy = model or load_policy(source)
    policy.to(  # type: ignore[call-arg]
        device=resolve_device(config.device), dtype=getattr(torch, config.dtype)
    )
    check_positions(policy, longest, config.max_new_tokens)
    sampler = Sampler(policy.eval(), tokenizer, source)
    repeated = [row for row in rows for _ in range(config.samples_per_prompt)]
    found: list[Completion] = []
    for start in range(0, len(repeated), config.batch):
        batch = repeated[start : start + config.batch]
        rollout = sampler([row["prompt"] for row in batch])
        for row, text, ended in zip(
            batch, rollout.completions, rollout.ended.tolist(), strict=True
        ):
            found.append(Completion(row, text, ended))
    if config.output:
        write_text(Path(config.output), as_lines(found))
    return found


def policy_source(config: Any) -> Config:
    """Return the settings of a model and of sampling from it, as loader and sampler take them."""
    return Config(
        model=config.model,
        model_class=config.model_class,
        tokenizer=config.tokenizer,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop=config.stop,
        forbidden_tokens=config.forbidden_tokens,
    )


def as_lines(completions: Sequence[Completion]) -> str:
    """Return one JSON object a line: the row's columns, 'completion' and 'ended'."""
    rows = ({**one.row, "completion": one.completion, "ended": one.ended} for one in completions)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
