"""What tests and benchmarks share: cases, layouts, executors and the rule for allowed errors."""

from .case import DTYPES, Case, Inputs
from .cases import CASES
from .cube import cells, check
from .layouts import LAYOUTS, arrange
from .running import device_of, executor, executors, flatten, run
from .tolerance import Exact, Expected, allowed_error, judge, mismatch, reference, ulp

__all__ = [
    "CASES",
    "DTYPES",
    "LAYOUTS",
    "Case",
    "Exact",
    "Expected",
    "Inputs",
    "allowed_error",
    "arrange",
    "cells",
    "check",
    "device_of",
    "executor",
    "executors",
    "flatten",
    "judge",
    "mismatch",
    "reference",
    "run",
    "ulp",
]
