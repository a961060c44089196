"""The commands beside `ppo-kernels train`; each prints what came of it."""

from collections.abc import Sequence

from transformers.utils import logging

from ppo_kernels.trainer.cli import run_command
from ppo_kernels.trainer.evaluation import EvalConfig, evaluate_policy
from ppo_kernels.trainer.fine_tuning import SFTConfig, sft
from ppo_kernels.trainer.generation import GenerateConfig, as_lines, generate
from ppo_kernels.trainer.rating import RateConfig, rate
from ppo_kernels.trainer.reward import RewardConfig, train_reward
from ppo_kernels.trainer.rlhf.run import RLHFConfig, run

logging.disable_progress_bar()  # of loading weights; the steps have their own


def main_sft(argv: Sequence[str] | None = None) -> int:
    """Run `ppo-kernels sft`; return the exit status."""

    def work(config: SFTConfig) -> None:
        result = sft(config)
        print(
            f"held-out perplexity {result.perplexity_before:.1f} before, "
            f"{result.perplexity:.1f} after; everything is in {result.output_dir}"
        )

    return run_command("ppo-kernels sft", argv, work, kind=SFTConfig)


def main_reward(argv: Sequence[str] | None = None) -> int:
    """Run `ppo-kernels reward`; return the exit status."""

    def work(config: RewardConfig) -> None:
        result = train_reward(config)
        agreed = result.agreement
        print(
            f"agrees with humans on {agreed.accuracy:.1%} of {agreed.pairs} held-out pairs; "
            f"everything is in {result.output_dir}"
        )

    return run_command("ppo-kernels reward", argv, work, kind=RewardConfig)


def main_rate(argv: Sequence[str] | None = None) -> int:
    """Run `ppo-kernels rate`; return the exit status."""

    def work(config: RateConfig) -> None:
        result = rate(config)
        print(f"{result.done} of {result.total} are answered; {result.output} has them")

    return run_command("ppo-kernels rate", argv, work, kind=RateConfig)


def main_generate(argv: Sequence[str] | None = None) -> int:
    """Run `ppo-kernels generate`; return the exit status."""

    def work(config: GenerateConfig) -> None:
        completions = generate(config)
        if config.output is None:
            print(as_lines(completions), end="")
        else:
            print(f"{len(completions)} completions are in {config.output}")

    return run_command("ppo-kernels generate", argv, work, kind=GenerateConfig)


def main_eval(argv: Sequence[str] | None = None) -> int:
    """Run `ppo-kernels eval`; return the exit status."""

    def work(config: EvalConfig) -> None:
        result = evaluate_policy(config)
        print((result.output_dir / "report.md").read_text(), end="")
        print(f"\neverything is in {result.output_dir}")

    return run_command("ppo-kernels eval", argv, work, kind=EvalConfig)


def main_rlhf(argv: Sequence[str] | None = None) -> int:
    """Run `ppo-kernels rlhf`; return the exit status."""

    def work(config: RLHFConfig) -> None:
        print(run(config).read_text(), end="")

    return run_command("ppo-kernels rlhf", argv, work, kind=RLHFConfig)
