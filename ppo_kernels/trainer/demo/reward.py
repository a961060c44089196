"""The demo's reward: how positive a text is by VADER's rules."""

from functools import cache
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer


@cache
def _analyzer() -> Any:
    return SentimentIntensityAnalyzer()


def vader(prompts: list[str], completions: list[str]) -> list[float]:
    """Return VADER's compound score of each whole text, -1 to 1 (Hutto and Gilbert 2014)."""
    score = _analyzer().polarity_scores
    texts = zip(prompts, completions, strict=True)
    return [score(f"{prompt} {completion}")["compound"] for prompt, completion in texts]
