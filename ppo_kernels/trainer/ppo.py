"""The training loop: sample, score, estimate advantages, update; read it from top to bottom."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ppo_kernels as pk
from ppo_kernels.trainer.checkpoint import Checkpoints, Origin, State, restore
from ppo_kernels.trainer.config import Config, InputError
from ppo_kernels.trainer.data import (
    Row,
    check_prompts,
    load_prompts,
    render_prompts,
    shuffled_batches,
)
from ppo_kernels.trainer.distributed import World
from ppo_kernels.trainer.evaluate import Samples, evaluate
from ppo_kernels.trainer.experience import Experience, make_experience
from ppo_kernels.trainer.kl import KLController
from ppo_kernels.trainer.logs import RunLog, Tracker, prepare_output
from ppo_kernels.trainer.losses import micro_losses
from ppo_kernels.trainer.measure import (
    Clock,
    Update,
    cost_metrics,
    profiled,
    rollout_metrics,
    update_metrics,
)
from ppo_kernels.trainer.model import (
    ActorCritic,
    Reference,
    add_adapters,
    check_positions,
    load_policy,
    load_tokenizer,
    resolve_device,
)
from ppo_kernels.trainer.report import export, read_samples, write_json, write_report
from ppo_kernels.trainer.rewards import RewardFunction, load_reward, score
from ppo_kernels.trainer.rollout import Sampler

T = TypeVar("T")
RATIO_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Result:
    """What a run gained and where it left its files."""

    output_dir: Path
    before: Samples | None
    after: Samples | None
    tokens_per_second: float


def train(
    config: Config,
    *,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward: RewardFunction | None = None,
    prompts: Sequence[Row] | None = None,
    eval_prompts: Sequence[Row] | None = None,
    trackers: Sequence[Tracker] = (),
) -> Result:
    """Run PPO as `config` says; objects given here take the place of what it names.

    A model given here is trained in place; to resume, give it as it was at the start. Trackers get
    all metrics and tables, besides those that `config` names.

    Raises:
        InputError: For settings, files and objects that cannot be used.
        UnstableError: Where an unstable run is to stop.
    """
    world = World(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    device = world.device(resolve_device(config.device))

    for key, given in (("model", model), ("prompts", prompts), ("reward", reward)):
        if given is None and getattr(config, key) is None:
            raise InputError(f"{key}: not given, and it has no default")
    tokenizer = tokenizer or load_tokenizer(config)
    if prompts is None:
        prompts = load_prompts(str(config.prompts))
    prompts = render_prompts(prompts, tokenizer)
    longest = check_prompts(prompts, tokenizer, config.max_prompt_tokens)
    if eval_prompts is None:
        eval_prompts = prompts
        if config.eval_prompts is not None:
            eval_prompts = load_prompts(config.eval_prompts, "eval_prompts")
    eval_prompts = render_prompts(eval_prompts, tokenizer, "eval_prompts")
    longest_eval = check_prompts(eval_prompts, tokenizer, config.max_prompt_tokens, "eval_prompts")
    reward = reward or load_reward(config.reward or "", device)

    policy = model or load_policy(config)
    policy.to(device=device, dtype=getattr(torch, config.dtype))  # type: ignore[call-arg]
    check_positions(policy, max(longest, longest_eval), config.max_new_tokens)
    if config.lora_rank is not None:
        add_adapters(policy, config)
    sampler = Sampler(policy, tokenizer, config, synced=world.is_sharded)
    actor = ActorCritic(policy, sampler.forbidden, config.separate_value_model)
    reference = Reference(policy, actor.forbidden)
    origin = Origin.of(policy, prompts)
    parts = (actor.policy, actor.value_trunk, actor.value_head)
    groups = [{"params": list(part.parameters())} for part in parts if part is not None]
    adam = torch.optim.AdamW(groups, eps=config.adam_eps, weight_decay=config.weight_decay)
    learner, optimizer = world.prepare(actor, adam)
    shuffle = torch.Generator().manual_seed(config.seed)
    state = State(actor, optimizer, KLController(config), shuffle)
    if world.size > 1:
        torch.manual_seed(config.seed + world.rank)  # completions of its own for each process

    folder = Path(config.output_dir)
    checkpoints = Checkpoints(folder, origin, config, world)
    saved = checkpoints.newest() if config.resume else None
    if world.is_main:
        prepare_output(config, goes_on=saved is not None)
        write_json(folder / "config.json", asdict(config))
    if saved is not None:
        before = read_samples(folder / "before.json")
        restore(state, saved, world)
    else:
        before = infer(learner, evaluate, sampler, reward, eval_prompts, config)
        if before is not None and world.is_main:
            write_json(folder / "before.json", before._asdict())

    first = state.step
    batches = islice(shuffled_batches(prompts, config.rollouts, config.seed), first, None)
    with RunLog(folder, config, first, trackers if world.is_main else None) as log:
        for step in range(first, config.steps):
            clock = Clock(device)
            with profiled(folder / "profile.txt", step == config.profile_step) as shares:
                # Sample completions and score them; each process its part of the step's prompts.
                rows = next(batches)[world.part(config.rollouts)]
                rollout = infer(learner, sampler, [row["prompt"] for row in rows])
                clock.lap("sample")
                scores = score(reward, rows, rollout.completions).to(device)
                clock.lap("reward")

                # Log-probabilities, KL-shaped rewards, advantages and returns.
                kl_coef = state.controller.coef
                experience = make_experience(
                    learner, reference, rollout, scores, kl_coef=kl_coef, config=config, world=world
                )
                metrics = rollout_metrics(experience, kl_coef)
                divergence = metrics["kl/per_completion"]
                if config.max_kl is not None and not divergence <= config.max_kl:
                    text = f"the KL to the reference is {divergence:.4g} nats per completion"
                    checkpoints.stop(state, experience, f"{text}, max_kl is {config.max_kl:.4g}")
                clock.lap("score")

                learned = update_weights(learner, experience, state, checkpoints, config, world)
                clock.lap("update")

            # Report the step, and keep what a later run needs to go on from here.
            new_tokens = int(experience.mask.sum())
            log.metrics(
                step,
                metrics
                | update_metrics(learned.updates, learned.norms)
                | {"skipped": float(learned.skipped), "lr": config.lr * decay(config, step)}
                | cost_metrics(clock, new_tokens)
                | shares,
            )
            if config.completions_every and step % config.completions_every == 0:
                texts = zip(rows, rollout.completions, scores.tolist(), strict=True)
                table = [{"prompt": r["prompt"], "completion": c, "score": s} for r, c, s in texts]
                log.table(step, table[: config.table_rows])
            state.controller.update(divergence)
            state.step, state.tokens = step + 1, state.tokens + new_tokens
            state.seconds += clock.total
            is_due = config.checkpoint_every and state.step % config.checkpoint_every == 0
            if is_due or (config.checkpoint_every and state.step == config.steps):
                checkpoints.save(state)

    after = infer(learner, evaluate, sampler, reward, eval_prompts, config)
    export(actor, tokenizer, folder, world)
    result = Result(folder, before, after, state.tokens / state.seconds)
    if world.is_main:
        write_report(folder, log.history, before, after, config)
        write_json(folder / "summary.json", summary(result))
    world.wait()
    return result


@torch.no_grad()
def infer(learner: nn.Module, work: Callable[..., T], *arguments: Any) -> T:
    """Return `work(*arguments)`, which needs the weights, but no gradient."""
    return learner(lambda _: work(*arguments))


class Learned(NamedTuple):
    """What the minibatches of a step tell about themselves."""

    updates: list[Update]
    norms: list[Tensor]
    skipped: int


def update_weights(
    learner: nn.Module,
    experience: Experience,
    state: State,
    checkpoints: Checkpoints,
    config: Config,
    world: World,
) -> Learned:
    """Go over the experience for several epochs; a minibatch is one optimizer step."""
    learned = Learned([], [], 0)
    policy_learns = state.step >= config.critic_warmup
    epochs = max(config.epochs, config.value_epochs or 0)
    for epoch in range(epochs):
        policy_learns = policy_learns and epoch < config.epochs
        order = torch.randperm(config.rollouts, generator=state.shuffle).split(config.minibatch)
        for i, index in enumerate(order):
            factor = decay(config, state.step, epoch * len(order) + i, epochs * len(order))
            *trunks, head = state.optimizer.param_groups
            for group in trunks:
                group["lr"] = config.lr * factor
            head["lr"] = config.value_lr * factor
            minibatch = experience.rows(index.to(experience.mask.device))
            update = accumulate_gradients(learner, minibatch, config, world, policy_learns)
            norm = world.clip_grad_norm(state.model, config.max_grad_norm)
            loss = float(update.loss)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                if config.nonfinite == "stop":
                    where = f"epoch {epoch}, minibatch {i}"
                    text = f"{where}: the loss is {loss:.4g}, its gradient's norm {norm:.4g}"
                    checkpoints.stop(state, minibatch, text)
                learned = learned._replace(skipped=learned.skipped + 1)
            elif update.policy is not None and is_too_far(update.policy, config):
                policy_learns = False
                learned = learned._replace(skipped=learned.skipped + 1)
            else:
                if state.step == config.critic_warmup and not learned.updates:
                    check_ratio(update.policy, getattr(torch, config.dtype))
                state.optimizer.step()
                learned.updates.append(update)
                learned.norms.append(norm)
            state.optimizer.zero_grad()
    if not learned.updates:
        checkpoints.stop(state, experience, "every minibatch was left out")
    if not math.isfinite(world.weight_norm(state.model)):
        checkpoints.stop(state, experience, "the weights are no longer finite")
    return learned


def decay(config: Config, step: int, update: int = 0, updates: int = 1) -> float:
    """Return the factor of the learning rates at an update of a step."""
    done, total = step * updates + update, config.steps * updates
    return 1 - done / total if config.lr_decay else 1.0


def accumulate_gradients(
    learner: nn.Module, minibatch: Experience, config: Config, world: World, with_policy: bool
) -> Update:
    """Add the gradient of a minibatch's loss, one micro-batch at a time."""
    tokens = minibatch.mask.sum().clamp(min=1)
    part = torch.arange(len(minibatch.mask), device=tokens.device)[world.part(len(minibatch.mask))]
    micro_batches = part.split(config.micro_batch)
    totals = torch.zeros(2, device=tokens.device)  # the loss and the entropy
    policy_metrics, value_metrics = [], []
    for i, index in enumerate(micro_batches):
        micro = minibatch.rows(index)
        with world.accumulating(learner, last=i == len(micro_batches) - 1):
            losses = learner(micro_losses, micro, minibatch.mask, config, with_policy)
            world.backward(losses.total)
        totals[0] += losses.total.detach()
        value_metrics.append(losses.value.metrics)
        if losses.policy is not None:
            assert losses.policy.entropies is not None
            totals[1] += pk.masked_sum(losses.policy.entropies, micro.mask) / tokens
            policy_metrics.append(losses.policy.metrics)
    loss, entropy = world.sum(totals)
    return Update(
        loss,
        entropy if with_policy else None,
        pk.reduce_metrics(policy_metrics, world.group) if with_policy else None,
        pk.reduce_metrics(value_metrics, world.group),
    )


def is_too_far(metrics: pk.PolicyMetrics, config: Config) -> bool:
    """Whether the policy has left the one that sampled by more than the settings allow."""
    return config.max_update_kl is not None and float(metrics.kl_k3) > config.max_update_kl


def check_ratio(metrics: pk.PolicyMetrics | None, dtype: torch.dtype) -> None:
    """Raise unless the ratio of the policy to itself is 1 up to rounding."""
    if metrics is None:
        return
    low, high = float(metrics.ratio_min), float(metrics.ratio_max)
    tolerance = RATIO_TOLERANCE[dtype]
    if not (1 - tolerance <= low and high <= 1 + tolerance):
        raise RuntimeError(
            f"the first minibatch's ratios lie in [{low}, {high}], expected 1 within {tolerance}: "
            "the model is not deterministic, or padding or the rest of a batch change its outputs"
        )


def summary(result: Result) -> dict[str, object]:
    """Return what summary.json holds."""
    return {
        "reward_before": result.before.mean if result.before else None,
        "reward_after": result.after.mean if result.after else None,
        "tokens_per_second": result.tokens_per_second,
        "ops": {f"{op} ({backend})": n for (op, backend), n in sorted(pk.op_counts().items())},
    }
