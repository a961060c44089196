"""The scorer gives what a model's own logits give, from hidden states or from those logits."""

import logging

import pytest
import torch
import trainer_tiny as tiny
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import ppo_kernels as pk
from ppo_kernels.trainer.scorer import Scorer

SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "llama tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "phi, with a bias": lambda: PhiForCausalLM(PhiConfig(**SMALL)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32)),
    "gemma2, capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=2.0)),
    "cohere, scaled": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)),
    "cohere2, scaled": lambda: Cohere2ForCausalLM(Cohere2Config(**SMALL, logit_scale=0.25)),
    "granite, divided": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
    "gpt2": lambda: tiny.model(vocab_size=40),
}
BATCH, PROMPT, LENGTH = 3, 4, 6


def example(vocab=40):
    g = torch.Generator().manual_seed(0)
    sequences = torch.randint(4, vocab, (BATCH, PROMPT + LENGTH), generator=g)
    attention = torch.ones_like(sequences)
    attention[1, :2] = 0
    mask = torch.rand(BATCH, LENGTH, generator=g) < 0.8
    return sequences, attention, mask, torch.randn(BATCH, LENGTH, generator=g)


def outcome(scorer, sequences, attention, mask, advantages):
    """Log-probabilities, and loss and gradients of the policy."""
    scorer.policy.zero_grad()
    states, hidden = scorer.states(sequences, attention, LENGTH)
    tokens = sequences[:, -LENGTH:]
    logprobs = scorer.logprobs(states, tokens, mask=mask, temperature=0.8)
    loss = scorer.loss(
        states, tokens, logprobs.detach() - 0.1, advantages, mask,
        temperature=0.8, entropy_coef=0.1,
    ).loss  # fmt: skip
    (loss + hidden.float().square().mean()).backward()
    grads = {n: p.grad for n, p in scorer.policy.named_parameters() if p.grad is not None}
    return logprobs, loss, grads


def perturbed(model, dtype=torch.float32):
    torch.manual_seed(0)
    for p in model.parameters():  # a fresh head's bias is 0, and logits are almost equal
        torch.nn.init.normal_(p, std=0.2)
    return model.eval().to(dtype)


@pytest.mark.parametrize("forbidden", [[], [0, 7, 39]], ids=["all", "some forbidden"])
@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_give_what_the_logits_give(name, forbidden):
    model = perturbed(MODELS[name]())
    scorer = Scorer(model, torch.tensor(forbidden, dtype=torch.long))
    capped = "capped" in name and forbidden
    assert (scorer.reason is None) != bool(capped)
    inputs = example()
    pk.reset_op_counts()
    got = outcome(scorer, *inputs)
    ran = {op for op, _ in pk.op_counts()}
    assert ("ppo_loss_from_hidden" in ran) != bool(capped)
    scorer.reason = "to compare"
    want = outcome(scorer, *inputs)
    sequences, attention, mask, _ = inputs
    # Text by text, without padding, by torch alone.
    for i in range(BATCH):
        tokens = sequences[i][attention[i] == 1]
        with torch.no_grad():
            logits = model(input_ids=tokens[None]).logits[0, -LENGTH - 1 : -1]
        logits[:, forbidden] = -torch.inf
        expected = (logits / 0.8).log_softmax(-1).gather(-1, tokens[-LENGTH:, None])[:, 0]
        torch.testing.assert_close(got[0][i][mask[i]], expected[mask[i]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[:2], want[:2], rtol=1e-4, atol=1e-4)
    assert got[2].keys() == want[2].keys()
    for parameter, grad in got[2].items():
        torch.testing.assert_close(grad, want[2][parameter], rtol=2e-3, atol=2e-4, msg=parameter)


class Doubled(type(tiny.model())):
    """Its logits are twice what its head gives."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * 2
        return outputs


def test_a_model_with_other_logits_is_found_out(caplog):
    policy = perturbed(Doubled(tiny.model(vocab_size=40).config))
    with caplog.at_level(logging.WARNING):
        scorer = Scorer(policy, torch.tensor([1]))
    reason = "its logits are not the product of last hidden states and output embeddings"
    assert scorer.reason == reason
    assert f"the loss is computed from all logits: {reason}" in caplog.text
    sequences, attention, mask, advantages = example()
    logprobs, _, _ = outcome(scorer, sequences, attention, mask, advantages)
    tokens = sequences[0]
    with torch.no_grad():
        logits = policy(input_ids=tokens[None]).logits[0, -LENGTH - 1 : -1]
    logits[:, 1] = -torch.inf
    expected = (logits / 0.8).log_softmax(-1).gather(-1, tokens[-LENGTH:, None])[:, 0]
    torch.testing.assert_close(logprobs[0][mask[0]], expected[mask[0]], rtol=1e-4, atol=1e-4)


def test_bf16_models_are_recognised():
    for name in ("llama", "granite, divided", "gpt2"):
        model = perturbed(MODELS[name](), torch.bfloat16)
        scorer = Scorer(model, torch.tensor([0]))
        assert scorer.reason is None, name
        logprobs, _, grads = outcome(scorer, *example())
        assert logprobs.dtype == torch.float32
        assert all(g.dtype == torch.bfloat16 for g in grads.values())
