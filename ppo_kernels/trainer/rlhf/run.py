"""The chain: each step reads the files of those before and is a command of its own."""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from ppo_kernels.trainer.cli import parse_config
from ppo_kernels.trainer.config import Config, InputError, check_settings
from ppo_kernels.trainer.demo.data import Review, load_reviews
from ppo_kernels.trainer.demo.reward import vader
from ppo_kernels.trainer.demo.run import write_prompts
from ppo_kernels.trainer.evaluation import EvalConfig, evaluate_policy
from ppo_kernels.trainer.feedback import read_feedback
from ppo_kernels.trainer.fine_tuning import SFTConfig, sft
from ppo_kernels.trainer.ppo import train
from ppo_kernels.trainer.report import write_text
from ppo_kernels.trainer.reward import RewardConfig, train_reward
from ppo_kernels.trainer.reward_report import agreement
from ppo_kernels.trainer.rlhf.report import Chain, write_report

STEPS = ("sft", "reward", "ppo", "eval")
PLACE = "runs/rlhf"


@dataclass(frozen=True)
class RLHFConfig:
    """Settings of `ppo-kernels rlhf`: keys of its YAML file, overridden by `--key value`."""

    output_dir: str = PLACE
    """Folder of all that the run writes; its data, once downloaded, are used again."""
    settings: str | None = None
    """Folder with sft.yaml, reward.yaml, ppo.yaml and eval.yaml, in which runs/rlhf stands for
    output_dir; those of the package when not given."""
    held_out: int = 1500
    """Sentences that no step trains on."""
    seed: int = 0
    """Of the split and of every step."""

    def __post_init__(self) -> None:
        check_settings(
            self,
            {
                "an integer >= 1": ({"held_out"}, lambda v: type(v) is int and v >= 1),
                "a string": ({"settings"}, lambda v: isinstance(v, str) and v != ""),
            },
        )


def run(config: RLHFConfig) -> Path:
    """Run the chain in a folder that is cleared before, all but its data; return the report."""
    start = time.perf_counter()
    folder = Path(config.output_dir)
    arguments = _settings(config, folder)
    sft_config = parse_config(arguments["sft"], "sft", kind=SFTConfig)
    reward_config = parse_config(arguments["reward"], "reward", kind=RewardConfig)
    ppo_config = parse_config(arguments["ppo"], "ppo", kind=Config)
    eval_config = parse_config(arguments["eval"], "eval", kind=EvalConfig)

    reviews = distinct(load_reviews(folder / "data" / "movie_reviews.tsv"))
    if len(reviews) <= config.held_out:
        raise InputError(
            f"held_out: given {config.held_out}, expected fewer than the {len(reviews)} sentences"
        )
    order = torch.randperm(len(reviews), generator=torch.Generator().manual_seed(config.seed))
    shuffled = [reviews[i] for i in order.tolist()]
    held_out, training = shuffled[: config.held_out], shuffled[config.held_out :]
    write_data(folder / "data", training, held_out)
    print(
        f"1. {len(training)} sentences with human ratings to learn from, {len(held_out)} held out"
    )

    model = sft(sft_config)
    print(f"2. language model: perplexity {model.perplexity:.1f} on held-out sentences")

    reward = train_reward(reward_config)
    print(
        f"3. reward model: agrees with humans on {reward.agreement.accuracy:.1%} of "
        f"{reward.agreement.pairs} pairs of held-out sentences"
    )

    for name, sentences in (("prompts", training), ("prompts_held_out", held_out)):
        texts = [each.text for each in sentences]
        write_prompts(folder / "data" / f"{name}.txt", texts, str(model.output_dir / "model"))
    print("4. PPO; the reward is the reward model's score")
    train(ppo_config)

    evaluation = evaluate_policy(eval_config)
    print("5. evaluation on beginnings of held-out sentences")

    feedback = read_feedback(
        [{"completion": each.text, "rating": each.rating} for each in held_out],
        model.tokenizer,
        reward_config.min_gap,
        "held_out",
    )
    rules = torch.tensor(vader([""] * len(held_out), feedback.completions))
    return write_report(
        Chain(
            folder=folder,
            sentences=(len(training), len(held_out)),
            language_model=model,
            reward=reward,
            vader_agreement=agreement(rules, feedback, "bradley-terry").accuracy,
            evaluation=evaluation,
            seconds=time.perf_counter() - start,
        )
    )


def _settings(config: RLHFConfig, folder: Path) -> dict[str, list[str]]:
    """Write the settings of every step for this folder; return the arguments of its command."""
    source = Path(config.settings) if config.settings else files("ppo_kernels.trainer.rlhf")
    arguments: dict[str, list[str]] = {}
    for step in STEPS:
        try:
            text = (source / f"{step}.yaml").read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"settings: given {config.settings!r}, expected a folder with {step}.yaml: "
                f"{error.strerror}"
            ) from error
        path = folder / "settings" / f"{step}.yaml"
        write_text(path, text.replace(PLACE, str(folder)))
        arguments[step] = ["--config", str(path), "--overwrite=true", f"--seed={config.seed}"]
    return arguments


def distinct(reviews: Sequence[Review]) -> list[Review]:
    """Drop sentences that differ from another in case and blanks only: one side of the split."""
    found: dict[str, Review] = {}
    for review in reviews:
        found.setdefault(" ".join(review.text.split()).casefold(), review)
    return list(found.values())


def write_data(folder: Path, training: Sequence[Review], held_out: Sequence[Review]) -> None:
    """Write texts for the language model and ratings for the reward model."""
    for suffix, reviews in (("", training), ("_held_out", held_out)):
        _write_lines(folder / f"texts{suffix}.jsonl", ({"text": each.text} for each in reviews))
        _write_lines(
            folder / f"ratings{suffix}.jsonl",
            ({"completion": each.text, "rating": each.rating} for each in reviews),
        )


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
