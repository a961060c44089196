"""Checkpoints: all that a run needs to go on as if it had never stopped. Nothing is pickled."""

import json
import logging
import os
import random
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppo_kernels._files import atomic_folder
from ppo_kernels.trainer.config import Config, InputError, UnstableError
from ppo_kernels.trainer.distributed import World, assign, like
from ppo_kernels.trainer.kl import KLController

FORMAT = 1
MANIFEST = "checkpoint.json"
# Settings that may differ between a checkpoint and the run that goes on from it.
FREE = {"output_dir", "overwrite", "resume", "steps", "checkpoint_every", "keep_checkpoints"} | {
    *(
        "threads",
        "table_rows",
        "plots",
        "tensorboard",
        "wandb",
        "completions_every",
        "profile_step",
    ),
    *("nonfinite", "max_kl", "max_update_kl"),
}
log = logging.getLogger(__name__)


@dataclass
class State:
    """What changes while a run goes on. The learning rates follow from the step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    controller: KLController
    shuffle: torch.Generator
    step: int = 0  # finished steps, which is also how many batches of prompts were taken
    tokens: int = 0
    seconds: float = 0.0


class Origin(NamedTuple):
    """What a run starts from besides its settings; a checkpoint of another origin is refused."""

    model: list[float]
    prompts: int

    @classmethod
    def of(cls, policy: nn.Module, prompts: Iterable[Mapping[str, Any]]) -> "Origin":
        """Norms of the initial weights, and a checksum of the prompts."""
        norms = [torch.linalg.vector_norm(p, 1, dtype=torch.float64) for p in policy.parameters()]
        texts = "\0".join(str(row["prompt"]) for row in prompts)
        return cls(torch.stack(norms).tolist(), zlib.crc32(texts.encode()))


class Contents(NamedTuple):
    """A checkpoint in memory."""

    manifest: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


class CheckpointError(Exception):
    """A checkpoint that cannot be read; it says why."""


class Checkpoints:
    """The newest checkpoints of a run, each a folder that is written whole or not at all."""

    def __init__(self, output: Path, origin: Origin, config: Config, world: World) -> None:
        self.output, self.folder = output, output / "checkpoints"
        self.origin, self.config, self.world = origin, config, world

    def paths(self) -> list[Path]:
        """Return the checkpoints, the newest first."""
        found = [p for p in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name)]
        return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)

    def save(self, state: State) -> bool:
        """Write a checkpoint and remove old ones; return whether it could be written.

        A full disk is reported and leaves the older checkpoints, and the run goes on.
        """
        path = self.folder / f"step-{state.step:06d}"
        contents = self._collect(state)
        if not self.world.is_main:
            return True
        self._clean()
        try:
            write(path, contents)
        except (OSError, SafetensorError) as error:
            older = self.paths()
            log.warning(
                "checkpoint %s could not be written: %s; %s; training goes on",
                *(path, error, f"the last one is {older[0]}" if older else "there is none yet"),
            )
            return False
        for old in self.paths()[self.config.keep_checkpoints :]:
            gone = old.with_name(f".{old.name}.old")
            old.rename(gone)  # never a half-removed folder under a checkpoint's name
            shutil.rmtree(gone, ignore_errors=True)
        return True

    def stop(self, state: State, batch: NamedTuple, reason: str) -> NoReturn:
        """Leave the state and the batch in output_dir/failure, and raise UnstableError."""
        path = self.output / "failure"
        contents = self._collect(state)
        where = f"weights, optimizer and rollouts are in {path}"
        if self.world.is_main:
            try:
                write(path, contents, batch=batch._asdict())
            except (OSError, SafetensorError) as error:
                where = f"its state could not be written to {path}: {error}"
        older = self.paths()
        last = f"the last checkpoint is {older[0]}" if older else "there is no checkpoint"
        raise UnstableError(f"step {state.step}: {reason}; {where}; {last}")

    def _collect(self, state: State) -> Contents:
        contents = collect(state, self.world)
        contents.manifest.update(origin=self.origin._asdict(), config=asdict(self.config))
        return contents

    def _clean(self) -> None:
        """Remove what a killed process left half-written."""
        for path in [*self.folder.glob(".step-*.tmp"), *self.folder.glob(".step-*.old")]:
            shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> Contents | None:
        """Read the newest readable checkpoint, or return None where there is none at all.

        Raises:
            InputError: If all are unreadable, or it belongs to another run.
        """
        reasons = []
        for path in self.paths():
            try:
                contents = read(path)
            except CheckpointError as error:
                reasons.append(f"{path.name}: {error}")
                log.warning("checkpoint %s cannot be used: %s", path, error)
                continue
            self._check(path, contents.manifest)
            return contents
        if reasons:
            raise InputError(
                f"resume: no checkpoint in {self.folder} can be read ({'; '.join(reasons)}); "
                "without resume, and with overwrite: true, the run begins anew"
            )
        return None

    def _check(self, path: Path, manifest: dict[str, Any]) -> None:
        given = asdict(self.config)
        for key in sorted(given.keys() | manifest["config"].keys()):
            was, now = manifest["config"].get(key), given.get(key)
            if key not in FREE and was != now:
                raise InputError(f"{key}: given {now!r}, but {path} was made with {was!r}")
        if self.config.steps < manifest["step"]:
            raise InputError(
                f"steps: given {self.config.steps}, but {path} is after {manifest['step']}"
            )
        if manifest["origin"]["prompts"] != self.origin.prompts:
            raise InputError(f"prompts: {path} was made with other prompts")
        was, now = manifest["origin"]["model"], self.origin.model
        if len(was) != len(now) or not np.allclose(was, now, rtol=1e-6, atol=0):
            raise InputError(f"model: {path} was made from a model with other weights")


def collect(state: State, world: World) -> Contents:
    """Bring a state into the form of a checkpoint; every process takes part."""
    model = world.whole(trained_parameters(state.model))
    saved = state.optimizer.state_dict()
    optimizer = world.whole(
        {
            f"{i}.{key}": torch.as_tensor(value)
            for i, entries in saved["state"].items()
            for key, value in entries.items()
        }
    )
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "kl_coef": state.controller.coef,
        "param_groups": saved["param_groups"],
        "shuffle": _to_hex(state.shuffle.get_state()),
        "random": world.gather_objects(random_state()),
    }
    return Contents(manifest, model, optimizer)


def restore(state: State, contents: Contents, world: World) -> None:
    """Put a state back, in place."""
    manifest = contents.manifest
    parameters = trained_parameters(state.model)
    if parameters.keys() != contents.model.keys():
        odd = sorted(parameters.keys() ^ contents.model.keys())
        raise InputError(f"model: the checkpoint has other weights, beginning with {odd[0]}")
    if len(manifest["random"]) != world.size:
        count = len(manifest["random"])
        raise InputError(f"resume: the checkpoint is of {count} processes, these are {world.size}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            assign(parameter, contents.model[name])
    entries: dict[int, dict[str, Tensor]] = {}
    flat = [p for group in state.optimizer.param_groups for p in group["params"]]
    for name, value in contents.optimizer.items():
        index, _, key = name.partition(".")
        entries.setdefault(int(index), {})[key] = like(value, flat[int(index)])
    state.optimizer.load_state_dict({"state": entries, "param_groups": manifest["param_groups"]})
    state.controller.coef = manifest["kl_coef"]
    state.shuffle.set_state(_from_hex(manifest["shuffle"]))
    state.step, state.tokens = manifest["step"], manifest["tokens"]
    state.seconds = manifest["seconds"]
    set_random_state(manifest["random"][world.rank])


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def write(path: Path, contents: Contents, **more: Mapping[str, Tensor]) -> None:
    """Write a checkpoint, and further files of tensors, through to the disk."""
    files = {"model": contents.model, "optimizer": contents.optimizer, **more}
    with atomic_folder(path) as temporary:
        sums = {}
        for name, tensors in files.items():
            file = temporary / f"{name}.safetensors"
            save_file({key: value.contiguous() for key, value in tensors.items()}, file)
            sums[file.name] = _checksum(file)
        manifest = contents.manifest | {"files": sums}
        (temporary / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        for name in [*sums, MANIFEST, ""]:
            _sync(temporary / name)
    _sync(path.parent)


def read(path: Path) -> Contents:
    """Read a checkpoint; raise CheckpointError unless every byte is as it was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"its format is {manifest['format']!r}, expected {FORMAT}")
        for name, expected in manifest["files"].items():
            if _checksum(path / name) != expected:
                raise CheckpointError(f"{name} is not as it was written")
        model, optimizer = (load_file(path / f"{n}.safetensors") for n in ("model", "optimizer"))
    except OSError as error:
        raise CheckpointError(f"{Path(error.filename or path).name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{type(error).__name__}: {error}") from error
    return Contents(manifest, model, optimizer)


def random_state() -> dict[str, Any]:
    """Return the states of all global random number generators, as JSON can hold them."""
    kind, keys, *rest = np.random.get_state()
    return {
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": [_to_hex(s) for s in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Undo `random_state`, also after a way through JSON."""
    torch.set_rng_state(_from_hex(state["torch"]))
    if state["cuda"]:
        torch.cuda.set_rng_state_all([_from_hex(s) for s in state["cuda"]])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(state["numpy"]))


def _to_hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def _from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


def _checksum(file: Path) -> list[int]:
    total, size = 0, 0
    with open(file, "rb") as stream:
        while block := stream.read(1 << 22):
            total, size = zlib.crc32(block, total), size + len(block)
    return [size, total]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
