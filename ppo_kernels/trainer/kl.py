"""The weight of the KL penalty."""

from ppo_kernels.trainer.config import Config


class KLController:
    """The weight of the KL penalty, fixed or under proportional control in log space.

    Ziegler et al. 2019, https://arxiv.org/abs/1909.08593, section 2.2, with the gain written as
    completions / horizon, as in the authors' code.
    """

    def __init__(self, config: Config) -> None:
        self.coef, self.target = config.kl_coef, config.kl_target
        self.gain = config.rollouts / config.kl_horizon

    def update(self, divergence: float) -> None:
        """Move the weight so that the divergence, in nats per completion, nears the target."""
        if self.target is not None:
            error = min(max(divergence / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + self.gain * error
