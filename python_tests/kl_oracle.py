"""The estimators in 50 digits, and what the tests of KL and rewards call them with."""

import decimal

import torch
from device import seeded

ESTIMATORS = ("k1", "k2", "k3", "abs")


def example(*shape, seed=0, dtype=torch.float32):
    g = seeded(seed)
    logprobs = -torch.randn(shape, generator=g, dtype=torch.float64).abs()
    ref = logprobs + torch.randn(shape, generator=g, dtype=torch.float64) * 0.5
    return logprobs.to(dtype), ref.to(dtype), torch.rand(shape, generator=g) < 0.6


def oracle(d, estimator):
    """Value and slope of one estimator at d, in 50 digits."""
    with decimal.localcontext() as context:
        context.prec = 50
        d = decimal.Decimal(d)
        e = (-d).exp()
        value = {"k1": d, "k2": d * d / 2, "k3": e - 1 + d, "abs": abs(d)}[estimator]
        sign = (d > 0) - (d < 0)
        return float(value), float({"k1": 1, "k2": d, "k3": 1 - e, "abs": sign}[estimator])
