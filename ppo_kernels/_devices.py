"""What launchers ask about a GPU."""

from __future__ import annotations

from functools import lru_cache

import torch

# Programs that fill a device which cannot be asked.
_PROCESSORS = 132


@lru_cache
def processors(device: torch.device) -> int:
    """How many multiprocessors the device has."""
    if device.type != "cuda":
        return _PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
