"""How a reward model agrees with humans it has not seen: pair accuracy and calibration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ppo_kernels._files import atomic_file
from ppo_kernels.trainer.config import InputError
from ppo_kernels.trainer.feedback import Feedback

LARGEST_GROUP = 2000
BINS = 10


class Bin(NamedTuple):
    """What the model says on average of some pairs or texts, what humans say, how many."""

    predicted: float
    observed: float
    size: int


class Agreement(NamedTuple):
    """Agreement on held-out feedback."""

    texts: int
    pairs: int
    accuracy: float
    """Share of pairs in which the text that humans prefer scores higher; ties count half."""
    calibration: list[Bin]
    """Of Bradley-Terry: the probability of the preferred side, by the model and as observed. Of
    regression: score and rating."""
    calibration_error: float
    """Mean distance of predicted and observed, weighted by count."""

    def as_dict(self) -> dict[str, Any]:
        """Return what summary.json holds."""
        return {**self._asdict(), "calibration": [each._asdict() for each in self.calibration]}


def agreement(scores: Tensor, feedback: Feedback, objective: str) -> Agreement:
    """Compare scores [N] with the feedback; of groups above LARGEST_GROUP texts, that many."""
    ratings = torch.tensor(feedback.ratings)
    margins = _margins(scores, ratings, feedback)
    if not len(margins):
        raise InputError(f"eval_data: has no pair of ratings {feedback.min_gap:g} apart")
    accuracy = float((margins > 0).float().mean() + (margins == 0).float().mean() / 2)
    if objective == "regression":
        bins = _bins(scores, ratings, torch.quantile(scores, torch.linspace(0, 1, BINS + 1)))
    else:
        confidence = margins.abs().sigmoid()
        correct = (margins > 0).float() + (margins == 0).float() / 2
        bins = _bins(confidence, correct, torch.linspace(0.5, 1, BINS + 1))
    total = sum(each.size for each in bins)
    error = sum(each.size * abs(each.predicted - each.observed) for each in bins) / total
    return Agreement(len(scores), len(margins), accuracy, bins, error)


def _margins(scores: Tensor, ratings: Tensor, feedback: Feedback) -> Tensor:
    """Return the score of the better text less that of the worse, for all pairs."""
    groups = torch.tensor(feedback.groups)
    order = groups.argsort(stable=True)
    parts = []
    for members in order.split(torch.bincount(groups)[groups.unique()].tolist()):
        index = members[:LARGEST_GROUP]
        pairs = ratings[index][:, None] - ratings[index] >= feedback.min_gap
        parts.append((scores[index][:, None] - scores[index])[pairs])
    return torch.cat(parts)


def _bins(predicted: Tensor, observed: Tensor, edges: Tensor) -> list[Bin]:
    which = torch.bucketize(predicted, edges[1:-1])
    return [
        Bin(float(predicted[which == i].mean()), float(observed[which == i].mean()), int(n))
        for i in range(len(edges) - 1)
        if (n := (which == i).sum()) > 0
    ]


def plot_calibration(result: Agreement, objective: str, path: Path) -> None:
    """Draw what the model says against what humans say, and how often it says so."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    x = [each.predicted for each in result.calibration]
    ends = _ends(x)
    curve.plot(ends, ends, color="gray", linestyle="--", label="perfect")
    curve.plot(x, [each.observed for each in result.calibration], marker="o", label="held out")
    if objective == "regression":
        names = ("score", "mean human rating", "texts")
    else:
        names = ("probability the model gives its choice", "how often humans agree", "pairs")
    curve.set_ylabel(names[1])
    curve.set_title(f"pair accuracy {result.accuracy:.1%} of {result.pairs} held-out pairs")
    curve.legend(loc="upper left")
    width = 0.8 * (ends[1] - ends[0]) / BINS
    counts.bar(x, [each.size for each in result.calibration], width=width, color="tab:gray")
    counts.set_xlabel(names[0])
    counts.set_ylabel(names[2])
    for axes in (curve, counts):
        axes.grid(alpha=0.3)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _ends(x: Sequence[float]) -> tuple[float, float]:
    return min(x), max(x) if max(x) > min(x) else min(x) + 1
