"""The demo: PPO on real text, from nothing to a better language model in minutes."""

from collections.abc import Sequence
from importlib.resources import files

from ppo_kernels.trainer.cli import run_command
from ppo_kernels.trainer.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ppo-kernels demo [--key value]`; return the exit status."""
    settings = str(files("ppo_kernels.trainer.demo") / "ppo.yaml")
    return run_command("ppo-kernels demo", argv, _demo, settings)


def _demo(config: Config) -> None:
    from ppo_kernels.trainer.demo.run import run

    run(config)
