"""Evaluating a policy beside its reference: rewards, KL, perplexity, variety, references."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tabulate import tabulate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppo_kernels.trainer.config import InputError, check_settings
from ppo_kernels.trainer.data import (
    Row,
    check_prompts,
    load_prompts,
    load_rows,
    render_prompts,
)
from ppo_kernels.trainer.fine_tuning import check_rows, encode, perplexity
from ppo_kernels.trainer.generation import policy_source
from ppo_kernels.trainer.model import (
    check_positions,
    load_policy,
    load_tokenizer,
    resolve_device,
)
from ppo_kernels.trainer.report import write_json, write_text
from ppo_kernels.trainer.rewards import (
    RewardFunction,
    Weighted,
    load_reward,
    reward_name,
    score,
)
from ppo_kernels.trainer.rollout import Rollout, Sampler
from ppo_kernels.trainer.runs import start_run
from ppo_kernels.trainer.scorer import Scorer
from ppo_kernels.trainer.text_metrics import Mean, bleu, distinct_n, rouge


@dataclass(frozen=True)
class EvalConfig:
    """Settings of `ppo-kernels eval`: keys of its YAML file, overridden by `--key value`."""

    model: str | None = None
    """Folder of the policy, or 'module:name' (or 'file.py:name') of a callable that returns one."""
    reference: str | None = None
    """Folder or callable of the model that it started from, evaluated on the same prompts; the
    divergence is from it. None: the policy alone."""
    model_class: str = "transformers:AutoModelForCausalLM"
    """'module:Class' whose from_pretrained loads the model folders."""
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
    'prompt', a text or a list of messages. With a column 'reference', ROUGE and BLEU are computed
    against it."""
    max_prompt_tokens: int = 512
    """Longer prompts are refused, never cut."""
    reward: dict[str, float] | str | None = None
    """As in `ppo-kernels train`. Of several, the weighted sum and each are reported; one with the
    weight 0 is reported only."""
    texts: str | None = None
    """Texts for the perplexity, of the form of the data of `ppo-kernels sft`; none when not
    given."""
    max_tokens: int = 512
    """Longer texts are cut."""

    samples: int = 512
    """Completions sampled of each model; prompts are taken in turn."""
    max_new_tokens: int = 32
    """Longest completion, its end-of-sequence token included."""
    temperature: float = 1.0
    """Of sampling, and of the log-probabilities in the divergence."""
    stop: list[str] | None = None
    """Strings that end a completion; its text ends before them."""
    forbidden_tokens: list[str] | None = None
    """Tokens never sampled; when not given, the tokenizer's special tokens other than the end of a
    sequence."""
    batch: int = 64
    """Completions, or texts, at a time."""
    seed: int = 0
    """The same seed repeats the evaluation on the same machine and thread count."""

    output_dir: str = "runs/eval"
    """Folder of metrics.json, report.md and samples.jsonl."""
    overwrite: bool = False
    """Replace the evaluation that output_dir already holds."""
    table_rows: int = 8
    """Rows of the table of samples."""

    def __post_init__(self) -> None:
        check_settings(
            self,
            {
                "an integer >= 1": (
                    {"samples", "batch", "max_tokens"},
                    lambda v: type(v) is int and v >= 1,
                ),
                "a string": ({"reference", "texts"}, lambda v: isinstance(v, str) and v != ""),
            },
        )


class Sampled(NamedTuple):
    """One model's completions of the prompts, with what was measured of each."""

    completions: list[str]
    ended: list[bool]
    lengths: list[int]
    rewards: dict[str, list[float]]
    kl: list[float] | None


class Evaluation(NamedTuple):
    """Metrics by name, of the policy and, if there is one, of the reference."""

    output_dir: Path
    policy: dict[str, Mean | float]
    reference: dict[str, Mean | float] | None


