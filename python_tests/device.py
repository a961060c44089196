"""The device of the op tests, a CPU or what PPO_KERNELS_TEST_DEVICE names; what runs there."""

import os
from contextlib import contextmanager

import pytest
import torch

from ppo_kernels import _faults
from ppo_kernels.testing import executors

DEVICE = os.environ.get("PPO_KERNELS_TEST_DEVICE", "cpu")

# The Triton kernels run in an interpreter: without alignment or threads, and a row takes long.
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
THREADS = () if INTERPRETED else (1, 2, 3)
OFFSETS = range(1 if INTERPRETED else 16)


def seeded(seed: int) -> torch.Generator:
    """A generator on DEVICE, which is also where tensors are made unless told otherwise."""
    return torch.Generator(DEVICE).manual_seed(seed)


def kernels(*functions: str) -> list[str]:
    """The backends of these functions but the reference, each once."""
    names = executors(*functions, device=DEVICE)
    return [b for b in dict.fromkeys(e.partition(":")[0] for e in names) if b != "torch"]


@contextmanager
def raises(backend, error, message):
    """As pytest.raises; of the backends that read data in debug mode only, the argument's name."""
    before = _faults.debug
    if backend.partition(":")[0] not in ("torch", "cpu"):
        _faults.debug, message = True, message.lstrip("^").partition(":")[0] + ":"
    try:
        with pytest.raises(error, match=message) as caught:
            yield caught
    finally:
        _faults.debug = before
