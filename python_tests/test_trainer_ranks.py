"""Two processes train as one does: the same losses, metrics and weights."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import trainer_ranks as ranks
from safetensors.torch import load_file


def metrics(folder):
    rows = [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
    return [
        {k: math.nan if v is None else v for k, v in row.items()
         if not k.startswith(("time/", "memory/"))}
        for row in rows
    ]  # fmt: skip


def weights(folder):
    files = ("policy/model.safetensors", "value/head.safetensors", "value/trunk/model.safetensors")
    found = [file for name in files if (file := Path(folder, name)).exists()]
    return {f"{file.parent.name}.{k}": v for file in found for k, v in load_file(file).items()}


def assert_same(folder, expected, tolerance):
    for row, wanted in zip(metrics(folder), metrics(expected), strict=True):
        assert row.keys() == wanted.keys()
        for key, value in row.items():
            # norms and extremes of gradients at rounding's mercy get an absolute tolerance too
            want = pytest.approx(wanted[key], rel=tolerance, abs=tolerance, nan_ok=True)
            assert value == want, f"step {row['step']}: {key}"
    got, want = weights(folder), weights(expected)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("single")
    ranks.train(folder)
    ranks.train(folder / "skipping", **ranks.SKIPPING)
    torch.set_num_threads(threads)
    skipped = [row["skipped"] for row in metrics(folder / "skipping")]
    assert skipped[1] > 1  # once an epoch, but for what the policy's divergence ended
    assert skipped[2] > 0
    return folder


def assert_trains_as_one(single, folder, kind):
    assert_same(folder / kind, single, 2e-5)
    assert_same(folder / f"{kind}-skipping", single / "skipping", 2e-5)
    # From a checkpoint, to the bit.
    assert metrics(folder / f"{kind}-again") == metrics(folder / kind)
    assert_same(folder / f"{kind}-again", folder / kind, 0)
    # With completions that the processes sample themselves.
    assert len(metrics(folder / f"{kind}-sampled")) == 1


def test_two_processes_train_as_one(single, tmp_path):
    ranks.launch(tmp_path, "ddp", "fsdp")
    tokens = [row["completion/tokens"] for row in metrics(single)]
    assert len(set(tokens)) > 1  # unequal denominators
    moved = weights(single)["policy.transformer.h.0.attn.c_attn.weight"]
    start = ranks.tiny.model().state_dict()["transformer.h.0.attn.c_attn.weight"]
    assert (moved - start).abs().max() > 1e-3
    kinds = json.loads((tmp_path / "kinds.json").read_text())
    assert kinds[:4] == 4 * [["DistributedDataParallel", "GPT2Block", "Parameter", 512]]
    assert kinds[4:] == 4 * [["FSDPActorCritic", "FSDPGPT2Block", "DTensor", 512]]
    assert_trains_as_one(single, tmp_path, "ddp")
    assert_trains_as_one(single, tmp_path, "fsdp")


def test_two_processes_under_deepspeed_train_as_one(single, tmp_path):
    pytest.importorskip("deepspeed", reason="make test-deepspeed installs it")
    stages = ("zero1", "zero2", "zero3")
    ranks.launch(tmp_path, *stages)
    kinds = json.loads((tmp_path / "kinds.json").read_text())
    assert kinds[:8] == 8 * [["DeepSpeedEngine", "GPT2Block", "Parameter", 512]]
    assert kinds[8:] == 4 * [["DeepSpeedEngine", "GPT2Block", "Parameter", 0]]
    for stage in stages:
        assert_trains_as_one(single, tmp_path, stage)
