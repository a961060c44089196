"""A run that was interrupted, at any moment and in any way, goes on as if it had not been."""

import copy
import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

import trainer_tiny as tiny
from safetensors.torch import load_file

from ppo_kernels.trainer import Config, InputError, UnstableError, checkpoint, train
from ppo_kernels.trainer.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """Ends a run as nothing in it expects."""


def reward(completions):
    """Depends on every global random number generator that a checkpoint keeps."""
    noise = [random.random() + np.random.rand() + float(torch.rand(())) for _ in completions]
    return [r + 0.1 * n for r, n in zip(tiny.reward(completions), noise, strict=True)]


def killed_at(call):
    """The same reward, at whose given call the run is killed."""
    calls = []

    def killing(completions):
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return reward(completions)

    return killing


STEPS = 5
SETTINGS = {
    "threads": 1, "steps": STEPS, "rollouts": 8, "minibatch": 4, "epochs": 2, "max_new_tokens": 6,
    "lr": 3e-3, "value_lr": 3e-3, "eval_samples": 8, "tensorboard": False, "checkpoint_every": 1,
    "plots": False, "kl_target": 0.1, "kl_horizon": 100.0, "completions_every": 2,
    "weight_decay": 0.01,
}  # fmt: skip


def config(folder, **settings):
    return Config(output_dir=str(folder), **SETTINGS | settings)


def run(config, reward=reward):
    random.seed(0)
    np.random.seed(0)
    return train(
        config,
        model=tiny.model(),
        tokenizer=tiny.tokenizer(),
        reward=reward,
        prompts=tiny.PROMPTS[:20],
    )


def outcome(folder):
    """All that must be the same: weights, metrics, samples."""
    folder = Path(folder)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for line in lines:
        for key in [key for key in line if key.startswith(("time/", "memory/"))]:
            del line[key]
    files = ("policy/model.safetensors", "value/head.safetensors")
    weights = [(folder / name).read_bytes() for name in files]
    texts = [(folder / name).read_text() for name in ("samples.md", "completions.jsonl")]
    return lines, texts, weights


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    threads = torch.get_num_threads()
    run(config(folder, keep_checkpoints=STEPS))
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("finished", [0, 1, 3, STEPS])
def test_a_resumed_run_equals_an_uninterrupted_one(uninterrupted, tmp_path, finished):
    folder = tmp_path / "run"
    with pytest.raises(Killed):  # the first and the last call are for the samples before and after
        run(config(folder), killed_at(finished + 2))
    assert len((folder / "log.jsonl").read_text().splitlines()) == finished
    assert (folder / "checkpoints").exists() == (finished > 0)
    random.seed(finished), np.random.seed(finished), torch.manual_seed(finished)
    run(config(folder, resume=True))
    assert outcome(folder) == outcome(uninterrupted)


