"""The `triton` backend: one module per op family, with the functions of its ops' schemas.

Nothing here imports triton before a kernel is called, so that `import ppo_kernels` neither needs
nor waits for it. What the families share: `_launch` (the one place that launches, strides, the
split over few rows), `_configs` (tile sizes by shape class), `_math` (device functions).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

OLDEST = (3, 6)  # the oldest release the kernels are compiled with


def version() -> str | None:
    """Of the installed package; None also for a build under another name, such as ROCm's."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _unavailable() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    found = version()
    if found and tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"triton {found} is too old, expected {'.'.join(map(str, OLDEST))} or newer"
    return None


UNAVAILABLE = _unavailable()


def kernel(family: str, name: str) -> Callable[..., Any]:
    """Function `name` of module `family` of this package, imported when first called."""

    def call(*args: Any) -> Any:
        return getattr(import_module(f"{__name__}.{family}"), name)(*args)

    return call
