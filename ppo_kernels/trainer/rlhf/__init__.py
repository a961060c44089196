"""The whole chain on real human ratings: language model, reward model, PPO, evaluation."""
