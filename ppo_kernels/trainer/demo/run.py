"""The demo from start to finish: data, language model, PPO, report."""

import time
from pathlib import Path

import torch
from tabulate import tabulate
from transformers import AutoTokenizer
from transformers.utils import logging

import ppo_kernels as pk
from ppo_kernels.trainer.config import Config, InputError
from ppo_kernels.trainer.demo.data import load_reviews
from ppo_kernels.trainer.demo.language_model import Recipe, ensure_language_model
from ppo_kernels.trainer.ppo import Result, train
from ppo_kernels.trainer.report import sample_table, write_text

HELD_OUT = 1500
PROMPT_WORDS = 3


def run(config: Config) -> None:
    """Prepare data and language model where they are missing, train, and print what came of it."""
    if config.model is None or config.prompts is None or config.eval_prompts is None:
        raise InputError("the demo needs model, prompts and eval_prompts; it makes what they name")
    start = time.perf_counter()
    logging.disable_progress_bar()
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    table = Path(config.prompts).with_name("movie_reviews.tsv")
    reviews = load_reviews(table)
    print(f"1. {len(reviews)} movie-review sentences with human ratings ({table}), for example:")
    for review in (reviews[0], reviews[2]):
        print(f"     {review.rating:+.1f}  {review.text}")

    order = torch.randperm(len(reviews), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [reviews[i].text for i in order]
    held_out, training = texts[:HELD_OUT], texts[HELD_OUT:]
    made = ensure_language_model(Path(config.model), training, Recipe())
    print(f"2. tiny word-level language model, {'trained' if made else 'reused'} ({config.model})")

    write_prompts(Path(config.prompts), training, config.model)
    write_prompts(Path(config.eval_prompts), held_out, config.model)
    print("3. PPO; the reward is VADER's compound score, from -1 (negative) to 1 (positive)")
    result = train(config)

    print_report(result, config.table_rows)
    print(f"{time.perf_counter() - start:.0f} s in all; everything is in {result.output_dir}")


def write_prompts(path: Path, texts: list[str], tokenizer_folder: str) -> None:
    """Write the beginnings of the texts, those without unknown words, one a line."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    beginnings = [ids[1 : 1 + PROMPT_WORDS] for ids in tokenizer(texts)["input_ids"]]
    known = [ids for ids in beginnings if tokenizer.unk_token_id not in ids]
    write_text(path, "".join(f"{text}\n" for text in tokenizer.batch_decode(known)))


def print_report(result: Result, rows: int) -> None:
    """Print rewards, samples, speed, and which backend served each op."""
    if result.before is not None and result.after is not None:
        print(sample_table(result.before, result.after, rows, markdown=False))
        print(
            f"mean reward of {len(result.after.scores)} fresh samples: "
            f"{result.before.mean:.3f} before, {result.after.mean:.3f} after"
        )
    served = [[op, backend, calls] for (op, backend), calls in sorted(pk.op_counts().items())]
    print(tabulate(served, ["op", "backend", "calls"], tablefmt="simple"))
    print(f"{result.tokens_per_second:.0f} tokens/s sampled and trained on")
    print(f"reward curve: {result.output_dir / 'reward.png'}")
    print(f"samples:      {result.output_dir / 'samples.md'}")
    print(f"policy:       {result.output_dir / 'policy'}")
