"""Reward models from human feedback: preference pairs or ratings, and how well they agree."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ppo_kernels as pk
from ppo_kernels._files import atomic_folder
from ppo_kernels.trainer.config import Config, InputError, check_settings
from ppo_kernels.trainer.data import Row, load_rows
from ppo_kernels.trainer.feedback import Feedback, overlap, read_feedback, split_feedback
from ppo_kernels.trainer.model import load_tokenizer, resolve_device
from ppo_kernels.trainer.report import write_json
from ppo_kernels.trainer.reward_model import ModelReward, forward
from ppo_kernels.trainer.reward_report import Agreement, agreement, plot_calibration
from ppo_kernels.trainer.runs import StepLog, start_run


@dataclass(frozen=True)
class RewardConfig:
    """Settings of `ppo-kernels reward`: keys of its YAML file, overridden by `--key value`."""

    model: str | None = None
    """Folder of a causal language model or a sequence-classification model, with its tokenizer. A
    language model's head is replaced by a new one with one output."""
    tokenizer: str | None = None
    """Folder of the tokenizer, or 'module:name' of a callable that returns one; the model's folder
    when not given."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    device: str = "auto"
    """Torch device; 'auto' takes CUDA where there is one."""
    threads: int | None = None
    """CPU threads of torch; its own choice when not given. Small models are fastest with 1."""

    data: str | None = None
    """Preferences, with the columns 'chosen' and 'rejected', or ratings, with 'completion' and
    'rating', a number; either with a 'prompt' or without. .jsonl, .csv, .parquet or a saved
    dataset."""
    eval_data: str | None = None
    """Held-out data of the same form, which may share no prompt, or without prompts no text, with
    `data`; when not given, a part of `data` is held out."""
    eval_fraction: float = 0.15
    """The part that is held out: equal prompts, or without prompts equal texts, on one side."""
    objective: Literal["bradley-terry", "regression"] = "bradley-terry"
    """Bradley-Terry: a pair's log-odds are the difference of its scores. Of ratings, all pairs of a
    batch with the same prompt (or all without one) that are min_gap apart. Regression: the score is
    the rating."""
    min_gap: float = 0.5
    """Ratings closer than this make no pair, in training and in the held-out accuracy."""

    output_dir: str = "runs/reward"
    """Folder of all that the run writes."""
    overwrite: bool = False
    """Replace the run that output_dir already holds."""
    seed: int = 0
    """Of the head, split, order and dropout."""

    epochs: int = 3
    """Passes over the training data."""
    batch: int = 64
    """Texts per optimizer step; a preference pair has two."""
    lr: float = 1e-4
    """AdamW's peak learning rate, reached after a tenth of the steps."""
    weight_decay: float = 0.1
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Largest norm of a step's gradient."""

    def __post_init__(self) -> None:
        check_settings(
            self,
            {
                "an integer >= 2": ({"batch"}, lambda v: type(v) is int and v >= 2),
                "a number in (0, 1)": (
                    {"eval_fraction"},
                    lambda v: type(v) is float and 0 < v < 1,
                ),
                "a number > 0": (
                    {"min_gap"},
                    lambda v: type(v) in (int, float) and 0 < v < math.inf,
                ),
                "a string": ({"data", "eval_data"}, lambda v: isinstance(v, str) and v != ""),
            },
        )


class RewardResult(NamedTuple):
    """The reward model, ready to be a reward of `train`, and its agreement with held-out humans."""

    output_dir: Path
    reward: ModelReward
    agreement: Agreement


