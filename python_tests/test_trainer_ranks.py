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
    files = ("policy/model.safetensors", "value/head.safetensors")
    return {k: v for name in files for k, v in load_file(Path(folder, name)).items()}


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
    torch.set_num_threads(threads)
    return folder


def test_two_processes_train_as_one(single, tmp_path):
    ranks.launch(tmp_path)
    tokens = [row["completion/tokens"] for row in metrics(single)]
    assert len(set(tokens)) > 1  # unequal denominators
    moved = weights(single)["transformer.h.0.attn.c_attn.weight"]
    start = ranks.tiny.model().state_dict()["transformer.h.0.attn.c_attn.weight"]
    assert (moved - start).abs().max() > 1e-3
    kinds = json.loads((tmp_path / "kinds.json").read_text())
    assert kinds[:3] == 3 * [["DistributedDataParallel", "GPT2Block", "Parameter"]]
    assert kinds[3:] == 3 * [["FSDPActorCritic", "FSDPGPT2Block", "DTensor"]]
    for kind in ("ddp", "fsdp"):
        assert_same(tmp_path / kind, single, 2e-5)
        # From a checkpoint, to the bit.
        assert metrics(tmp_path / f"{kind}-again") == metrics(tmp_path / kind)
        assert_same(tmp_path / f"{kind}-again", tmp_path / kind, 0)
        # With completions that the processes sample themselves.
        assert len(metrics(tmp_path / f"{kind}-sampled")) == 1
