"""The device of the op tests: the CPU, or what PPO_KERNELS_TEST_DEVICE names."""

import os

import torch

DEVICE = os.environ.get("PPO_KERNELS_TEST_DEVICE", "cpu")


def seeded(seed: int) -> torch.Generator:
    """A generator on DEVICE, which is also where tensors are made unless told otherwise."""
    return torch.Generator(DEVICE).manual_seed(seed)
