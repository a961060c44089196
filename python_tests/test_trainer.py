"""The trainer: it learns, repeats itself bit for bit, and keeps PPO's invariants."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

import trainer_tiny as tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import ppo_kernels as pk
from ppo_kernels.trainer import Config, InputError, train
from ppo_kernels.trainer.cli import parse_config
from ppo_kernels.trainer.distributed import World
from ppo_kernels.trainer.experience import Experience, make_experience, score_tokens
from ppo_kernels.trainer.model import ActorCritic, frozen_copy
from ppo_kernels.trainer.ppo import KLController, accumulate_gradients
from ppo_kernels.trainer.rollout import Sampler, response_mask
from ppo_kernels.trainer.scorer import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path):
    return Config(
        output_dir=str(tmp_path / "run"),
        threads=1,
        steps=25,
        rollouts=32,
        minibatch=16,
        epochs=3,
        max_new_tokens=8,
        lr=5e-3,
        value_lr=5e-3,
        kl_coef=0.01,
        eval_samples=128,
        tensorboard=False,
        plots=False,
        checkpoint_every=0,
    )


def run(config, reward=tiny.reward, **objects):
    objects = {"model": tiny.model(), "prompts": tiny.PROMPTS} | objects
    return train(config, tokenizer=tiny.tokenizer(), reward=reward, **objects)


def log_lines(config):
    with open(f"{config.output_dir}/log.jsonl") as file:
        return [json.loads(line) for line in file]


def untimed(lines):
    return [
        {k: v for k, v in line.items() if not k.startswith(("time/", "memory/"))} for line in lines
    ]


@pytest.fixture
def parts(config):
    """A sampler, an actor, its reference and one batch of rollouts of unequal lengths."""
    policy = tiny.model()
    sampler = Sampler(policy, tiny.tokenizer(), config)
    actor = ActorCritic(policy, sampler.forbidden, separate=False)
    torch.nn.init.normal_(actor.value_head.weight, std=0.1)
    torch.manual_seed(1)
    rollout = sampler([row["prompt"] for row in tiny.PROMPTS])
    assert len(rollout.response_mask.sum(-1).unique()) > 3
    return sampler, actor, Scorer(frozen_copy(policy), actor.forbidden), rollout


def test_learns_and_leaves_its_files(config):
    pk.reset_op_counts()
    config = replace(config, tensorboard=True, plots=True, checkpoint_every=20, profile_step=2)
    result = run(config)
    assert result.after.mean > result.before.mean + 0.2
    again = parse_config(["--config", str(result.output_dir / "config.json")], "ppo-kernels train")
    assert again == config
    lines = log_lines(config)
    assert [line["step"] for line in lines] == list(range(config.steps))
    assert lines[0]["ratio_first/max"] == pytest.approx(1, abs=1e-4)
    assert lines[0]["ratio_first/min"] == pytest.approx(1, abs=1e-4)
    assert lines[0]["kl/per_completion"] == pytest.approx(0, abs=1e-4)
    assert lines[-1]["kl/per_completion"] > 0.1
    files = {path.name for path in result.output_dir.iterdir()}
    assert files == {
        *("config.json", "before.json", "log.jsonl", "completions.jsonl", "tensorboard"),
        *("reward.png", "metrics.png", "samples.md", "summary.json", "checkpoints", "profile.txt"),
        *("policy", "value"),
    }
    assert (result.output_dir / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert list((result.output_dir / "tensorboard").iterdir())
    assert "| prompt" in (result.output_dir / "samples.md").read_text()
    served = " ".join(op for op, _ in pk.op_counts())
    for name in (
        "hidden_logprob",
        "ppo_loss_from_hidden",
        "value_loss",
        "shape_rewards",
        "gae",
        "whiten",
    ):
        assert name in served


def test_same_seed_same_bits(config, tmp_path):
    short = replace(config, steps=4, eval_samples=32)
    logs, weights = [], []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(replace(short, output_dir=str(tmp_path / name), seed=seed))
        logs.append(untimed(log_lines(replace(short, output_dir=str(tmp_path / name)))))
        weights.append((tmp_path / name / "policy" / "model.safetensors").read_bytes())
    assert logs[0] == logs[1] != logs[2]
    assert weights[0] == weights[1] != weights[2]


def test_evaluation_does_not_change_training(config, tmp_path):
    short = replace(config, steps=2)
    other = replace(short, eval_samples=0, output_dir=str(tmp_path / "other"))
    run(short)
    result = run(other)
    assert result.before is None
    assert untimed(log_lines(short)) == untimed(log_lines(other))


def test_async_reward_equals_sync(config, tmp_path):
    short = replace(config, steps=2, eval_samples=0)
    other = replace(short, output_dir=str(tmp_path / "other"))
    run(short)
    run(other, reward=tiny.async_reward)
    assert untimed(log_lines(short)) == untimed(log_lines(other))


@pytest.mark.parametrize("micro_batch", [1, 3, 7])
@pytest.mark.parametrize(
    "aggregation",
    ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-sum-norm"],
)
def test_micro_batches_equal_one_batch(parts, config, micro_batch, aggregation):
    _, actor, reference, rollout = parts
    config = replace(config, aggregation=aggregation, entropy_coef=0.1, whiten_advantages=True)
    torch.manual_seed(0)
    experience = make_experience(
        actor, reference, rollout, torch.randn(32), kl_coef=0.1, config=config, world=World(config)
    )
    # as if from an older policy, so that some ratios are clipped
    experience = experience._replace(
        logprobs=experience.logprobs + 0.3 * torch.randn_like(experience.logprobs)
    )

    def step(size):
        actor_copy = copy.deepcopy(actor)
        optimizer = torch.optim.SGD(actor_copy.parameters(), lr=0.1)
        update = accumulate_gradients(
            actor_copy, experience, replace(config, micro_batch=size), World(config), True
        )
        optimizer.step()
        return update, torch.cat([p.detach().flatten() for p in actor_copy.parameters()])

    (one, expected), (many, weights) = step(32), step(micro_batch)
    start = torch.cat([p.detach().flatten() for p in actor.parameters()])
    moved = (expected - start).abs().max()
    assert moved > 1e-3
    torch.testing.assert_close(weights, expected, rtol=0, atol=2e-6 * float(moved) + 1e-7)
    torch.testing.assert_close(many.entropy, one.entropy)
    for key, value in one.policy.as_dict().items():
        torch.testing.assert_close(many.policy.as_dict()[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_ratio_is_one_before_the_first_update(parts, config, temperature):
    _, actor, reference, rollout = parts
    config = replace(config, temperature=temperature)
    experience = make_experience(
        actor, reference, rollout, torch.randn(32), kl_coef=0.1, config=config, world=World(config)
    )
    metrics = accumulate_gradients(actor, experience, config, World(config), True).policy
    assert float(metrics.ratio_max) == pytest.approx(1, abs=1e-5)
    assert float(metrics.ratio_min) == pytest.approx(1, abs=1e-5)


def test_a_model_that_is_not_deterministic_is_refused(config):
    policy = tiny.model()
    policy.transformer.drop.forward = lambda x: torch.nn.functional.dropout(x, 0.2, training=True)
    with pytest.raises(RuntimeError, match="expected 1 within"):
        run(replace(config, eval_samples=0), model=policy)


def test_response_mask():
    eos, other_eos, pad = 3, 5, 0
    responses = torch.tensor(
        [[7, 8, 9, 7], [7, eos, pad, pad], [eos, eos, 7, 8], [7, 8, other_eos, eos], [7, 8, 9, eos]]
    )
    mask, ended = response_mask(responses, [eos, other_eos])
    assert mask.int().tolist() == [
        [1, 1, 1, 1],
        [1, 1, 0, 0],
        [1, 0, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
    ]
    assert ended.tolist() == [False, True, True, True, True]


def test_rollout_layout(parts):
    sampler, _, _, rollout = parts
    tokenizer = sampler.tokenizer
    for i, row in enumerate(tiny.PROMPTS):
        live = rollout.sequences[i][rollout.attention_mask[i].bool()].tolist()
        prompt = tokenizer(row["prompt"])["input_ids"]
        response = rollout.responses[i][rollout.response_mask[i]].tolist()
        assert live == prompt + response
        assert (3 in response) == bool(rollout.ended[i])
        assert 3 not in response[:-1]
        assert tokenizer.decode(response, skip_special_tokens=True) == rollout.completions[i]


def test_token_scores_are_those_of_each_text_alone(parts, config):
    """Log-probabilities and values as computed text by text, without padding, by plain torch."""
    sampler, actor, reference, rollout = parts
    config = replace(config, temperature=0.7)
    logprobs, values, ref_logprobs = score_tokens(actor, reference, rollout, config)
    torch.testing.assert_close(logprobs, ref_logprobs, rtol=0, atol=0)
    for i in range(len(tiny.PROMPTS)):
        tokens = rollout.sequences[i][rollout.attention_mask[i].bool()]
        n = int(rollout.response_mask[i].sum())
        with torch.no_grad():
            outputs = actor.policy(input_ids=tokens[None], output_hidden_states=True)
            value = actor.value_head(outputs.hidden_states[-1][0])[-n - 1 : -1, 0]
        logits = outputs.logits[0, -n - 1 : -1] / 0.7
        logits[:, sampler.forbidden] = -torch.inf
        expected = torch.log_softmax(logits, -1).gather(-1, tokens[-n:, None])[:, 0]
        torch.testing.assert_close(logprobs[i, :n], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values[i, :n], value, rtol=1e-5, atol=1e-5)
        assert not logprobs[i, n:].any()


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_sampled_and_scored_distributions_agree(config, temperature):
    """The frequencies of first tokens match the probabilities of the training-style forward pass,
    whatever filters the model's own generation settings hold."""
    policy = tiny.model(vocab_size=20).eval()  # four rows beyond the tokenizer's vocabulary
    policy.generation_config = GenerationConfig(top_k=2, repetition_penalty=5.0, eos_token_id=3)
    with torch.no_grad():
        policy.transformer.wte.weight.mul_(8)
    sampler = Sampler(
        policy, tiny.tokenizer(), replace(config, temperature=temperature, max_new_tokens=1)
    )
    assert sampler.forbidden == [0, 1, 2, 16, 17, 18, 19]
    torch.manual_seed(0)
    rollout = sampler(["w1 w2"] * 4000)
    scorer = Scorer(policy, torch.tensor(sampler.forbidden))
    states, _ = scorer.states(rollout.sequences[:1], rollout.attention_mask[:1], 1)
    assert scorer.reason is None
    every = torch.arange(20)[:, None]
    with torch.no_grad():
        logprobs = scorer.logprobs(states.expand(20, 1, -1), every, temperature=temperature)
    probabilities = logprobs[:, 0].exp()
    counts = torch.bincount(rollout.responses[:, 0], minlength=20)
    assert counts[sampler.forbidden].sum() == 0
    deviation = (probabilities * (1 - probabilities) / 4000).sqrt()
    assert ((counts / 4000 - probabilities).abs() <= 5 * deviation + 1e-9).all()
    assert policy.generation_config.top_k == 2


def test_forbidden_tokens_can_be_named(config):
    sampler = Sampler(
        tiny.model(), tiny.tokenizer(), replace(config, forbidden_tokens=["<unk>", "w3"])
    )
    assert sampler.forbidden == [1, 7]
    with pytest.raises(InputError, match="forbidden_tokens: given 'nope'"):
        Sampler(tiny.model(), tiny.tokenizer(), replace(config, forbidden_tokens=["nope"]))


def test_kl_controller(config):
    fixed = KLController(replace(config, kl_coef=0.3))
    fixed.update(1e9)
    assert fixed.coef == 0.3
    settings = replace(config, kl_coef=0.3, kl_target=6.0, kl_horizon=320.0)
    adaptive = KLController(settings)
    adaptive.update(6.6)
    assert adaptive.coef == pytest.approx(0.3 * (1 + 0.1 * 0.1))
    for divergence, factor in ((60.0, 1.02), (0.0, 0.98), (-5.0, 0.98), (6.0, 1.0)):
        adaptive = KLController(settings)
        adaptive.update(divergence)
        assert adaptive.coef == pytest.approx(0.3 * factor)


def test_adaptive_kl_holds_its_target(config):
    base = replace(config, steps=30, eval_samples=0, lr_decay=False)
    free = replace(base, kl_coef=0.0)
    held = replace(
        base, kl_coef=0.05, kl_target=1.0, kl_horizon=40.0, output_dir=config.output_dir + "2"
    )
    run(free)
    run(held)
    tails = [
        sum(line["kl/per_completion"] for line in log_lines(c)[-10:]) / 10 for c in (free, held)
    ]
    assert tails[0] > 4
    assert 0.3 < tails[1] < 3


def test_missing_eos_penalty(parts, config):
    _, actor, reference, rollout = parts
    assert rollout.ended.any()
    assert not rollout.ended.all()
    config = replace(config, missing_eos_penalty=2.0, whiten_advantages=False, lam=1.0)
    experience = make_experience(
        actor, reference, rollout, torch.ones(32), kl_coef=0.0, config=config, world=World(config)
    )
    expected = torch.where(rollout.ended, 1.0, -1.0)
    torch.testing.assert_close(experience.returns[:, 0], expected)


def test_equal_rewards_leave_the_policy_alone(config):
    """With nothing to learn, whitening must not blow noise up into an update."""
    last = {}
    for eps in (1e-8, config.whiten_eps):
        settings = replace(config, steps=40, lr=1e-3, kl_coef=0.0, lr_decay=False, eval_samples=0)
        settings = replace(settings, whiten_eps=eps, overwrite=True)
        run(settings, reward=lambda completions: [1.0] * len(completions))
        last[eps] = log_lines(config)[-1]["kl/per_completion"]
    assert last[1e-8] > 2
    assert last[config.whiten_eps] < 1


def test_export_loads_in_transformers(config):
    policy = tiny.model()
    result = run(replace(config, steps=2, eval_samples=0), model=policy)
    loaded = AutoModelForCausalLM.from_pretrained(result.output_dir / "policy").eval()
    tokenizer = AutoTokenizer.from_pretrained(result.output_dir / "policy")
    inputs = tokenizer(["w1 w2 w3", "w4"], padding=True, return_tensors="pt")
    assert (
        inputs["input_ids"].tolist()
        == (tiny.tokenizer()(["w1 w2 w3", "w4"], padding=True)["input_ids"])
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, policy(**inputs).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_separate_value_model_leaves_the_policy_to_the_policy_loss(config, dtype):
    settings = replace(config, steps=2, eval_samples=0, separate_value_model=True, dtype=dtype)
    result = run(settings)
    assert (result.output_dir / "value" / "trunk" / "model.safetensors").exists()
    assert math.isfinite(log_lines(config)[-1]["value/loss"])


@pytest.mark.parametrize("variant", ["cispo", "sapo", "gpg", "gspo", "gmpo"])
def test_every_policy_loss_trains(config, variant):
    settings = replace(config, variant=variant, aggregation="seq-mean-token-mean", kl_coef=0.0)
    result = run(replace(settings, steps=25, eval_samples=256))
    assert result.after.mean > result.before.mean + 0.02


def test_value_gradient_reaches_the_chosen_trunk_only(parts, config):
    _, shared, _, rollout = parts
    separate = ActorCritic(tiny.model(), shared.forbidden.tolist(), separate=True)
    torch.nn.init.normal_(separate.value_head.weight, std=0.1)
    length = rollout.response_mask.shape[1]
    for actor, reaches_policy in ((shared, True), (separate, False)):
        _, values = actor.states_and_values(rollout.sequences, rollout.attention_mask, length)
        values[rollout.response_mask].sum().backward()
        grads = [p.grad for p in actor.policy.parameters()]
        assert any(g is not None and g.abs().sum() > 0 for g in grads) == reaches_policy
        if actor.value_trunk is not None:
            assert any(p.grad.abs().sum() > 0 for p in actor.value_trunk.parameters())


def test_interrupt_keeps_whole_lines_and_no_temporary_files(config):
    calls = []

    def interrupting(completions):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return tiny.reward(completions)

    with pytest.raises(KeyboardInterrupt):
        run(replace(config, eval_samples=0), reward=interrupting)
    assert len(log_lines(config)) == 3
    assert set(os.listdir(config.output_dir)) == {
        *("config.json", "log.jsonl", "completions.jsonl")
    }


def test_control_c_on_the_command_line(config, tmp_path):
    folder, prompts = tmp_path / "model", tmp_path / "prompts.jsonl"
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    prompts.write_text("".join(json.dumps(row) + "\n" for row in tiny.PROMPTS))
    settings = tmp_path / "run.yaml"
    settings.write_text(f"model: {folder}\nprompts: {prompts}\nthreads: 1\nlr: 1e-3\n")
    program = "import sys; from ppo_kernels.trainer.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program]
    command += ["--config", str(settings), "--steps", "100000", "--eval_samples", "0"]
    command += ["--max_new_tokens", "8"]
    command += ["--reward", f"{tiny.__file__}:reward", "--output_dir", config.output_dir]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("ppo-kernels train: interrupted")
    assert "Traceback" not in errors
    assert len(log_lines(config)) >= 2


def test_experience_rows_selects_every_field(parts, config):
    _, actor, reference, rollout = parts
    experience = make_experience(
        actor, reference, rollout, torch.randn(32), kl_coef=0.1, config=config, world=World(config)
    )
    chosen = experience.rows(torch.tensor([5, 2]))
    assert isinstance(chosen, Experience)
    for whole, part in zip(experience, chosen, strict=True):
        assert part.tolist() == [whole[5].tolist(), whole[2].tolist()]
