"""The processes of a run: one, or those that `accelerate launch` started."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.functional import pad
from torch.nn.utils import clip_grad_norm_, get_total_norm

from ppo_kernels.trainer.config import Config, InputError
from ppo_kernels.trainer.model import resolve_device
from ppo_kernels.trainer.zero import Zero, Zero3, configure, fill, gathered


class World:
    """What the processes share. A single process needs no accelerate, and every method is simple.

    Every process samples its part of a step's prompts; all of them then hold all experience, and
    of every minibatch each learns from its part. So losses have the denominators of the whole
    minibatch, and one process and several make the same updates of the same rollouts.
    """

    def __init__(self, config: Config) -> None:
        self.rank, self.size, self.accelerator, self.kind = 0, 1, None, "NO"
        self.group: dist.ProcessGroup | None = None
        self.zero: Zero | None = None
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

        only_values = (config.critic_warmup, config.value_epochs or 0, config.max_update_kl or 0)
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=any(only_values))]
        on_cpu = resolve_device(config.device).type == "cpu"
        if on_cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            on_cpu = False  # which to accelerate means: not with DeepSpeed
            handlers.append(InitProcessGroupKwargs(backend="gloo"))
        self.accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=handlers)
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        self.group = dist.group.WORLD
        self.kind = self.accelerator.distributed_type.value
        if self.kind == "DEEPSPEED":
            configure(self.accelerator.state.deepspeed_plugin, config)
        if self.kind == "MEGATRON_LM" or (self.kind == "FSDP" and not self.is_sharded):
            raise InputError("given FSDP 1 or Megatron, expected DDP, FSDP 2 or DeepSpeed")
        if self.accelerator.mixed_precision != "no":
            given = self.accelerator.mixed_precision
            raise InputError(f"mixed_precision: given {given!r}, expected 'no'; dtype is a setting")
        if self.kind in ("FSDP", "DEEPSPEED") and config.dtype != "float32":
            raise InputError(f"dtype: given {config.dtype!r}, expected float32 under {self.kind}")
        for key in ("rollouts", "minibatch"):
            if getattr(config, key) % self.size:
                raise InputError(
                    f"{key}: given {getattr(config, key)}, "
                    f"expected a multiple of the processes ({self.size})"
                )

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether no process holds all weights."""
        if self.accelerator is None:
            return False
        if self.kind == "DEEPSPEED":
            return self.accelerator.state.deepspeed_plugin.zero_stage == 3
        return self.accelerator.is_fsdp2

    def device(self, given: torch.device) -> torch.device:
        """Return this process's device."""
        return self.accelerator.device if self.accelerator else given

    def part(self, count: int) -> slice:
        """Return which of `count` rows are this process's."""
        own = count // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    def prepare(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Wrap the model and optimizer as the launcher's configuration says."""
        if self.accelerator is None:
            return model, optimizer
        if self.kind == "DEEPSPEED":
            kind = Zero3 if self.is_sharded else Zero
            self.zero = kind(self.accelerator, model, optimizer)
            return self.zero.engine, self.zero
        return self.accelerator.prepare(model, optimizer)

    @contextmanager
    def accumulating(self, model: nn.Module, last: bool) -> Iterator[None]:
        """Within this, gradients are exchanged only in the last backward pass of a minibatch."""
        if self.zero is not None:
            self.zero.engine.set_gradient_accumulation_boundary(last)
            yield
        elif self.accelerator is None or last:
            yield
        else:
            with self.accelerator.no_sync(model):
                yield

    def backward(self, loss: Tensor) -> None:
        """Add this process's part of a gradient; gradients are averaged, so it is multiplied."""
        if self.accelerator is None:
            loss.backward()
        elif self.zero is not None:
            self.zero.backward(loss * self.size)
        else:
            self.accelerator.backward(loss * self.size)

    def clip_grad_norm(self, model: nn.Module, largest: float) -> Tensor:
        """Clip the gradient of all processes' shards; return its norm before."""
        if self.zero is not None:
            return self.zero.grad_norm()
        norm = clip_grad_norm_(model.parameters(), largest)
        return whole(norm)

    def weight_norm(self, model: nn.Module) -> Tensor:
        """Return the norm of all weights."""
        if isinstance(self.zero, Zero3):
            return self.zero.weight_norm()
        return whole(get_total_norm([p.detach() for p in model.parameters()]))

    def whole(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather sharded tensors; all processes take part."""
        if isinstance(self.zero, Zero3):
            self.zero.release()
        return {name: whole(value) for name, value in shards.items()}

    def sum(self, value: Tensor) -> Tensor:
        """Add up the processes' values."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def gather(self, rows: Tensor, left: bool = False) -> Tensor:
        """Return the rows `[B, ...]` of all processes; `[B, T]` is padded with 0 to the longest."""
        if self.group is None:
            return rows
        if rows.dim() > 1:
            longest = torch.tensor(rows.shape[1], device=rows.device)
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.group)
            missing = int(longest) - rows.shape[1]
            rows = pad(rows, (missing, 0) if left else (0, missing))
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous(), group=self.group)
        return torch.cat(parts)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return every process's value."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def wait(self) -> None:
        """Wait for all processes."""
        if self.group is not None:
            dist.barrier(self.group)


def whole(value: Tensor) -> Tensor:
    """Gather a sharded tensor; all processes take part."""
    if hasattr(value, "ds_id"):
        return gathered(value)
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter, sharded or not, to a whole value; all processes take part."""
    if hasattr(parameter, "ds_id"):
        fill(parameter, value)
    else:
        parameter.copy_(like(value, parameter))


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Shard a whole value as its parameter is, if it is a DTensor."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