def test_checkpoints_between_which_steps_are_repeated(uninterrupted, tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(Killed):
        run(config(folder, checkpoint_every=2), killed_at(5))
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3
    with open(folder / "log.jsonl", "ab") as log:
        log.write(b'{"step": 3, "rew')  # the disk was full
    run(config(folder, checkpoint_every=2, resume=True))
    assert outcome(folder) == outcome(uninterrupted)


def test_only_the_newest_checkpoints_stay(uninterrupted, tmp_path):
    names = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert names == [f"step-{i:06d}" for i in range(1, STEPS + 1)]
    run(config(tmp_path / "run", keep_checkpoints=2, checkpoint_every=2))
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-000004", "step-000005"]


def test_nothing_in_a_checkpoint_is_pickled(uninterrupted):
    folder = uninterrupted / "checkpoints" / "step-000003"
    assert {path.name for path in folder.iterdir()} == {
        *("checkpoint.json", "model.safetensors", "optimizer.safetensors")
    }
    manifest = json.loads((folder / "checkpoint.json").read_text())
    assert (manifest["format"], manifest["step"]) == (1, 3)
    weights = load_file(folder / "model.safetensors")
    assert "value_head.weight" in weights
    assert sum(name.endswith(("wte.weight", "lm_head.weight")) for name in weights) == 1  # tied


MOMENTS = {
    "the tensors": (checkpoint, "save_file"),
    "the checksums": (checkpoint, "_checksum"),
    "the sync to the disk": (checkpoint, "_sync"),
    "the manifest": (Path, "write_text"),
    "the rename": (Path, "rename"),
    "the removal of the old": (shutil, "rmtree"),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_a_checkpoint_is_written(uninterrupted, tmp_path, monkeypatch, moment):
    """What kill -9 leaves, when no cleaning up runs, at each moment of the third checkpoint."""
    folder = tmp_path / "run"
    owner, name = MOMENTS[moment]
    original = getattr(owner, name)
    points = folder / "checkpoints"
    begun = ".step-000001.old" if moment == "the removal of the old" else ".step-000003*"
    left = tmp_path / "left"

    def killing(*arguments, **keywords):
        if list(points.glob(begun)) and not left.exists():
            if moment == "the tensors":
                Path(arguments[1]).write_bytes(b"half a fi")
            monkeypatch.undo()
            shutil.copytree(folder, left)
            raise Killed
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, killing)
    with pytest.raises(Killed):
        run(config(folder))
    assert any(path.name.startswith(".") for path in (left / "checkpoints").iterdir())
    run(config(left, resume=True))
    assert not any(path.name.startswith(".") for path in (left / "checkpoints").iterdir())
    assert outcome(left) == outcome(uninterrupted)


def test_kill_9_at_a_random_moment(uninterrupted, tmp_path):
    """Of a process that knows nothing about it."""
    folder = tmp_path / "run"
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_trainer_checkpoint as t; "
        "t.run(t.config(sys.argv[2]))"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent), str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    delay = random.Random().uniform(0, 1)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len((folder / "log.jsonl").read_bytes().splitlines())
    if not (folder / "summary.json").exists():
        run(config(folder, resume=True))
    assert outcome(folder) == outcome(uninterrupted), f"killed after {delay} s, {done} steps"


def copied(uninterrupted, tmp_path, keep=(2, 3)):
    """The run as if only these checkpoints were left."""
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    for path in (folder / "checkpoints").iterdir():
        if int(path.name[5:]) not in keep:
            shutil.rmtree(path)
    return folder


def damage(kind, path):
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    if kind == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "one bit":
        content[-100] ^= 4
        file.write_bytes(content)
    elif kind == "missing":
        file.unlink()
    elif kind == "manifest":
        (path / "checkpoint.json").write_text('{"format": 1, "st')
    elif kind == "format":
        (path / "checkpoint.json").write_text('{"format": 99}')
    elif kind == "permission":  # a folder cannot be read as a file, even by root
        file.unlink()
        file.mkdir()


