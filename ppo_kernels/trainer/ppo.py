"""The training loop: sample, score, estimate advantages, update; read it from top to bottom."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ppo_kernels as pk
from ppo_kernels.trainer.config import Config, InputError
from ppo_kernels.trainer.data import Row, check_prompts, load_prompts, shuffled_batches
from ppo_kernels.trainer.evaluate import Samples, evaluate
from ppo_kernels.trainer.experience import Experience, make_experience
from ppo_kernels.trainer.logs import RunLog, prepare_output
from ppo_kernels.trainer.model import (
    ActorCritic,
    check_positions,
    frozen_copy,
    load_policy,
    load_tokenizer,
    resolve_device,
)
from ppo_kernels.trainer.objects import import_object
from ppo_kernels.trainer.report import (
    export,
    plot_rewards,
    sample_table,
    write_json,
    write_text,
)
from ppo_kernels.trainer.rewards import RewardFunction, score
from ppo_kernels.trainer.rollout import Sampler
from ppo_kernels.trainer.scorer import Scorer

RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Result:
    """What a run gained and where it left its files."""

    output_dir: Path
    before: Samples | None
    after: Samples | None
    tokens_per_second: float


class Update(NamedTuple):
    """What one minibatch tells about itself."""

    entropy: Tensor
    policy: pk.PolicyMetrics
    value: pk.ValueMetrics


def train(
    config: Config,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward: RewardFunction | None = None,
    prompts: Sequence[Row] | None = None,
    eval_prompts: Sequence[Row] | None = None,
) -> Result:
    """Run PPO as `config` says; objects given here take the place of what it names.

    A model given here is trained in place.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = resolve_device(config.device)

    for key, given in (("model", model), ("prompts", prompts), ("reward", reward)):
        if given is None and getattr(config, key) is None:
            raise InputError(f"{key}: not given, and it has no default")
    tokenizer = tokenizer or load_tokenizer(config)
    if prompts is None:
        prompts = load_prompts(str(config.prompts))
    longest = check_prompts(prompts, tokenizer, config.max_prompt_tokens)
    if eval_prompts is None:
        eval_prompts = prompts
        if config.eval_prompts is not None:
            eval_prompts = load_prompts(config.eval_prompts, "eval_prompts")
    longest_eval = check_prompts(eval_prompts, tokenizer, config.max_prompt_tokens, "eval_prompts")
    reward = reward or import_object(str(config.reward), "reward")

    policy = model or load_policy(config)
    policy.to(device=device, dtype=getattr(torch, config.dtype))  # type: ignore[call-arg]
    check_positions(policy, max(longest, longest_eval), config.max_new_tokens)
    sampler = Sampler(policy, tokenizer, config)
    actor = ActorCritic(policy, sampler.forbidden, config.separate_value_model)
    reference = Scorer(frozen_copy(policy), actor.forbidden)
    head = list(actor.value_head.parameters())
    trunks = [p for name, p in actor.named_parameters() if not name.startswith("value_head")]
    optimizer = torch.optim.AdamW(
        [{"params": trunks, "lr": config.lr}, {"params": head, "lr": config.value_lr}],
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    total = config.steps * config.epochs * (config.rollouts // config.minibatch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: 1 - done / total if config.lr_decay else 1.0
    )
    controller = KLController(config)
    batches = shuffled_batches(prompts, config.rollouts, config.seed)
    shuffle = torch.Generator().manual_seed(config.seed)
    tokens, seconds = 0, 0.0

    folder = prepare_output(config)
    write_json(folder / "config.json", asdict(config))
    before = evaluate(sampler, reward, eval_prompts, config)
    with RunLog(folder, config.steps) as log:
        for step in range(config.steps):
            start, lr = time.perf_counter(), float(schedule.get_last_lr()[0])

            # Sample completions and score them.
            rows = next(batches)
            rollout = sampler([row["prompt"] for row in rows])
            scores = score(reward, rows, rollout.completions).to(device)
            sampled = time.perf_counter()

            # Log-probabilities, KL-shaped rewards, advantages and returns.
            experience, kl = make_experience(
                actor, reference, rollout, scores, kl_coef=controller.coef, config=config
            )

            # Several epochs of minibatches; a minibatch is one optimizer step, in micro-batches
            # whose losses share the minibatch's denominators.
            updates: list[Update] = []
            norms: list[Tensor] = []
            for _ in range(config.epochs):
                order = torch.randperm(config.rollouts, generator=shuffle)
                for index in order.split(config.minibatch):
                    minibatch = experience.rows(index.to(device))
                    update = accumulate_gradients(actor, minibatch, config)
                    if step == 0 and not updates:
                        check_ratio(update.policy, policy.dtype)
                    norm = clip_grad_norm_(
                        actor.parameters(), config.max_grad_norm, error_if_nonfinite=True
                    )
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                    updates.append(update)
                    norms.append(norm)

            # Report the step.
            new_tokens = int(rollout.response_mask.sum())
            elapsed = time.perf_counter() - start
            tokens, seconds = tokens + new_tokens, seconds + elapsed
            divergence = float(pk.masked_sum(kl, rollout.response_mask)) / config.rollouts
            log.write(
                step,
                {
                    "reward/mean": float(scores.mean()),
                    "reward/std": float(scores.std(unbiased=False)),
                    "kl/per_completion": divergence,
                    "kl/coef": controller.coef,
                    "completion/tokens": new_tokens / config.rollouts,
                    "completion/ended": float(rollout.ended.float().mean()),
                    "entropy": float(torch.stack([update.entropy for update in updates]).mean()),
                    "grad_norm": float(torch.stack(norms).mean()),
                    "lr": lr,
                    "ratio_first/max": float(updates[0].policy.ratio_max),
                    "ratio_first/min": float(updates[0].policy.ratio_min),
                    **floats("policy", pk.reduce_metrics([u.policy for u in updates])),
                    **floats("value", pk.reduce_metrics([u.value for u in updates])),
                    "time/sample": sampled - start,
                    "time/update": elapsed - (sampled - start),
                    "time/tokens_per_second": new_tokens / elapsed,
                },
            )
            controller.update(divergence)

    after = evaluate(sampler, reward, eval_prompts, config)
    export(actor, tokenizer, folder)
    plot_rewards(log.history, folder / "reward.png")
    if before is not None and after is not None:
        table = sample_table(before, after, config.table_rows, markdown=True)
        write_text(
            folder / "samples.md",
            f"Mean reward of {len(before.scores)} samples: {before.mean:.3f} before, "
            f"{after.mean:.3f} after.\n\n{table}\n",
        )
    result = Result(folder, before, after, tokens / seconds)
    write_json(folder / "summary.json", summary(result))
    return result


def accumulate_gradients(actor: ActorCritic, minibatch: Experience, config: Config) -> Update:
    """Add the gradient of a minibatch's loss, one micro-batch at a time."""
    total, length = minibatch.mask.shape
    tokens = minibatch.mask.sum()
    denominators: dict[str, float | Tensor] = {"token-mean": tokens, "token-sum": 1}
    entropy = torch.zeros((), device=tokens.device)
    policy_metrics, value_metrics = [], []
    for index in torch.arange(total, device=tokens.device).split(config.micro_batch):
        micro = minibatch.rows(index)
        states, values = actor(micro.sequences, micro.attention_mask, length)
        policy = actor.scorer.loss(
            states,
            micro.sequences[:, -length:],
            micro.logprobs,
            micro.advantages,
            micro.mask,
            temperature=config.temperature,
            variant=config.variant,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            aggregation=config.aggregation,
            denominator=denominators.get(config.aggregation, total),
            norm_length=config.max_new_tokens if config.aggregation == "seq-sum-norm" else None,
            entropy=True,
            entropy_coef=config.entropy_coef,
        )
        value = pk.value_loss(
            values,
            micro.values,
            micro.returns,
            micro.mask,
            clip=config.value_clip,
            denominator=tokens,
        )
        (policy.loss + config.value_coef * value.loss).backward()
        assert policy.entropies is not None
        entropy += pk.masked_sum(policy.entropies, micro.mask) / tokens
        policy_metrics.append(policy.metrics)
        value_metrics.append(value.metrics)
    return Update(entropy, pk.reduce_metrics(policy_metrics), pk.reduce_metrics(value_metrics))


class KLController:
    """The weight of the KL penalty, fixed or under proportional control in log space.

    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2, with the gain written as
    completions / horizon, as in the authors' code.
    """

    def __init__(self, config: Config) -> None:
        self.coef, self.target = config.kl_coef, config.kl_target
        self.gain = config.rollouts / config.kl_horizon

    def update(self, divergence: float) -> None:
        """Move the weight so that the divergence, in nats per completion, nears the target."""
        if self.target is not None:
            error = min(max(divergence / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + self.gain * error


def check_ratio(metrics: pk.PolicyMetrics, dtype: torch.dtype) -> None:
    """Raise unless the ratio of the policy to itself is 1 up to rounding."""
    low, high = float(metrics.ratio_min), float(metrics.ratio_max)
    tolerance = RATIO_TOLERANCE[dtype]
    if not (1 - tolerance <= low and high <= 1 + tolerance):
        raise RuntimeError(
            f"the first minibatch's ratios lie in [{low}, {high}], expected 1 within {tolerance}: "
            "the model is not deterministic, or padding or the rest of a batch change its outputs"
        )


def floats(prefix: str, metrics: pk.PolicyMetrics | pk.ValueMetrics) -> dict[str, float]:
    """Return metrics as numbers under a prefix."""
    return {f"{prefix}/{key}": float(value) for key, value in metrics.as_dict().items()}


def summary(result: Result) -> dict[str, object]:
    """Return what summary.json holds."""
    return {
        "reward_before": result.before.mean if result.before else None,
        "reward_after": result.after.mean if result.after else None,
        "tokens_per_second": result.tokens_per_second,
        "ops": {f"{op} ({backend})": n for (op, backend), n in sorted(pk.op_counts().items())},
    }
