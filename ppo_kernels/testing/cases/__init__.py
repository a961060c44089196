"""The cases, one module per op family."""

from ..case import Case
from . import (
    categorical_kl,
    categorical_kl_hidden,
    importance,
    kept,
    kl,
    logprob,
    logprob_hidden,
    losses,
    moments,
    ppo_loss,
    scan,
)

CASES: list[Case] = [
    *logprob.cases(),
    *logprob_hidden.cases(),
    *kept.cases(),
    *categorical_kl.cases(),
    *categorical_kl_hidden.cases(),
    *losses.cases(),
    *importance.cases(),
    *ppo_loss.cases(),
    *scan.cases(),
    *moments.cases(),
    *kl.cases(),
]
