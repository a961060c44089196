"""How kernels are launched: one place, so that the rules hold for all of them.

- The grid is one-dimensional: axis x alone takes more than 65535 programs.
- Multiplications and additions are never fused behind our back: the same device function must give
  the same bits in whatever kernel it is inlined. Where fusing pays, kernels say ``tl.fma``.
- Nothing is tuned at run time: several kernels write their input.

Launchers compute everything from shapes, dtypes and strides, so meta tensors drive them too: the
tests compile for any GPU what the public functions launch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from ._configs import Config

# Only NVIDIA's compiler takes a limit of registers.
NVIDIA = torch.version.hip is None


def launch(kernel: Any, programs: int, *args: Any, config: Config, **constants: Any) -> None:
    """Run `programs` programs of `kernel` on the current device and stream."""
    if programs:
        options = {"num_warps": config.num_warps, "enable_fp_fusion": False}
        if NVIDIA:
            options["maxnreg"] = config.max_registers
        else:
            options["num_warps"] = max(1, 32 * config.num_warps // _lanes(driver.active))
        kernel[(programs,)](*args, **constants, **options)


@lru_cache
def _lanes(active: Any) -> int:
    """Of a warp of the driver's devices."""
    return active.get_current_target().warp_size


def strides(t: Tensor | None, inner: int = 0) -> tuple[int, ...]:
    """Strides of [B, T] and `inner` more dimensions; missing leading dimensions have stride 0."""
    if t is None:
        return (0,) * (2 + inner)
    own = t.stride()
    return (0,) * (2 + inner - len(own)) + own


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as bytes: one kernel for both."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask
