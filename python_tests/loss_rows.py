"""A policy's loss of rows of logits, with all its settings."""

import torch

import ppo_kernels as pk

EVERYTHING = {
    "entropy_coef": 0.05, "kl_coef": 0.3, "kl_gradient": "k2", "log_ratio_clamp": 0.5,
    "temperature": 0.8, "softcap": 6.0, "logit_scale": 0.9, "dual_clip": 1.5,
    "loss_scale": torch.tensor(8.0), "aggregation": "seq-mean-token-mean",
}  # fmt: skip
SETTINGS = [
    {},
    {"inplace": True},
    {"entropy": True},
    EVERYTHING,
    {"inplace": True, **EVERYTHING},
    *({"variant": variant, "kl_coef": 0.1} for variant in ("cispo", "sapo", "gpg")),
    *({"kl_coef": 0.3, "kl_gradient": gradient} for gradient in ("k1", "abs")),
]


def inputs(rows=3, cols=4, vocab=300, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(rows, cols, vocab, generator=g)).to(dtype)
    tokens = torch.randint(vocab, (rows, cols), generator=g)
    now = pk.logprobs_from_logits(logits, tokens, backend="torch")
    old, ref = (now + 0.4 * torch.randn(rows, cols, generator=g) for _ in range(2))
    mask = torch.rand(rows, cols, generator=g) < 0.7
    mask[0, 0] = True
    logits[~mask] = torch.nan
    return logits, tokens, old, ref, torch.randn(rows, generator=g), mask


def outcome(backend, logits, tokens, old, ref, advantages, mask, inplace=False, **settings):
    """All that a policy's loss gives, its gradient last."""
    leaf = logits.detach().requires_grad_()
    if settings.get("kl_coef"):
        settings["ref_logprobs"] = ref
    out = pk.ppo_loss_from_logits(
        leaf * 1, tokens, old, advantages, mask, inplace=inplace, backend=backend, **settings
    )
    (grad,) = torch.autograd.grad(out.loss, leaf)
    return [t for t in (out.loss, out.metrics.stats, *out[2:], grad) if t is not None]