DAMAGES = {
    "cut": "optimizer.safetensors is not as it was written",
    "one bit": "optimizer.safetensors is not as it was written",
    "missing": "optimizer.safetensors: No such file or directory",
    "manifest": "JSONDecodeError",
    "format": "its format is 99, expected 1",
    "permission": "optimizer.safetensors: Is a directory",
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(
    uninterrupted, tmp_path, caplog, kind
):
    folder = copied(uninterrupted, tmp_path)
    damage(kind, folder / "checkpoints" / "step-000003")
    with caplog.at_level(logging.WARNING):
        contents = checkpoints(folder).newest()
    assert contents.manifest["step"] == 2
    assert f"step-000003 cannot be used: {DAMAGES[kind]}" in caplog.text
    damage(kind, folder / "checkpoints" / "step-000002")
    with pytest.raises(InputError, match=r"resume: no checkpoint in .* can be read") as caught:
        checkpoints(folder).newest()
    assert str(caught.value).count(DAMAGES[kind]) == 2
    assert len(list((folder / "checkpoints").iterdir())) == 2  # nothing was removed


def checkpoints(folder, **settings):
    one = config(folder, resume=True, **settings)
    origin = checkpoint.Origin.of(tiny.model(), tiny.PROMPTS[:20])
    return checkpoint.Checkpoints(Path(folder), origin, one, checkpoint.World(one))


def test_checkpoints_of_other_runs_are_refused(uninterrupted):
    before = outcome(uninterrupted)
    for settings, expected in (
        ({"lr": 1.0}, "lr: given 1.0, but .*step-00000. was made with 0.003"),
        ({"seed": 5}, "seed: given 5, but .* was made with 0"),
        ({"steps": 2}, "steps: given 2, but .* is after 5"),
    ):
        with pytest.raises(InputError, match=expected):
            run(config(uninterrupted, resume=True, **settings))
    other = checkpoints(uninterrupted)
    other.origin = checkpoint.Origin.of(tiny.model(seed=9), tiny.PROMPTS[:20])
    with pytest.raises(InputError, match=r"model: .* was made from a model with other weights"):
        other.newest()
    other.origin = checkpoint.Origin.of(tiny.model(), tiny.PROMPTS)
    with pytest.raises(InputError, match=r"prompts: .* was made with other prompts"):
        other.newest()
    assert outcome(uninterrupted) == before


def test_a_finished_run_can_go_on_for_more_steps(uninterrupted, tmp_path):
    folder = copied(uninterrupted, tmp_path, keep=(STEPS,))
    run(config(folder, resume=True, steps=STEPS + 2))
    lines, _, _ = outcome(folder)
    assert [line["step"] for line in lines] == list(range(STEPS + 2))
    assert lines[STEPS]["lr"] == pytest.approx(3e-3 * (1 - STEPS / (STEPS + 2)))


def test_a_finished_run_without_checkpoints_is_not_replaced(uninterrupted, tmp_path):
    folder = copied(uninterrupted, tmp_path, keep=())
    with pytest.raises(InputError, match="holds a run already"):
        run(config(folder, resume=True))


def test_a_full_disk_loses_nothing(uninterrupted, tmp_path, monkeypatch, caplog):
    """The third checkpoint finds no space; the run goes on, and so can one that resumes."""
    folder = tmp_path / "run"
    original = checkpoint._sync

    def full(path):
        if ".step-000003" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path)

    monkeypatch.setattr(checkpoint, "_sync", full)
    with caplog.at_level(logging.WARNING), pytest.raises(Killed):
        run(config(folder), killed_at(5))
    assert "step-000003 could not be written: [Errno 28] No space left on device" in caplog.text
    assert "the last one is" in caplog.text
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002"]
    run(config(folder, resume=True))
    assert outcome(folder) == outcome(uninterrupted)
    assert (folder / "checkpoints" / "step-000005").exists()


