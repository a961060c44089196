"""Every setting of a training run, with its meaning, default and allowed range."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, get_args


class InputError(ValueError):
    """A setting, file or reward that cannot be used; it says what was given and expected."""


class UnstableError(RuntimeError):
    """A run that stopped itself; it says why, and where its state is."""


@dataclass(frozen=True)
class Config:
    """Settings of `ppo-kernels train`: keys of its YAML file, overridden by `--key value`."""

    model: str | None = None
    """Folder of a saved causal language model, or 'module:name' (or 'file.py:name') of a callable
    that returns one."""
    model_class: str = "transformers:AutoModelForCausalLM"
    """'module:Class' whose from_pretrained loads the model folder."""
    tokenizer: str | None = None
    """Folder of the tokenizer, or 'module:name' of a callable that returns one; the model's folder
    when not given."""
    separate_value_model: bool = False
    """Give the value function its own copy of the trunk; otherwise it is a linear head on the
    policy's last layer."""
    lora_rank: int | None = None
    """Train low-rank adapters of this rank instead of all weights (needs peft); the reference is
    then the policy without them, which costs no second model."""
    lora_alpha: float = 16.0
    """The adapters' output is multiplied by lora_alpha / lora_rank."""
    lora_targets: list[str] | None = None
    """Names of the layers that get adapters; every linear layer but the head when not given."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. Log-probabilities, values and losses are float32 in either case."""
    device: str = "auto"
    """Torch device; 'auto' takes CUDA where there is one."""
    threads: int | None = None
    """CPU threads of torch; its own choice when not given. Small models are fastest with 1."""

    prompts: str | None = None
    """Text file with one prompt a line, or .jsonl with a 'prompt' and further columns, which the
    reward receives."""
    eval_prompts: str | None = None
    """Prompts of the same form for the samples before and after; the training prompts when not
    given."""
    max_prompt_tokens: int = 512
    """Longer prompts are refused, never cut."""
    reward: dict[str, float] | str | None = None
    """'module:name' or 'file.py:name' of a callable, f(prompts=, completions=, **columns) -> list
    of floats, sync or async; the folder of a sequence-classification model; or a rule,
    'regex:PATTERN', 'length:LEAST-MOST' (words) or 'exact:COLUMN'. Several with their weights:
    {reward: weight, ...}."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a completion that ran into max_new_tokens, that is, ended with
    neither an end-of-sequence token nor a stop string."""

    output_dir: str = "runs/ppo"
    """Folder of all that the run writes."""
    overwrite: bool = False
    """Replace the run that output_dir already holds."""
    seed: int = 0
    """The same seed repeats a run bit for bit on the same machine and thread count."""
    eval_samples: int = 128
    """Completions sampled before and after training for the mean rewards and the table; 0 skips
    both."""
    table_rows: int = 6
    """Rows of the tables of samples."""

    checkpoint_every: int = 50
    """Steps between checkpoints, from which `resume` goes on; 0 writes none. One is written after
    the last step, too."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    resume: bool = False
    """Go on from the newest checkpoint in output_dir, bit for bit as if never interrupted; without
    one, begin anew. The settings must be those of the checkpoint; more steps are allowed."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """Where a minibatch's loss or gradient is NaN or infinite: stop the run and leave its state in
    output_dir/failure, or leave that minibatch out. A step whose minibatches are all left out stops
    the run in either case."""
    max_kl: float | None = None
    """Divergence from the reference, in nats per completion, above which the run stops and leaves
    its state in output_dir/failure; no limit when not given."""
    max_update_kl: float | None = None
    """Approximate KL per token (k3) between the policy that sampled and the one of a minibatch,
    above which the rest of the step's policy updates are left out; no limit when not given."""

    plots: bool = True
    """Draw reward.png and metrics.png at the end."""
    tensorboard: bool = True
    """Write metrics and tables of completions for TensorBoard."""
    wandb: str | None = None
    """Project of Weights & Biases to report to; none when not given. WANDB_MODE=offline works."""
    completions_every: int = 10
    """Steps between tables of sampled completions in completions.jsonl, TensorBoard and W&B; 0
    writes none."""
    profile_step: int | None = None
    """Step whose time is broken down by operator, in profile.txt, and whose share of this package's
    ops is reported as time/share_of_ops; that step is slower. None when not given."""

    steps: int = 100
    """Rounds of rollout and update."""
    rollouts: int = 64
    """Completions sampled each step."""
    max_new_tokens: int = 32
    """Longest completion, its end-of-sequence token included."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability."""
    stop: list[str] | None = None
    """Strings that end a completion. Their tokens count, but the reward's text ends before them."""
    forbidden_tokens: list[str] | None = None
    """Tokens never sampled; when not given, the tokenizer's special tokens other than the end of a
    sequence."""

    epochs: int = 4
    """Passes over each step's rollouts."""
    value_epochs: int | None = None
    """Passes of the value function, if more than `epochs`: in those beyond, only the value function
    learns, and a trunk shared with the policy stays as it is."""
    critic_warmup: int = 0
    """Steps at the start in which only the value function learns."""
    minibatch: int = 16
    """Completions per optimizer step."""
    micro_batch: int = 16
    """Completions per forward and backward pass. Smaller saves memory and does not change the
    loss."""
    lr: float = 1e-5
    """AdamW's peak learning rate for the policy (and the separate value model's trunk)."""
    value_lr: float = 1e-4
    """The same for the value head."""
    lr_decay: bool = True
    """Let both learning rates fall linearly to 0 over the run."""
    adam_eps: float = 1e-5
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Largest norm of a minibatch's gradient."""

    variant: Literal["clip", "cispo", "sapo", "gpg", "gspo", "gmpo"] = "clip"
    """Policy loss, as docs/variants.md lists them."""
    clip_low: float = 0.2
    """The ratio is clipped at 1 - clip_low from below."""
    clip_high: float | None = None
    """And at 1 + clip_high from above; clip_low when not given."""
    dual_clip: float | None = None
    """Bound, above 1, on the objective's factor for negative advantages; off when not given."""
    aggregation: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-sum-norm"
    ] = "token-mean"
    """How the policy loss is averaged over a minibatch; seq-sum-norm divides by max_new_tokens,
    token-sum by nothing."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, aggregated as the policy loss."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    value_clip: float | None = 0.2
    """Range in which new values may leave the old ones, in units of the reward; 'null' turns it
    off."""
    score_clip: float | None = None
    """Scores are clipped to at most this far from 0, before the penalty for a missing end; 'null'
    turns it off."""
    whiten_rewards: bool = False
    """Scale the per-token rewards of a step's rollouts, KL penalty included, to variance 1 about
    their mean, which stays."""
    gamma: float = 1.0
    """Discount of the rewards."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of a step's rollouts to mean 0 and variance 1."""
    whiten_eps: float = 0.01
    """Added to the variance, in squared units of the reward. It bounds what whitening may amplify:
    once every completion earns the same, the variance is noise, and scaling that up to 1 destroys a
    good policy within one step."""

    kl_coef: float = 0.05
    """Weight of the penalty on the divergence from the reference; the start value where kl_target
    is given."""
    kl_target: float | None = None
    """Divergence per completion, in nats, that the adaptive controller steers to; the weight is
    fixed when not given."""
    kl_horizon: float = 10000.0
    """Completions in which the adaptive controller acts; smaller is faster."""
    kl_estimator: Literal["k1", "k2", "k3", "abs"] = "k1"
    """Per-token estimator of the divergence."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.dual_clip is not None and self.variant not in ("clip", "gspo"):
            raise _wrong("dual_clip", self.dual_clip, f"none, as {self.variant} has no such bound")
        if self.rollouts % self.minibatch:
            raise _wrong("minibatch", self.minibatch, f"a divisor of rollouts ({self.rollouts})")
        if self.value_epochs is not None and self.value_epochs < self.epochs:
            raise _wrong("value_epochs", self.value_epochs, f"at least epochs ({self.epochs})")


Limits = Mapping[str, tuple[set[str], Callable[[Any], bool]]]


def check_settings(config: Any, limits: Limits | None = None) -> None:
    """Raise InputError for a field that does not hold what its type and the limits allow."""
    for field in fields(config):
        value = getattr(config, field.name)
        if value is None and type(None) in get_args(field.type):
            continue
        choices = get_args(field.type) if "Literal" in str(field.type) else ()
        if choices and value not in choices:
            raise _wrong(field.name, value, f"one of {', '.join(choices)}")
        for expected, (names, holds) in (*_LIMITS.items(), *(limits or {}).items()):
            if field.name in names and not holds(value):
                raise _wrong(field.name, value, expected)


def _wrong(key: str, given: object, expected: str) -> InputError:
    return InputError(f"{key}: given {given!r}, expected {expected}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_reward(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(
            isinstance(name, str) and name != "" and _is_real(weight)
            for name, weight in value.items()
        )
    return isinstance(value, str) and value != ""


_LIMITS: Limits = {
    "a positive number": ({"score_clip"}, lambda v: _is_real(v) and v > 0),
    "an integer >= 1": (
        {"threads", "max_prompt_tokens", "steps", "rollouts", "max_new_tokens"}
        | {"epochs", "value_epochs", "minibatch", "micro_batch", "lora_rank", "keep_checkpoints"},
        lambda v: _is_int(v) and v >= 1,
    ),
    "an integer >= 0": (
        {"seed", "eval_samples", "table_rows", "checkpoint_every", "critic_warmup"}
        | {"completions_every", "profile_step"},
        lambda v: _is_int(v) and v >= 0,
    ),
    "a number > 0": (
        {"temperature", "adam_eps", "max_grad_norm", "value_clip", "kl_target", "kl_horizon"}
        | {"lora_alpha", "max_kl", "max_update_kl"},
        lambda v: _is_real(v) and v > 0,
    ),
    "a number > 1": ({"dual_clip"}, lambda v: _is_real(v) and v > 1),
    "a number >= 0": (
        {"missing_eos_penalty", "lr", "value_lr", "weight_decay", "entropy_coef", "value_coef"}
        | {"clip_high", "kl_coef", "whiten_eps"},
        lambda v: _is_real(v) and v >= 0,
    ),
    "a number in [0, 1]": (
        {"gamma", "lam", "clip_low"},
        lambda v: _is_real(v) and 0 <= v <= 1,
    ),
    "true or false": (
        {"separate_value_model", "overwrite", "lr_decay", "whiten_rewards", "whiten_advantages"}
        | {"resume", "plots", "tensorboard"},
        lambda v: isinstance(v, bool),
    ),
    "a string": (
        {"model", "model_class", "tokenizer", "device", "prompts", "eval_prompts"}
        | {"output_dir", "wandb"},
        lambda v: isinstance(v, str) and v != "",
    ),
    "a reward, or rewards with their weights": ({"reward"}, _is_reward),
    "a list of strings": (
        {"forbidden_tokens", "stop", "lora_targets"},
        lambda v: isinstance(v, list) and all(isinstance(s, str) and s for s in v),
    ),
}
