"""Bad input that only a GPU kernel sees: noted on the device, raised when somebody asks.

Each device has one int64 that holds the first fault since the last check (see `_checks`), or NONE.
Kernels lower it by an atomic minimum; nobody waits for it but `check`.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import _checks

NONE = 2**63 - 1
# Check after every call; set by the environment, or by tests.
debug = os.environ.get("PPO_KERNELS_DEBUG", "0") not in ("", "0")
_flags: dict[torch.device, Tensor] = {}


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def flag(device: torch.device) -> Tensor:
    """The device's flag, made when first asked for, outside of any capture."""
    found = _flags.get(device)
    if found is not None:
        return found
    if _capturing(device):
        raise RuntimeError(
            "ppo_kernels: the first call on a device allocates its fault flag, which a CUDA graph "
            "must not capture; call ppo_kernels.check(device) before the capture"
        )
    return _flags.setdefault(device, torch.full((), NONE, dtype=torch.int64, device=device))


def prepare(device: torch.device) -> None:
    """While a graph is traced: its first run may be inside a capture, or in a capture's memory."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_initialized()):
        with _disable_current_modes():
            flag(device)


def check(device: torch.device | str | int | None = None) -> None:
    """Raise if a GPU kernel met bad input since the last check, and forget it.

    On a GPU, what only the data can tell (token ids out of range, temperatures that are not
    positive) is not checked by the call itself, which would have to wait for the device: the row
    gives NaN and the first bad position is kept. This waits for the device and raises. With
    PPO_KERNELS_DEBUG=1 in the environment every call checks.

    Args:
        device: A GPU; None for every one that ran a kernel. Naming one also prepares it for capture
            in a CUDA graph as the first thing it does.

    Raises:
        ValueError: Naming the argument and the first bad flat position.
        RuntimeError: During capture of a CUDA graph, where nothing can be waited for.
    """
    if device is None:
        devices = list(_flags)
    else:
        named = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if named.type == "cuda" and named.index is None:
            named = torch.device("cuda", torch.cuda.current_device())
        if named.type == "cpu" and named not in _flags:
            return
        devices = [named]
    for each in devices:
        if _capturing(each):
            raise RuntimeError("check: cannot wait for the device while a CUDA graph is captured")
        kept = flag(each)
        fault = int(kept)
        if fault != NONE:
            kept.fill_(NONE)
            _checks.raise_device_fault(fault, each)


def note(bad: Tensor, kind: int) -> None:
    """Keep this fault of the first position where `bad` [N] is true, waiting for nothing."""
    if bad.numel():
        kept = flag(bad.device)
        code = torch.arange(bad.numel(), device=bad.device) << _checks.FAULT_KIND_BITS | kind
        kept.copy_(torch.minimum(kept, torch.where(bad, code, NONE).min()))


def check_in_debug_mode(device: torch.device) -> None:
    """For the end of every call that runs a GPU kernel."""
    if debug and device in _flags and not _capturing(device):
        check(device)