def evaluate_policy(
    config: EvalConfig,
    *,
    model: PreTrainedModel | None = None,
    reference: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    prompts: Sequence[Row] | None = None,
    reward: RewardFunction | None = None,
    texts: Sequence[Row] | None = None,
) -> Evaluation:
    """Evaluate as `config` says; objects given here take the place of what it names."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = resolve_device(config.device)
    for key, given in (("model", model), ("prompts", prompts)):
        if given is None and getattr(config, key) is None:
            raise InputError(f"{key}: not given, and it has no default")
    source = policy_source(config)
    tokenizer = tokenizer or load_tokenizer(source)
    rows = render_prompts(
        load_prompts(str(config.prompts)) if prompts is None else prompts, tokenizer
    )
    longest = check_prompts(rows, tokenizer, config.max_prompt_tokens)
    rows = [rows[i % len(rows)] for i in range(config.samples)]
    if reward is None and config.reward is not None:
        reward = load_reward(config.reward, device)
    if texts is None and config.texts is not None:
        texts = load_rows(config.texts, "texts", "text")
    if texts is not None:
        check_rows(texts, "texts")

    models = {"policy": model or load_policy(source)}
    if reference is not None or config.reference is not None:
        models["reference"] = reference or load_policy(
            policy_source(replace(config, model=config.reference))
        )
    for each in models.values():
        each.to(device=device, dtype=getattr(torch, config.dtype))  # type: ignore[call-arg]
        check_positions(each.eval(), longest, config.max_new_tokens)

    folder = start_run(config, ("metrics.json", "report.md", "samples.jsonl"))
    rewards = _rewards(reward)
    samples = {
        name: _sample(each, models.get("reference"), tokenizer, rows, rewards, config)
        for name, each in models.items()
    }
    metrics = {
        name: _metrics(models[name], tokenizer, rows, samples[name], texts, config)
        for name in models
    }
    result = Evaluation(folder, metrics["policy"], metrics.get("reference"))
    write_json(folder / "metrics.json", {name: _plain(each) for name, each in metrics.items()})
    write_text(folder / "samples.jsonl", _sample_lines(rows, samples))
    write_text(folder / "report.md", _report(config, metrics, rows, samples))
    return result


def _rewards(reward: RewardFunction | None) -> dict[str, RewardFunction]:
    """Return the reward and, of several, its parts, by name."""
    if reward is None:
        return {}
    if not isinstance(reward, Weighted):
        return {reward_name(reward): reward}
    parts = {reward_name(part): part for part, _ in reward.parts}
    counted = sum(weight != 0 for _, weight in reward.parts)
    return {"weighted sum": reward, **parts} if counted > 1 else parts


def _sample(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    rewards: Mapping[str, RewardFunction],
    config: EvalConfig,
) -> Sampled:
    sampler = Sampler(model, tokenizer, policy_source(config))
    forbidden = torch.tensor(sampler.forbidden, dtype=torch.long, device=model.device)
    pair = None
    if reference is not None and model is not reference:
        pair = Scorer(model, forbidden), Scorer(reference, forbidden)
    completions: list[str] = []
    ended: list[bool] = []
    lengths: list[int] = []
    kl: list[float] = []
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for start in range(0, len(rows), config.batch):
            rollout = sampler([row["prompt"] for row in rows[start : start + config.batch]])
            completions += rollout.completions
            ended += rollout.ended.tolist()
            lengths += rollout.response_mask.sum(-1).tolist()
            if pair:
                kl += _divergence(*pair, rollout, config.temperature)
    scores = {name: score(each, rows, completions).tolist() for name, each in rewards.items()}
    return Sampled(completions, ended, lengths, scores, kl if pair else None)


@torch.no_grad()
def _divergence(
    policy: Scorer, reference: Scorer, rollout: Rollout, temperature: float
) -> list[float]:
    """Return log p / p_ref of each completion, whose mean over samples of p is the divergence."""
    mask = rollout.response_mask
    logprobs = [
        scorer.logprobs(
            scorer.states(rollout.sequences, rollout.attention_mask, mask.shape[1])[0],
            rollout.responses,
            mask=mask,
            temperature=temperature,
        )
        for scorer in (policy, reference)
    ]
    return (logprobs[0] - logprobs[1]).sum(-1).tolist()


def _metrics(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    sampled: Sampled,
    texts: Sequence[Row] | None,
    config: EvalConfig,
) -> dict[str, Mean | float]:
    found: dict[str, Mean | float] = {
        f"reward, {name}": Mean.of(values) for name, values in sampled.rewards.items()
    }
    if sampled.kl is not None:
        found["KL to reference, nats per completion"] = Mean.of(sampled.kl)
    if texts is not None:
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = min(config.max_tokens, limit or config.max_tokens)
        examples = encode(texts, tokenizer, longest, "texts")
        found["perplexity of the texts"] = perplexity(model, tokenizer, examples, config.batch)
    for n in (1, 2, 3):
        found[f"distinct-{n}"] = distinct_n(sampled.completions, n)
    found["tokens per completion"] = Mean.of(sampled.lengths)
    found["share that ended by itself"] = Mean.of([float(ended) for ended in sampled.ended])
    if "reference" in rows[0]:
        references = [str(row["reference"]) for row in rows]
        found |= {
            f"{name} F1": mean for name, mean in rouge(sampled.completions, references).items()
        }
        found["BLEU"] = bleu(sampled.completions, references)
    return found


def _plain(metrics: Mapping[str, Mean | float]) -> dict[str, Any]:
    return {
        name: value._asdict() if isinstance(value, Mean) else value
        for name, value in metrics.items()
    }


def _sample_lines(rows: Sequence[Row], samples: Mapping[str, Sampled]) -> str:
    lines = []
    for i, row in enumerate(rows):
        for name, sampled in samples.items():
            rewards = {key: values[i] for key, values in sampled.rewards.items()}
            line = {
                "prompt": row["prompt"],
                "model": name,
                "completion": sampled.completions[i],
                "ended": sampled.ended[i],
                "rewards": rewards,
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _report(
    config: EvalConfig,
    metrics: Mapping[str, Mapping[str, Mean | float]],
    rows: Sequence[Row],
    samples: Mapping[str, Sampled],
) -> str:
    """Return metrics and samples as Markdown; intervals are 95 %."""
    names = list(samples)
    figures = [
        [metric, *(_cell(metrics[name].get(metric)) for name in names)]
        for metric in metrics["policy"]
    ]
    table = tabulate(figures, ["metric", *names], tablefmt="github", disable_numparse=True)
    shown = [
        [
            _one_line(row["prompt"]),
            *(
                cell
                for name in names
                for cell in (
                    _one_line(samples[name].completions[i]),
                    *(f"{values[i]:.2f}" for values in samples[name].rewards.values()),
                )
            ),
        ]
        for i, row in enumerate(rows[: config.table_rows])
    ]
    headers = ["prompt"]
    for name in names:
        headers += [name, *samples[name].rewards]
    examples = tabulate(shown, headers, tablefmt="github", disable_numparse=True)
    return (
        f"# Evaluation of {config.model or 'the policy'}\n\n{len(rows)} samples of each model at "
        f"temperature {config.temperature:g}; ± is a 95 % confidence interval.\n\n{table}\n\n"
        f"## Samples\n\n{examples}\n"
    )


def _cell(value: Mean | float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, Mean) else f"{value:.3f}"


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
