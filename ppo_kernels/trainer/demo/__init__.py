"""The demo: PPO on real text, from nothing to a better language model in minutes."""

from ppo_kernels.trainer.demo.run import main

__all__ = ["main"]
