"""The report of the chain: its figures, from the run, in Markdown and one figure."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from tabulate import tabulate

from ppo_kernels._files import atomic_file
from ppo_kernels.trainer.evaluation import Evaluation
from ppo_kernels.trainer.fine_tuning import SFTResult
from ppo_kernels.trainer.report import write_json, write_text
from ppo_kernels.trainer.reward import RewardResult
from ppo_kernels.trainer.text_metrics import Mean

GOAL = 0.72
VADER = "reward, vader"


class Chain(NamedTuple):
    """What the steps returned."""

    folder: Path
    sentences: tuple[int, int]
    language_model: SFTResult
    reward: RewardResult
    vader_agreement: float
    evaluation: Evaluation
    seconds: float


def figures(chain: Chain) -> dict[str, Any]:
    """Return the four results, each with what it was before."""
    before, after = chain.evaluation.reference, chain.evaluation.policy
    assert before is not None
    agreed, score = chain.reward.agreement, f"reward, {chain.reward.reward}"
    return {
        "sentences": {"training": chain.sentences[0], "held_out": chain.sentences[1]},
        "perplexity": {
            "before": chain.language_model.perplexity_before,
            "after": chain.language_model.perplexity,
        },
        "pair_accuracy": {
            "reward_model": agreed.accuracy,
            "vader": chain.vader_agreement,
            "goal": GOAL,
            "pairs": agreed.pairs,
            "calibration_error": agreed.calibration_error,
        },
        "reward_model_score": _change(before[score], after[score]),
        "vader_score": _change(before[VADER], after[VADER]),
        "kl": _number(after["KL to reference, nats per completion"]),
        "seconds": chain.seconds,
    }


def _number(value: Mean | float) -> float:
    return value.mean if isinstance(value, Mean) else value


def _change(before: Mean | float, after: Mean | float) -> dict[str, Any]:
    assert isinstance(before, Mean)
    assert isinstance(after, Mean)
    return {
        "before": before.mean,
        "after": after.mean,
        "half_widths": [before.half_width, after.half_width],
    }


def write_report(chain: Chain) -> Path:
    """Write report.json, report.png and report.md; return the last."""
    found = figures(chain)
    write_json(chain.folder / "report.json", found)
    plot(chain, found, chain.folder / "report.png")
    path = chain.folder / "report.md"
    write_text(path, markdown(chain, found))
    return path


def markdown(chain: Chain, found: dict[str, Any]) -> str:
    """Return the report's text."""
    accuracy = found["pair_accuracy"]
    met = "reached" if accuracy["reward_model"] >= accuracy["goal"] else "missed"
    rows = [
        [
            "language model: perplexity of held-out sentences",
            f"{found['perplexity']['before']:.0f}",
            f"{found['perplexity']['after']:.1f}",
        ],
        [
            f"reward model: agrees with humans, of {accuracy['pairs']} pairs of held-out sentences "
            f"(goal {accuracy['goal']:.0%}: {met})",
            "50 % by chance",
            f"{accuracy['reward_model']:.1%}",
        ],
        ["the policy's score by the reward model", *_cells(found["reward_model_score"])],
        ["the policy's score by VADER, not in the objective", *_cells(found["vader_score"])],
    ]
    table = tabulate(rows, ["", "before", "after"], tablefmt="github", disable_numparse=True)
    samples = (chain.evaluation.output_dir / "report.md").read_text(encoding="utf-8")
    return (
        "# From human ratings to an evaluated policy\n\n"
        f"{found['sentences']['training']} movie-review sentences with human ratings to learn "
        f"from, {found['sentences']['held_out']} held out; {found['seconds']:.0f} seconds.\n\n"
        f"{table}\n\n"
        "± is a 95 % confidence interval over samples. PPO moved the policy by "
        f"{found['kl']:.1f} nats per completion. VADER's rules agree with humans on "
        f"{accuracy['vader']:.1%} of the same pairs; the reward model's probabilities are off by "
        f"{accuracy['calibration_error']:.1%} on average.\n\n"
        "![Loss of the language model, calibration of the reward model, reward during PPO, VADER "
        f"before and after](report.png)\n\n{samples[samples.index('| metric') :]}"
    )


def _cells(change: dict[str, Any]) -> list[str]:
    pairs = zip((change["before"], change["after"]), change["half_widths"], strict=True)
    return [f"{mean:.3f} ± {half:.3f}" for mean, half in pairs]


def plot(chain: Chain, found: dict[str, Any], path: Path) -> None:
    """Draw one panel for each of the four results."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    (loss, calibration), (reward, judge) = figure.subplots(2, 2)
    history = _lines(chain.folder / "sft" / "log.jsonl")
    loss.plot([row["loss"] for row in history])
    loss.set(title="language model", xlabel="step", ylabel="loss, nats per word")

    bins = chain.reward.agreement.calibration
    calibration.plot([0.5, 1], [0.5, 1], color="gray", linestyle="--")
    calibration.plot([b.predicted for b in bins], [b.observed for b in bins], marker="o")
    calibration.set(
        title=f"reward model: {chain.reward.agreement.accuracy:.1%} of held-out pairs",
        xlabel="probability the model gives its choice",
        ylabel="how often humans agree",
    )

    history = _lines(chain.folder / "ppo" / "log.jsonl")
    reward.plot([row["reward/mean"] for row in history])
    reward.set(title="PPO", xlabel="step", ylabel="score by the reward model")

    for name, shift in (("reward_model_score", 0), ("vader_score", 1)):
        change = found[name]
        means = [change["before"], change["after"]]
        where = [shift * 3, shift * 3 + 1]
        judge.bar(where, means, yerr=change["half_widths"], color=["tab:gray", "tab:green"])
    judge.axhline(0, color="black", linewidth=0.8)
    judge.set_xticks([0, 1, 3, 4], ["before", "after", "before", "after"])
    judge.set(title="new samples: reward model (left), VADER (right)", ylabel="mean score")
    for axes in (loss, calibration, reward, judge):
        axes.grid(alpha=0.3)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
