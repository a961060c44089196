"""What a run leaves behind: the reward curve, the samples before and after, the exported policy."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from safetensors.torch import save_file
from tabulate import tabulate
from transformers import PreTrainedTokenizerBase

from ppo_kernels._files import atomic_file, atomic_folder
from ppo_kernels.trainer.config import Config
from ppo_kernels.trainer.distributed import World
from ppo_kernels.trainer.evaluate import Samples
from ppo_kernels.trainer.model import ActorCritic


def plot_rewards(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw mean reward and divergence from the reference over the steps."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    rewards, divergence = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = [row["step"] for row in history]
    means = [row["reward/mean"] for row in history]
    spread = [row["reward/std"] for row in history]
    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
    rewards.plot(steps, means, label="mean")
    rewards.fill_between(steps, low, high, alpha=0.15, label="± one standard deviation")
    rewards.set_ylabel("reward")
    rewards.legend(loc="lower right")
    divergence.plot(steps, [row["kl/per_completion"] for row in history], color="tab:orange")
    divergence.set_ylabel("KL to reference\n(nats per completion)")
    divergence.set_xlabel("step")
    for axes in (rewards, divergence):
        axes.grid(alpha=0.3)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


CURVES = {
    "reward": ("reward/mean", "reward/total"),
    "KL to reference (nats per completion)": ("kl/per_completion",),
    "entropy (nats per token)": ("entropy",),
    "KL of the updates (k3)": ("policy/kl_k3",),
    "share of tokens clipped": ("policy/clip_fraction", "value/clip_fraction"),
    "effective sample size": ("policy/ess",),
    "value loss": ("value/loss",),
    "explained variance": ("value/explained_variance",),
    "gradient norm": ("grad_norm", "grad_norm/max"),
    "tokens per completion": ("completion/tokens",),
    "share of completions that ended": ("completion/ended",),
    "tokens per second": ("time/tokens_per_second",),
}


def plot_metrics(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw the main metrics over the steps."""
    figure = Figure(figsize=(12, 10), layout="constrained")
    steps = [row["step"] for row in history]
    for axes, (title, names) in zip(figure.subplots(4, 3).flat, CURVES.items(), strict=True):
        for name in names:
            axes.plot(steps, [row.get(name, math.nan) for row in history], label=name)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend(fontsize=8)
    figure.supxlabel("step")
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def sample_table(before: Samples, after: Samples, rows: int, markdown: bool) -> str:
    """Lay out samples before and after training side by side, for the terminal or as Markdown."""
    cells = [
        [
            _one_line(before.prompts[i], markdown),
            _one_line(before.completions[i], markdown),
            f"{before.scores[i]:.2f}",
            _one_line(after.completions[i], markdown),
            f"{after.scores[i]:.2f}",
        ]
        for i in range(min(rows, len(before.prompts)))
    ]
    headers = ["prompt", "before", "reward", "after", "reward"]
    if markdown:
        return tabulate(cells, headers, tablefmt="github", disable_numparse=True)
    widths = [18, 38, None, 38, None]
    return tabulate(
        cells, headers, tablefmt="rounded_grid", maxcolwidths=widths, disable_numparse=True
    )


def _one_line(text: str, markdown: bool) -> str:
    text = " ".join(text.split())
    return text.replace("\\", "\\\\").replace("|", "\\|") if markdown else text


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_report(
    folder: Path,
    history: Sequence[Mapping[str, float]],
    before: Samples | None,
    after: Samples | None,
    config: Config,
) -> None:
    """Write the plots, and the samples side by side."""
    if config.plots:
        plot_rewards(history, folder / "reward.png")
        plot_metrics(history, folder / "metrics.png")
    if before is not None and after is not None:
        table = sample_table(before, after, config.table_rows, markdown=True)
        write_text(
            folder / "samples.md",
            f"Mean reward of {len(before.scores)} samples: {before.mean:.3f} before, "
            f"{after.mean:.3f} after.\n\n{table}\n",
        )


def read_samples(path: Path) -> Samples | None:
    """Read samples that a run wrote; None if it took none."""
    return Samples(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def export(
    model: ActorCritic, tokenizer: PreTrainedTokenizerBase, folder: Path, world: World
) -> None:
    """Save policy and tokenizer for `from_pretrained`, and the value function beside them.

    Of a policy with adapters, only these.
    """
    # None is what save_pretrained takes for the model's own
    states = [
        world.whole(part.state_dict(keep_vars=True))
        if part is not None and world.is_sharded
        else None
        for part in (model.policy, model.value_trunk)
    ]
    head = world.whole(model.value_head.state_dict(keep_vars=True))
    if not world.is_main:
        return
    with atomic_folder(folder / "policy") as temporary:
        model.policy.save_pretrained(temporary, state_dict=states[0])
        tokenizer.save_pretrained(temporary)
    with atomic_folder(folder / "value") as temporary:
        save_file(head, temporary / "head.safetensors")
        if model.value_trunk is not None:
            model.value_trunk.save_pretrained(temporary / "trunk", state_dict=states[1])