def train_reward(
    config: RewardConfig,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Sequence[Row] | None = None,
    eval_data: Sequence[Row] | None = None,
) -> RewardResult:
    """Train as `config` says; objects given here take the place of what it names."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = resolve_device(config.device)
    if model is None:
        model = _load_model(config)
    model.to(device=device, dtype=getattr(torch, config.dtype))  # type: ignore[call-arg]
    if tokenizer is None:
        tokenizer = load_tokenizer(Config(model=config.model, tokenizer=config.tokenizer))
    reward = ModelReward(model, tokenizer, f"{config.output_dir}/model")

    if data is None:
        if config.data is None:
            raise InputError("data: not given, and it has no default")
        data = load_rows(config.data, "data", "text")
    if eval_data is None and config.eval_data is not None:
        eval_data = load_rows(config.eval_data, "eval_data", "text")
    training = read_feedback(data, tokenizer, config.min_gap, "data")
    if eval_data is None:
        training, held_out = split_feedback(training, config.eval_fraction, config.seed)
    else:
        held_out = read_feedback(eval_data, tokenizer, config.min_gap, "eval_data")
        shared = overlap(training, held_out)
        if shared:
            raise InputError(
                f"eval_data: shares {len(shared)} prompts or texts with data, expected none; "
                f"one of them: {min(shared)!r}"
            )
    if training.is_pairs and config.objective == "regression":
        raise InputError("objective: given 'regression', which needs ratings; data has preferences")

    folder = start_run(config, ("log.jsonl", "summary.json", "calibration.png", "model"))
    fit(reward, training, config, folder)
    scores = reward.scores(reward.encoder(held_out.prompts, held_out.completions))
    agreed = agreement(scores, held_out, config.objective)
    with atomic_folder(folder / "model") as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    plot_calibration(agreed, config.objective, folder / "calibration.png")
    summary = {"training_texts": len(training.completions), **agreed.as_dict()}
    write_json(folder / "summary.json", summary)
    return RewardResult(folder, reward, agreed)


def _load_model(config: RewardConfig) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    if config.model is None:
        raise InputError("model: not given, and it has no default")
    if not any(Path(config.model).glob("*.safetensors")):
        raise InputError(
            f"model: given {config.model!r}, expected a folder with weights in safetensors"
        )
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # that the new head is new
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            config.model, num_labels=1, local_files_only=True, use_safetensors=True
        )
    finally:
        logging.set_verbosity(level)
    return model


def fit(reward: ModelReward, feedback: Feedback, config: RewardConfig, folder: Path) -> None:
    """Minimise the loss that the objective names."""
    model, encoder = reward.model, reward.encoder
    rows = encoder(feedback.prompts, feedback.completions)
    ratings = torch.tensor(feedback.ratings)
    groups = torch.tensor(feedback.groups)
    epochs = [list(batches(feedback, config.batch, config.seed + i)) for i in range(config.epochs)]
    steps = sum(len(epoch) for epoch in epochs)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=steps, pct_start=0.1
    )
    model.train()
    with StepLog(folder / "log.jsonl", steps, "reward model") as log:
        for index in (index for epoch in epochs for index in epoch):
            scores = forward(model, encoder, [rows[i] for i in index])
            wanted = ratings[index].to(scores.device)
            if config.objective == "regression":
                loss = nn.functional.mse_loss(scores, wanted)
            else:
                group = groups[index].to(scores.device)
                loss = bradley_terry_loss(scores, wanted, group, feedback.min_gap)
            loss.backward()
            norm = clip_grad_norm_(
                model.parameters(), config.max_grad_norm, error_if_nonfinite=True
            )
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            log.write({"loss": loss.item(), "grad_norm": norm.item()})
    model.eval()


def bradley_terry_loss(scores: Tensor, ratings: Tensor, groups: Tensor, min_gap: float) -> Tensor:
    r"""Mean of -log sigmoid(s_i - s_j) over the pairs of a group where i is rated min_gap higher.

    Bradley and Terry 1952; all pairs of a prompt at once as in Ouyang et al. 2022,
    arXiv:2203.02155, eq. 1. Scores, ratings and groups are [N]. Without a pair the loss is 0, with
    a zero gradient.
    """
    pairs = groups[:, None] == groups
    pairs &= ratings[:, None] - ratings >= min_gap
    return pk.masked_mean(-logsigmoid(scores[:, None] - scores), pairs)


def batches(feedback: Feedback, size: int, seed: int) -> Iterator[list[int]]:
    """Yield the indices of an epoch's batches; small groups stay whole, large ones are cut."""
    generator = torch.Generator().manual_seed(seed)
    members: dict[int, list[int]] = defaultdict(list)
    for i in torch.randperm(len(feedback.groups), generator=generator).tolist():
        members[feedback.groups[i]].append(i)
    pieces = [
        group[start : start + size]
        for group in members.values()
        for start in range(0, len(group), size)
    ]
    batch: list[int] = []
    for piece in (pieces[i] for i in torch.randperm(len(pieces), generator=generator).tolist()):
        if len(batch) + len(piece) > size:
            yield batch
            batch = []
        batch = batch + piece
    yield batch