def test_a_file_that_ends_early_for_want_of_space(uninterrupted, tmp_path, caplog):
    """The system itself refuses to write on, in the middle of a file of tensors."""
    folder = copied(uninterrupted, tmp_path)
    points = checkpoints(folder)
    state = state_of(points)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            assert not points.save(state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step-000004 could not be written" in caplog.text
    assert {path.name for path in points.folder.iterdir()} == {"step-000002", "step-000003"}
    assert points.save(state)
    assert points.newest().manifest["step"] == 4


def state_of(points):
    """A state after four steps, of another model than the run's."""
    from ppo_kernels.trainer.kl import KLController
    from ppo_kernels.trainer.model import ActorCritic

    actor = ActorCritic(tiny.model(seed=7), [0], separate=True)
    optimizer = torch.optim.AdamW(actor.parameters())
    sum(p.sum() for p in actor.parameters()).backward()
    optimizer.step()
    shuffle = torch.Generator().manual_seed(3)
    return checkpoint.State(actor, optimizer, KLController(points.config), shuffle, step=4)


def test_every_part_of_a_state_comes_back(tmp_path):
    points = checkpoints(tmp_path)
    state = state_of(points)
    state.controller.coef, state.tokens, state.seconds = 0.123, 77, 1.5
    torch.rand(5, generator=state.shuffle)
    points.save(state)
    draws = random.random(), np.random.rand(), torch.rand(3).tolist()
    saved = copy.deepcopy(state)
    with torch.no_grad():
        for parameter in state.model.parameters():
            parameter.zero_()
    for group in state.optimizer.param_groups:
        group["lr"] = 9.0
    for entry in state.optimizer.state.values():
        entry["exp_avg"].zero_(), entry["step"].zero_()
    checkpoint.restore(state, points.newest(), points.world)
    assert (random.random(), np.random.rand(), torch.rand(3).tolist()) == draws
    assert (state.step, state.tokens, state.seconds, state.controller.coef) == (4, 77, 1.5, 0.123)
    assert torch.equal(state.shuffle.get_state(), saved.shuffle.get_state())
    for now, was in zip(state.model.parameters(), saved.model.parameters(), strict=True):
        assert torch.equal(now, was)
    now, was = state.optimizer.state_dict(), saved.optimizer.state_dict()
    assert now["param_groups"][0]["lr"] == was["param_groups"][0]["lr"]
    assert now["state"].keys() == was["state"].keys()
    for i, entries in was["state"].items():
        for key, value in entries.items():
            assert torch.equal(now["state"][i][key], value)


# Runs that become unstable


def spoiled(monkeypatch, at, factor):
    """Multiply the advantages of one step."""
    from ppo_kernels.trainer import ppo

    original, calls = ppo.make_experience, []

    def spoiling(*arguments, **keywords):
        experience = original(*arguments, **keywords)
        calls.append(1)
        if len(calls) == at + 1:
            experience.advantages[0] *= factor
        return experience

    monkeypatch.setattr(ppo, "make_experience", spoiling)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(uninterrupted, tmp_path, monkeypatch, factor):
    folder = tmp_path / "run"
    spoiled(monkeypatch, 3, factor)
    with pytest.raises(UnstableError) as caught:
        run(config(folder))
    text = str(caught.value)
    assert text.startswith("step 3: epoch 0, minibatch ")
    assert f"are in {folder}/failure; the last checkpoint is {folder}/checkpoints/step-" in text
    batch = load_file(folder / "failure" / "batch.safetensors")
    assert not batch["advantages"].isfinite().all()
    weights = load_file(folder / "failure" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    monkeypatch.undo()
    run(config(folder, resume=True))
    assert outcome(folder) == outcome(uninterrupted)


def test_a_minibatch_that_is_not_finite_can_be_left_out(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    spoiled(monkeypatch, 3, float("nan"))
    run(config(folder, nonfinite="skip"))
    lines, _, _ = outcome(folder)
    assert [line["skipped"] for line in lines] == [0, 0, 0, 2, 0]  # once an epoch
    assert all(np.isfinite(line["loss"]) for line in lines)
    spoiled(monkeypatch, 0, float("nan"))
    with pytest.raises(UnstableError, match="step 0: every minibatch was left out"):
        run(config(folder, nonfinite="skip", minibatch=8, overwrite=True))


def test_an_exploding_divergence_stops_the_run(tmp_path, capsys):
    folder = tmp_path / "run"
    settings = {"lr": 0.3, "max_kl": 2.0, "kl_coef": 0.0, "kl_target": None, "max_grad_norm": 1e3}
    with pytest.raises(UnstableError, match=r"step \d: the KL to the reference is .* max_kl is 2;"):
        run(config(folder, **settings))
    assert (folder / "failure" / "batch.safetensors").exists()


def test_weights_that_are_not_finite_stop_the_run(tmp_path):
    with pytest.raises(UnstableError, match="step 0: the weights are no longer finite"):
        run(config(tmp_path / "run", lr=1e37, epochs=1, minibatch=8))


def test_updates_that_go_too_far_are_left_out(tmp_path):
    free, held = tmp_path / "free", tmp_path / "held"
    for folder, limit in ((free, None), (held, 1e-4)):
        run(config(folder, max_update_kl=limit, lr=3e-2))
    free, held = (outcome(folder)[0] for folder in (free, held))
    assert max(line["policy/kl_k3"] for line in free) > 1e-3
    assert max(line["policy/kl_k3"] for line in held) <= 1e-4
    assert all(line["skipped"] == 1 for line in held)
    assert held[0]["value/tokens"] > held[0]["policy/tokens"]


def test_the_command_line_says_why_it_stopped(tmp_path, capsys):
    file, prompts = tiny.__file__, tmp_path / "prompts.txt"
    prompts.write_text("w1\nw2\n")
    argv = [f"--model={file}:model", f"--tokenizer={file}:tokenizer", f"--prompts={prompts}"]
    argv += [f"--reward={file}:reward", f"--output_dir={tmp_path / 'run'}", "--lr=1e37", "--resume"]
    argv += [
        "--rollouts=4",
        "--minibatch=4",
        "--max_new_tokens=4",
        "--eval_samples=0",
        "--epochs=1",
    ]
    assert main(argv) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("ppo-kernels train: stopped: step 0: the weights are no longer finite")
