"""The entry point "ppo_kernels" of verl's plugins: what verl imports in every process, workers too.

PPO_KERNELS_VERL=register adds our policy losses to verl's registry, PPO_KERNELS_VERL=patch replaces
verl's functions; without it nothing is done. It has to be in the environment of the Ray workers.
"""

from __future__ import annotations

import logging
import os

WANTED = os.environ.get("PPO_KERNELS_VERL", "")


def _apply(wanted: str) -> None:
    log = logging.getLogger(__name__)
    try:
        from .. import verl

        if wanted == "patch":
            log.info("%s", verl.patch())
        elif wanted == "register":
            log.info("registered %s", ", ".join(verl.register()))
        else:
            raise ValueError(f"PPO_KERNELS_VERL: expected patch or register, got {wanted!r}")
    except Exception:
        log.exception("PPO_KERNELS_VERL=%s failed", wanted)  # verl tells of it only when debugging
        raise


if WANTED:
    _apply(WANTED)
