"""TRL's GRPO trainer on a tiny model, with TRL's functions and with ours: the same curve, timed.

    python examples/trl_grpo.py

Needs trl. The model and its vocabulary are made here, nothing is downloaded.
"""

import os
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils

from ppo_kernels.integrations import trl

WORDS = [f"w{i}" for i in range(2000)]


@dataclass
class Run:
    """A training run: its curve, its last weights, and what the log-probabilities took."""

    losses: list[float]
    grad_norms: list[float]
    rewards: list[float]
    weights: Tensor
    calls: int
    seconds: float
    of: float


def tokenizer() -> PreTrainedTokenizerFast:
    """Words of a made-up language."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def reward(completions: list[str], **_: object) -> list[float]:
    """The share of words of low number."""
    words = [[int(word[1:]) for word in c.split() if word[0] == "w"] for c in completions]
    return [sum(w < len(WORDS) / 2 for w in ws) / max(len(ws), 1) for ws in words]


class Timed:
    """TRL's fused head, whichever it is, with its forward and backward passes timed."""

    def __init__(self, head: type) -> None:
        self.head, self.calls, self.seconds = head, 0, 0.0

    def apply(self, *args: object) -> tuple[Tensor, ...]:
        """The head's results."""
        start = time.perf_counter()
        made = self.head.apply(*args)
        self.calls += 1
        self.seconds += time.perf_counter() - start
        if made[0].requires_grad:
            logprobs, hidden = made[0], args[0]
            logprobs.register_hook(self._begin)
            hidden.register_hook(self._end)
        return made

    def _begin(self, _: Tensor) -> None:
        self._began = time.perf_counter()

    def _end(self, _: Tensor) -> None:
        self.seconds += time.perf_counter() - self._began


def train(steps: int, output_dir: Path, ours: bool) -> Run:
    """A run from one seed."""
    torch.manual_seed(0)
    words = tokenizer()
    config = GPT2Config(
        vocab_size=len(words), n_positions=64, n_embd=64, n_layer=2, n_head=2,
        bos_token_id=1, eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    args = GRPOConfig(
        output_dir=str(output_dir), max_steps=steps, per_device_train_batch_size=8,
        num_generations=4, max_completion_length=16, learning_rate=1e-3, logging_steps=1, seed=0,
        use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True, beta=0.01,
        gradient_checkpointing=False,
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(64)]})
    with trl.patch() if ours else nullcontext():
        head = utils._ChunkedLogProbFunction
        timed = utils._ChunkedLogProbFunction = Timed(head)
        try:
            # TRL looks for a model's files, so they are made first.
            path = output_dir / "model"
            GPT2LMHeadModel(config).save_pretrained(path)
            words.save_pretrained(path)
            model = GPT2LMHeadModel.from_pretrained(path)
            trainer = GRPOTrainer(
                model, reward_funcs=reward, args=args, train_dataset=prompts, processing_class=words
            )
            trainer.remove_callback(PrinterCallback)
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
        finally:
            utils._ChunkedLogProbFunction = head
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return Run(
        losses=[log["loss"] for log in logs],
        grad_norms=[log["grad_norm"] for log in logs],
        rewards=[log["reward"] for log in logs],
        weights=torch.cat([p.detach().flatten() for p in model.parameters()]),
        calls=timed.calls,
        seconds=timed.seconds,
        of=seconds,
    )


def compare(steps: int, output_dir: Path) -> dict[str, Run]:
    """Both runs."""
    return {name: train(steps, output_dir, ours=name != "trl") for name in ("trl", "ppo_kernels")}


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        runs = compare(int(sys.argv[1]) if len(sys.argv) > 1 else 20, Path(directory))
    for name, run in runs.items():
        print(
            f"{name:12} log-probabilities {run.seconds:.2f} s of {run.of:.1f} s ({run.calls} calls)"
        )
    print(f"{'step':>4} {'reward':>18} {'loss':>22} {'gradient norm':>20}")
    for i, _ in enumerate(runs["trl"].losses):
        pairs = [
            f"{a:9.5f} {b:9.5f}"
            for a, b in (
                (getattr(runs["trl"], key)[i], getattr(runs["ppo_kernels"], key)[i])
                for key in ("rewards", "losses", "grad_norms")
            )
        ]
        print(f"{i + 1:4} {'  '.join(pairs)}")


if __name__ == "__main__":
    main()
