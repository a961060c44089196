"""DeepSpeed's engine behind what the training loop asks of an optimizer."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.optim import Optimizer

from ppo_kernels.trainer.config import Config, InputError

MOMENTS = ("exp_avg", "exp_avg_sq")


def configure(plugin: Any, config: Config) -> None:
    """Check the launcher's DeepSpeed configuration, and put our settings into it."""
    given = plugin.deepspeed_config
    zero = given["zero_optimization"]
    if zero["stage"] not in (1, 2, 3):
        raise InputError(f"DeepSpeed: given ZeRO stage {zero['stage']}, expected 1, 2 or 3")
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") not in (None, "none"):
            raise InputError(f"DeepSpeed: given {part}, which puts another optimizer in our place")
    for part in ("optimizer", "scheduler"):
        if part in given:
            raise InputError(f"DeepSpeed: given {part}, expected none; lr and others are settings")
    for part in ("bf16", "fp16"):
        if given.get(part, {}).get("enabled") is True:
            raise InputError(f"DeepSpeed: given {part}, expected neither; dtype is a setting")
    if plugin.zero3_init_flag:
        raise InputError(
            "DeepSpeed: given zero3_init_flag, expected false: models are loaded whole"
        )
    given["train_micro_batch_size_per_gpu"] = config.micro_batch
    given["gradient_accumulation_steps"] = 1  # the loop says where a minibatch ends
    given["gradient_clipping"] = config.max_grad_norm


class Zero(Optimizer):
    """An optimizer of a model's parameters that works through DeepSpeed's engine.

    Inside, AdamW has a flat shard of each group of parameters. The engine takes a missing gradient
    for 0, with which Adam moves weights all the same, and it cannot drop those of a minibatch. So
    just before AdamW steps, the gradients are taken away of all groups that shall stay as they are.
    """

    def __init__(self, accelerator: Any, model: nn.Module, adam: Optimizer) -> None:
        self.param_groups = [group | {"params": [*group["params"]]} for group in adam.param_groups]
        self.adam, self.shards = adam, adam.param_groups
        self.learning: set[int] = set()  # the groups that have a gradient
        for number, members in enumerate(self._trained()):
            for parameter in members:
                parameter.register_hook(partial(self._note, number))
        adam.register_step_pre_hook(self._before_step)
        self.engine, _ = accelerator.prepare(model, adam)
        self.stage = self.engine.zero_optimization_stage()
        self.flat = self._flat_shards()
        self._begin_state()

    def _trained(self) -> list[list[nn.Parameter]]:
        return [[p for p in group["params"] if p.requires_grad] for group in self.param_groups]

    def _flat_shards(self) -> list[list[Tensor]]:
        """Return the tensors of each group that AdamW updates."""
        if self.stage < 3:
            return [[*shards["params"]] for shards in self.shards]
        flat: list[list[Tensor]] = [[] for _ in self.shards]
        inner = self.engine.optimizer
        for number, tensor in enumerate(inner.fp32_partitioned_groups_flat):
            flat[inner.sub_group_to_group_id[number]].append(tensor)
        return flat

    def _begin_state(self) -> None:
        """Make Adam's state as it is before any step: DeepSpeed links its parts only once."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for members, flat in zip(self._trained(), self.flat, strict=True):
            for shard in flat:
                self.adam.state[shard] = {"step": torch.tensor(0.0)}
                self.adam.state[shard] |= {key: torch.zeros_like(shard) for key in MOMENTS}
            if self.stage < 3:
                lazy_init_hp_params_optimizer_state(members, flat[0], self.adam.state)

    def _note(self, number: int, _: Tensor) -> None:
        self.learning.add(number)

    def _before_step(self, *_: object) -> None:
        for number, (group, shards) in enumerate(zip(self.param_groups, self.shards, strict=True)):
            shards["lr"] = group["lr"]
            if number not in self.learning:
                for shard in shards["params"]:
                    shard.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add a gradient, averaged over the processes."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def grad_norm(self) -> Tensor:
        """Return the norm of the gradient, which the next step clips."""
        if self.stage < 3:
            return self.engine.optimizer.scaled_global_norm()
        from deepspeed.utils import safe_get_local_grad

        shards = [safe_get_local_grad(p) for members in self._trained() for p in members]
        square = torch.stack([shard.square().sum() for shard in shards]).sum()
        dist.all_reduce(square)
        return square.sqrt()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the groups that have a gradient."""
        self.engine.step()
        self.learning.clear()
        if self.stage == 3:
            self._forget()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that no step took, by a step in which no group moves."""
        if self.learning:
            self.learning.clear()
            self.step()

    def _forget(self) -> None:
        """Clear gradients, which would be there still where the next minibatch has none."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        for members in self._trained():
            for parameter in members:
                safe_set_local_grad(parameter, torch.zeros_like(safe_get_local_grad(parameter)))

    def state_dict(self) -> dict[str, Any]:
        """Return the state that AdamW has in a single process; all processes take part."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, dict[str, Tensor]] = {}
        groups, start = [], 0
        for group, flat in zip(self.param_groups, self.flat, strict=True):
            numbers = range(start, start := start + len(group["params"]))
            groups.append(group | {"params": [*numbers]})
            step = self.adam.state[flat[0]]["step"]
            for number, parameter in zip(numbers, group["params"], strict=True):
                if parameter.requires_grad:
                    parts = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                    state[number] = {"step": step.clone(), **parts}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, after the model's weights; the rates follow."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self.engine.optimizer.refresh_fp32_params()
        number = 0
        for group, flat in zip(self.param_groups, self.flat, strict=True):
            for parameter in group["params"]:
                if number in saved["state"]:
                    entry = saved["state"][number]
                    for shard in flat:
                        self.adam.state[shard]["step"].copy_(entry["step"])
                    for key in MOMENTS:
                        if self.stage < 3:
                            safe_set_full_optimizer_state(parameter, entry[key], key)
                        else:
                            shard = shard_like(entry[key], parameter)
                            safe_set_local_optimizer_state(parameter, shard, key)
                number += 1


def shard_like(value: Tensor, parameter: Any) -> Tensor:
    """Return this process's part of a value, where ZeRO 3 shards its parameter, with padding."""
    length = parameter.ds_tensor.numel()
    shard = value.flatten()[dist.get_rank() * length :][:length]
    return pad(shard, (0, length - len(shard)))


def local_shard(parameter: Any) -> Tensor:
    """Return this process's part of a parameter that ZeRO 3 shards, without the padding."""
    shard = parameter.ds_tensor.detach()
    return shard[: max(parameter.ds_numel - dist.get_rank() * shard.numel(), 0)]


def gathered(parameter: Tensor) -> Tensor:
    """Return a copy of a parameter that ZeRO 3 shards; all processes take part."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter]):
        return parameter.detach().clone()


def fill(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter that ZeRO 3 shards; all processes take part."""
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters([parameter], modifier_rank=0):
        parameter.copy_(value)
