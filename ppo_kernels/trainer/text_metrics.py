"""Numbers about texts: intervals of means, distinct n-grams, ROUGE and BLEU."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ppo_kernels.trainer.config import InputError


class Mean(NamedTuple):
    """A mean and half the width of its 95 % confidence interval."""

    mean: float
    half_width: float
    samples: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Take the interval of the normal approximation, 1.96 standard errors to each side."""
        count = len(values)
        mean = math.fsum(values) / count
        if count < 2:
            return cls(mean, math.inf, count)
        variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
        return cls(mean, 1.96 * math.sqrt(variance / count), count)

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half_width:.3f}"


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams of words among all of them (Li et al. 2016, arXiv:1510.03055)."""
    grams: list[tuple[str, ...]] = []
    for text in texts:
        words = text.split()
        grams += [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def rouge(texts: Sequence[str], references: Sequence[str]) -> dict[str, Mean]:
    """Mean F1 of ROUGE-1, -2 and -L, by the package rouge-score."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise _not_installed("rouge-score") from error
    names = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(names, use_stemmer=False)
    scores = [scorer.score(there, here) for there, here in zip(references, texts, strict=True)]
    return {name: Mean.of([score[name].fmeasure for score in scores]) for name in names}


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU, 0 to 100, by the package sacrebleu."""
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ModuleNotFoundError as error:
        raise _not_installed("sacrebleu") from error
    return float(BLEU().corpus_score(list(texts), [list(references)]).score)


def _not_installed(package: str) -> InputError:
    return InputError(
        f"prompts: have references, and comparing with them needs {package}; "
        "it comes with: pip install 'ppo-kernels[eval]'"
    )
