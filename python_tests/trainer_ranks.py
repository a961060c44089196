"""Several processes on one machine that train the tiny model: `trainer_ranks.py FOLDER KIND...`."""

import json
import os
import shutil
import socket
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import torch
import trainer_tiny as tiny
from accelerate.commands import launch as accelerate_launch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from ppo_kernels.trainer import Config, ppo
from ppo_kernels.trainer.distributed import World
from ppo_kernels.trainer.rollout import Rollout, Sampler, response_mask

SETTINGS = {
    "device": "cpu", "threads": 1, "steps": 3, "rollouts": 16, "minibatch": 8, "micro_batch": 2,
    "epochs": 2, "max_new_tokens": 8, "lr": 3e-3, "value_lr": 1e-3, "eval_samples": 0,
    "tensorboard": False, "plots": False, "checkpoint_every": 2, "keep_checkpoints": 3,
    "entropy_coef": 0.01, "missing_eos_penalty": 0.2, "critic_warmup": 1, "kl_coef": 0.1,
}  # fmt: skip
# Minibatches are left out: of step 1 those with a broken advantage, of others those too far away.
# Then the critic learns alone, and by the decay all would move that shall not.
SKIPPING = {
    "nonfinite": "skip", "max_update_kl": 0.002, "value_epochs": 3, "separate_value_model": True,
    "weight_decay": 0.1, "checkpoint_every": 0,
}  # fmt: skip


class FixedSampler(Sampler):
    """Completions that depend on their prompts alone: whoever samples them, they are the same."""

    def __call__(self, prompts):
        batch = self.tokenizer(list(prompts), padding=True, return_tensors="pt")
        rows = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            length = int(torch.randint(1, 9, (), generator=generator))
            tokens = torch.randint(4, 16, (length,), generator=generator)
            if length < 8:
                tokens[-1] = self.eos_ids[0]
            rows.append(tokens)
        longest = max(len(tokens) for tokens in rows)
        responses = torch.full((len(rows), longest), self.pad_id)
        for row, tokens in zip(responses, rows, strict=True):
            row[: len(tokens)] = tokens
        mask, ended = response_mask(responses, self.eos_ids)
        mask &= responses != self.pad_id
        texts = [self.tokenizer.decode(t, skip_special_tokens=True) for t in rows]
        attention = torch.cat([batch["attention_mask"], mask.long()], dim=1)
        sequences = torch.cat([batch["input_ids"], responses], dim=1)
        return Rollout(sequences, attention, mask, ended, texts)


def spoiling(make_experience):
    """Break an advantage of step 1."""
    steps = []

    def make(*arguments, **keywords):
        experience = make_experience(*arguments, **keywords)
        steps.append(experience)
        if len(steps) == 2:
            experience.advantages[0] = torch.nan
        return experience

    return make


def train(folder, sampler=FixedSampler, **settings):
    """Train with fixed completions, or with those of another sampler."""
    original, ppo.Sampler = (ppo.Sampler, ppo.make_experience), sampler
    if settings.get("nonfinite") == "skip":
        ppo.make_experience = spoiling(ppo.make_experience)
    try:
        return ppo.train(
            replace(Config(output_dir=str(folder), **SETTINGS), **settings),
            model=tiny.model(),
            tokenizer=tiny.tokenizer(),
            reward=tiny.reward,
            prompts=tiny.PROMPTS,
        )
    finally:
        ppo.Sampler, ppo.make_experience = original


def launch(folder, *kinds, count=2):
    """Run this file in `count` processes; raise unless all succeed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder), *kinds],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


def main(folder, *kinds):
    """Of each kind: train, again from a checkpoint, with gaps, and with completions of its own."""
    folder = Path(folder)
    is_main = os.environ["RANK"] == "0"
    found, prepare = [], World.prepare

    def recording(self, model, optimizer):
        if self.kind == "DEEPSPEED":  # ZeRO 3 leaves small weights whole, so all of these
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        prepared, optimizer = prepare(self, model, optimizer)
        weight = model.policy.get_output_embeddings().weight
        parts = prepared, model.policy.base_model.h[0], weight
        found.append([*(type(part).__name__ for part in parts), weight.numel()])
        return prepared, optimizer

    World.prepare = recording
    for kind in kinds:
        choose(kind)
        train(folder / kind)
        if is_main:
            again = folder / f"{kind}-again"
            shutil.copytree(folder / kind, again)
            shutil.rmtree(again / "checkpoints" / "step-000003")
            (again / "summary.json").unlink()
        torch.distributed.barrier()
        train(folder / f"{kind}-again", resume=True)
        train(folder / f"{kind}-skipping", **SKIPPING)
        train(folder / f"{kind}-sampled", sampler=Sampler, steps=1, eval_samples=4, critic_warmup=0)
    if is_main:
        (folder / "kinds.json").write_text(json.dumps(found))


def choose(kind):
    """Bring the process into the state in which `accelerate launch` starts it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    if kind == "fsdp":
        layer = ("--fsdp_transformer_layer_cls_to_wrap", "GPT2Block")
        os.environ.update(launched("fsdp2.yaml", *layer))
        AcceleratorState.__init__ = fsdp_on_cpus(AcceleratorState.__init__)
    if kind.startswith("zero"):
        import deepspeed

        os.environ.update(launched("deepspeed.yaml", "--zero_stage", kind[-1]))
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes a minute to compile


def launched(name, *options):
    """Return what `accelerate launch` puts into the environment for one of our examples."""
    file = Path(__file__).parents[1] / "examples" / "accelerate" / name
    arguments = ["--config_file", str(file), *options, "script"]
    given = accelerate_launch.launch_command_parser().parse_args(arguments)
    given, defaults, _ = accelerate_launch._validate_launch_command(given)
    given.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    if given.use_deepspeed:
        return prepare_deepspeed_cmd_env(given)[1]
    return prepare_multi_gpu_env(given)


def fsdp_on_cpus(init):
    """Let accelerate start FSDP on the CPU too, which it refuses; all that follows is its own."""

    def initialize(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    return initialize


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
