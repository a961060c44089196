"""DeepSpeed's engine behind what the training loop asks of an optimizer."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils import get_total_norm
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
    """An optimizer of a model's parameters that works through DeepSpeed's engine: ZeRO 1 and 2.

    Inside, AdamW has flat shards of each group of parameters. The engine takes a missing gradient
    for 0, with which Adam moves weights all the same, and it cannot drop those of a minibatch. So
    just before AdamW steps, the gradients are taken away of all groups that shall stay as they are.
    """

    def __init__(self, accelerator: Any, model: nn.Module, adam: Optimizer) -> None:
        self.param_groups = [group | {"params": [*group["params"]]} for group in adam.param_groups]
        self.trained = [[p for p in g["params"] if p.requires_grad] for g in self.param_groups]
        self.adam, self.inner_groups = adam, adam.param_groups
        self.learning: set[int] = set()  # the groups that have a gradient
        for number, parameters in enumerate(self.trained):
            for parameter in parameters:
                parameter.register_hook(partial(self._note, number))
        adam.register_step_pre_hook(self._before_step)
        self.engine, _ = accelerator.prepare(model, adam)
        self.shards = self._find_shards()
        for shard in (shard for shards in self.shards for shard in shards):
            adam.state[shard] = {"step": torch.tensor(0.0)}
            adam.state[shard] |= {key: torch.zeros_like(shard) for key in MOMENTS}
        self._link_state()

    def _find_shards(self) -> list[list[Tensor]]:
        """Return the flat tensors of each group."""
        return [[*group["params"]] for group in self.inner_groups]

    def _link_state(self) -> None:
        """Tell parameters where their state is; DeepSpeed does it once, after its first step."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for parameters, (shard,) in zip(self.trained, self.shards, strict=True):
            lazy_init_hp_params_optimizer_state(parameters, shard, self.adam.state)

    def _note(self, number: int, _: Tensor) -> None:
        self.learning.add(number)

    def _before_step(self, *_: object) -> None:
        for number, (group, inner) in enumerate(
            zip(self.param_groups, self.inner_groups, strict=True)
        ):
            inner["lr"] = group["lr"]
            if number not in self.learning:
                for shard in inner["params"]:
                    shard.grad = None

    def backward(self, loss: Tensor) -> None:
        """Add a gradient, averaged over the processes."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def grad_norm(self) -> Tensor:
        """Return the norm of the gradient, which the next step clips."""
        return self.engine.optimizer.scaled_global_norm()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the groups that have a gradient."""
        self.engine.step()
        self.learning.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients that no step took, by a step in which no group moves."""
        if self.learning:
            self.learning.clear()
            self.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state that AdamW has in a single process; all processes take part."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, dict[str, Tensor]] = {}
        groups, start = [], 0
        for group, shards in zip(self.param_groups, self.shards, strict=True):
            numbers = range(start, start := start + len(group["params"]))
            groups.append(group | {"params": [*numbers]})
            step = self.adam.state[shards[0]]["step"]
            for number, parameter in zip(numbers, group["params"], strict=True):
                if parameter.requires_grad:
                    parts = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
                    state[number] = {"step": step.clone(), **parts}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, after the model's weights; the rates follow."""
        self.engine.optimizer.refresh_fp32_params()
        number = 0
        for group, shards in zip(self.param_groups, self.shards, strict=True):
            for parameter in group["params"]:
                if number in saved["state"]:
                    entry = saved["state"][number]
                    for shard in shards:
                        self.adam.state[shard]["step"].copy_(entry["step"])
                    for key in MOMENTS:
                        self._set_state(parameter, key, entry[key])
                number += 1

    def _set_state(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, key)


class Zero3(Zero):
    """The same where the weights are sharded too."""

    def _find_shards(self) -> list[list[Tensor]]:
        shards: list[list[Tensor]] = [[] for _ in self.inner_groups]
        inner = self.engine.optimizer
        for number, shard in enumerate(inner.fp32_partitioned_groups_flat):
            shards[inner.sub_group_to_group_id[number]].append(shard)
        return shards

    def _link_state(self) -> None:
        """Parameters look it up each time."""

    def grad_norm(self) -> Tensor:
        """Return the norm of the gradient, which the next step clips."""
        from deepspeed.utils import safe_get_local_grad

        shards = [safe_get_local_grad(p) for parameters in self.trained for p in parameters]
        return _norm_of_all(shards)

    def weight_norm(self) -> Tensor:
        """Return the norm of all weights."""
        return _norm_of_all([_without_padding(p) for p in self.engine.module.parameters()])

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the groups that have a gradient."""
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        super().step()
        # gradients stay until others replace them, and the next minibatch may have none
        for parameter in (p for parameters in self.trained for p in parameters):
            safe_set_local_grad(parameter, torch.zeros_like(safe_get_local_grad(parameter)))

    def _set_state(self, parameter: Any, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_local_optimizer_state

        length = parameter.ds_tensor.numel()  # with padding
        shard = value.flatten()[dist.get_rank() * length :][:length]
        safe_set_local_optimizer_state(parameter, pad(shard, (0, length - len(shard))), key)

    def release(self) -> None:
        """Let go of weights that were gathered for a next forward pass."""
        self.engine.empty_partition_cache()


def _norm_of_all(shards: list[Tensor]) -> Tensor:
    square = get_total_norm(shards).square()
    dist.all_reduce(square)
    return square.sqrt()


def _without_padding(parameter: Any) -> Tensor:
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
