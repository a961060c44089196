"""What learns when: critic and policy, adapters, tied weights; how completions end; who is told."""

import importlib.util
import json
import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

import trainer_tiny as tiny
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ppo_kernels as pk
from ppo_kernels.trainer import Config, InputError, train
from ppo_kernels.trainer.distributed import World
from ppo_kernels.trainer.experience import make_experience, score_tokens
from ppo_kernels.trainer.model import ActorCritic, Reference, add_adapters
from ppo_kernels.trainer.ppo import accumulate_gradients
from ppo_kernels.trainer.rollout import Sampler, StopStrings, response_mask

needs_peft = pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path):
    return Config(
        output_dir=str(tmp_path / "run"),
        threads=1, steps=3, rollouts=8, minibatch=4, epochs=1, max_new_tokens=6, lr=3e-3,
        value_lr=3e-3, eval_samples=0, tensorboard=False, plots=False, checkpoint_every=0,
        max_grad_norm=100.0,
    )  # fmt: skip


def run(config, model=None, **objects):
    objects = {"prompts": tiny.PROMPTS[:20], "reward": tiny.reward} | objects
    return train(config, model=model or tiny.model(), tokenizer=tiny.tokenizer(), **objects)


def lines(config):
    text = Path(config.output_dir, "log.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


# The critic


@pytest.mark.parametrize("separate", [False, True])
def test_only_the_critic_learns_in_its_warm_up(config, separate):
    policy = tiny.model()
    before = {name: p.clone() for name, p in policy.state_dict().items()}
    warm = replace(config, critic_warmup=3, separate_value_model=separate, checkpoint_every=3)
    result = run(warm, policy)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]), name
    head = load_file(result.output_dir / "value" / "head.safetensors")
    assert head["weight"].abs().max() > 1e-4
    saved = load_file(result.output_dir / "checkpoints/step-000003/optimizer.safetensors")
    trained = len({name.split(".")[0] for name in saved})
    assert trained == 2 + separate * len(list(policy.base_model.parameters()))
    for line in lines(warm):
        assert line["value/tokens"] > 0
        assert line["kl/per_completion"] == pytest.approx(0, abs=1e-4)


def test_the_policy_learns_after_the_warm_up(config):
    run(replace(config, critic_warmup=2))
    first, second, third = lines(config)
    assert first["policy/loss"] is second["policy/loss"] is None
    assert third["policy/loss"] is not None
    assert third["ratio_first/max"] == pytest.approx(1, abs=1e-4)


def test_further_epochs_of_the_critic_leave_the_policy_alone(config):
    """The policy after 1 epoch, and after 1 epoch and 3 of the critic, is the same."""
    models = [tiny.model(), tiny.model()]
    one_step = replace(config, steps=1, lr_decay=False)
    run(one_step, models[0])
    run(replace(one_step, value_epochs=4, overwrite=True), models[1])
    assert lines(config)[0]["value/tokens"] == 4 * lines(config)[0]["policy/tokens"]
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one, other)


def test_a_warm_critic_knows_the_returns(config):
    warm = replace(config, critic_warmup=3, value_epochs=8, value_lr=0.02, value_clip=None)
    warm = replace(warm, kl_coef=0.0, lam=1.0)  # returns are rewards
    run(warm, reward=lambda completions: [1.0] * 8)
    first, *_, last = lines(warm)
    assert first["value/return_mean"] == last["value/return_mean"] == 1
    assert last["value/loss"] < 0.3 * first["value/loss"]


def test_the_value_head_starts_at_zero_in_fp32_and_decays(config):
    actor = ActorCritic(tiny.model().to(torch.bfloat16), [], separate=False)
    for parameter in actor.value_head.parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.any()
    run(replace(config, checkpoint_every=1, keep_checkpoints=3))
    for step in (1, 2, 3):
        path = f"{config.output_dir}/checkpoints/step-00000{step}/checkpoint.json"
        policy, head = json.loads(Path(path).read_text())["param_groups"]
        # the rate of the step's second of two updates
        factor = 1 - (2 * (step - 1) + 1) / 6
        assert policy["lr"] == pytest.approx(3e-3 * factor)
        assert head["lr"] == pytest.approx(3e-3 * factor)


# Masks


def experience_of(config, actor):
    sampler = Sampler(actor.policy, tiny.tokenizer(), config)
    torch.manual_seed(1)
    rollout = sampler([row["prompt"] for row in tiny.PROMPTS[:8]])
    reference = Reference(actor.policy, actor.forbidden)
    scores = torch.randn(8)
    return make_experience(
        actor, reference, rollout, scores, kl_coef=0.1, config=config, world=World(config)
    )


@pytest.mark.parametrize("variant", ["clip", "gspo"])
def test_micro_batches_without_a_live_token(config, variant):
    """They change nothing, whatever lies under the mask."""
    config = replace(config, variant=variant)
    actor = ActorCritic(tiny.model(), [0, 1, 2], separate=False)
    experience = experience_of(config, actor)
    gone = torch.tensor([2, 3, 6])
    masked = experience._replace(mask=experience.mask.clone(), advantages=experience.advantages + 0)
    masked.mask[gone] = False
    masked.advantages[gone] = torch.nan

    def gradients(experience, size):
        actor.zero_grad()
        world = World(config)
        one = replace(config, micro_batch=size)
        update = accumulate_gradients(actor, experience, one, world, True)
        return update, {n: p.grad for n, p in actor.named_parameters() if p.grad is not None}

    update, got = gradients(masked, 2)
    kept = torch.tensor([0, 1, 4, 5, 7])
    expected_update, expected = gradients(experience.rows(kept), 5)
    torch.testing.assert_close(update.loss, expected_update.loss, rtol=1e-5, atol=1e-6)
    assert got.keys() == expected.keys()
    for name, grad in got.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    masked.mask[:] = False
    nothing, got = gradients(masked, 2)
    assert float(nothing.loss) == 0
    assert not any(grad.any() for grad in got.values())


# Adapters


@needs_peft
@pytest.mark.parametrize("separate", [False, True])
def test_adapters(config, tmp_path, separate):
    policy = tiny.model()
    before = {name: p.clone() for name, p in policy.named_parameters()}
    settings = replace(
        config, lora_rank=2, lr=3e-2, checkpoint_every=2, separate_value_model=separate
    )
    result = run(settings, policy)
    assert lines(config)[0]["kl/per_completion"] == pytest.approx(0, abs=1e-4)
    assert abs(lines(config)[-1]["kl/per_completion"]) > 1e-4
    after = dict(policy.named_parameters())
    for name, value in before.items():  # the weights themselves did not move
        layer = name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
        assert torch.equal(after.get(name, after.get(layer)), value)
    adapters = {name for name in after if "lora_" in name}
    assert len(adapters) == 2 * 4  # 4 linear layers, none of them the head
    saved = load_file(result.output_dir / "checkpoints" / "step-000003" / "model.safetensors")
    own = {name for name in saved if name.startswith("policy.")}
    assert own == {f"policy.{name}" for name in adapters}

    # Exported adapters on the first model give the trained policy.
    assert {path.name for path in (result.output_dir / "policy").iterdir()} >= {
        *("adapter_config.json", "adapter_model.safetensors")
    }
    loaded = tiny.model().eval()
    loaded.load_adapter(str(result.output_dir / "policy"))
    inputs = tiny.tokenizer()(["w1 w2 w3"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, policy.eval()(**inputs).logits)


@needs_peft
def test_the_reference_is_the_policy_without_its_adapters(config):
    policy = tiny.model().eval()
    original = Reference(policy, torch.tensor([0, 1, 2]))  # a frozen copy
    add_adapters(policy, replace(config, lora_rank=2))
    actor = ActorCritic(policy, [0, 1, 2], separate=False)
    reference = Reference(policy, actor.forbidden)
    assert reference.policy is policy
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    rollout = Sampler(policy, tiny.tokenizer(), config)([row["prompt"] for row in tiny.PROMPTS[:8]])
    logprobs, _, of_reference = score_tokens(actor, reference, rollout, config)
    _, _, expected = score_tokens(actor, original, rollout, config)
    assert torch.equal(of_reference, expected)
    assert (logprobs - of_reference).abs().max() > 0.01
    assert all(p.requires_grad == ("lora_" in name) for name, p in policy.named_parameters())


@needs_peft
def test_adapters_go_on_from_a_checkpoint(config, tmp_path):
    settings = replace(config, lora_rank=2, checkpoint_every=1)
    whole, part = tiny.model(), tiny.model()
    run(settings, whole)
    interrupted = replace(settings, output_dir=str(tmp_path / "part"))
    calls = []

    def interrupting(completions):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tiny.reward(completions)

    with pytest.raises(KeyboardInterrupt):
        run(interrupted, tiny.model(), reward=interrupting)
    run(replace(interrupted, resume=True), part)
    for one, other in zip(whole.parameters(), part.parameters(), strict=True):
        assert torch.equal(one, other)


@needs_peft
def test_wrong_layers_for_adapters(config):
    with pytest.raises(InputError, match=r"lora_targets: given \['nowhere'\]: "):
        run(replace(config, lora_rank=2, lora_targets=["nowhere"]))


def test_adapters_without_peft(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"lora_rank: given 2, which needs peft: pip install"):
        run(replace(config, lora_rank=2))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(config, tied):
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=2, eos_token_id=3,
        pad_token_id=0, tie_word_embeddings=tied, max_position_embeddings=32,
    )  # fmt: skip
    policy = LlamaForCausalLM(settings)
    result = run(replace(config, checkpoint_every=3), policy)
    embeddings, head = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
    assert (embeddings is head) == tied
    saved = load_file(result.output_dir / "checkpoints" / "step-000003" / "model.safetensors")
    names = [name for name in saved if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    assert len(names) == 2 - tied
    loaded = AutoModelForCausalLM.from_pretrained(result.output_dir / "policy")
    assert torch.equal(loaded.get_output_embeddings().weight, head)
    assert torch.equal(loaded.get_input_embeddings().weight, embeddings)


# The ends of completions


def test_stop_strings_end_completions(config):
    policy = tiny.model()
    sampler = Sampler(policy, tiny.tokenizer(), replace(config, stop=["w3", "w4 w5"]))
    free = Sampler(policy, tiny.tokenizer(), config)
    torch.manual_seed(0)
    rollout = sampler(["w3 w1"] * 64)  # the string in a prompt ends nothing
    torch.manual_seed(0)
    unstopped = free(["w3 w1"] * 64)
    tokenizer, seen = tiny.tokenizer(), set()
    for i in range(64):
        live = rollout.responses[i][rollout.response_mask[i]]
        text = tokenizer.decode(live, skip_special_tokens=True)
        stops = [stop for stop in ("w3", "w4 w5") if stop in text]
        seen.update(stops)
        assert rollout.completions[i] == (text[: text.index(stops[0])] if stops else text)
        # up to the string, both sample the same; the string's own tokens count
        assert torch.equal(unstopped.responses[i][: len(live)], live)
        before = tokenizer.decode(live[:-1], skip_special_tokens=True)
        assert not any(stop in before for stop in ("w3", "w4 w5"))
        assert bool(rollout.ended[i]) == (bool(stops) or int(live[-1]) == 3)
        assert not rollout.attention_mask[i, -rollout.response_mask.shape[1] :][
            ~rollout.response_mask[i]
        ].any()
    assert seen == {"w3", "w4 w5"}


def test_the_end_is_the_first_of_both_kinds():
    responses = torch.tensor([[7, 8, 3, 0], [7, 8, 9, 3], [3, 0, 0, 0], [7, 8, 9, 7]])
    mask, ended = response_mask(responses, [3], torch.tensor([2, 0, 0, 4]))
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert ended.tolist() == [True, True, True, True]
    stop = StopStrings(["b c", "c"], tiny.tokenizer(), 0)
    assert [stop.cut(text) for text in ("a b c", "a c b c", "a", "")] == ["a ", "a ", "a", ""]


def test_stop_strings_count_as_an_end(config):
    run(replace(config, stop=["w"], missing_eos_penalty=1.0), reward=lambda completions: [0.0] * 8)
    for line in lines(config):
        assert line["completion/ended"] == 1
        assert line["completion/tokens_max"] == 1


# Metrics and trackers


class Listener:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.told, self.tables, self.closed = [], [], False

    def metrics(self, step, values):
        self.told.append((step, dict(values)))

    def table(self, step, rows):
        self.tables.append((step, list(rows)))

    def close(self):
        self.closed = True


def test_metrics_of_rollouts(config):
    actor = ActorCritic(tiny.model(), [0, 1, 2], separate=False)
    config = replace(config, missing_eos_penalty=0.5)
    experience = experience_of(config, actor)
    noise = 0.1 * torch.rand(experience.kl.shape)
    experience = experience._replace(kl=torch.where(experience.mask, noise, torch.nan))
    from ppo_kernels.trainer.measure import rollout_metrics

    metrics = rollout_metrics(experience, 0.3)
    lengths = experience.mask.sum(-1).tolist()
    kl = sum(float(row[:n].sum()) for row, n in zip(experience.kl, lengths, strict=True))
    assert metrics["kl/per_completion"] == pytest.approx(kl / 8, rel=1e-5)
    assert metrics["kl/per_token"] == pytest.approx(kl / sum(lengths), rel=1e-5)
    assert metrics["reward/kl"] == pytest.approx(-0.3 * kl / 8, rel=1e-5)
    expected = experience.scores.double() - 0.5 * ~experience.ended
    assert metrics["reward/total"] == pytest.approx(float(expected.mean()), rel=1e-3)
    assert metrics["reward/mean"] == pytest.approx(float(experience.scores.mean()))
    assert metrics["completion/tokens"] == sum(lengths) / 8
    assert metrics["completion/tokens_max"] == max(lengths)
    assert metrics["completion/ended"] == experience.ended.float().mean()


NAMES = {
    *("reward/mean", "reward/total", "reward/kl", "kl/per_completion", "entropy"),
    *("policy/kl_k1", "policy/kl_k3", "policy/clip_fraction", "policy/ratio_max", "policy/ess"),
    *("value/loss", "value/clip_fraction", "value/explained_variance", "returns/mean"),
    *("grad_norm", "completion/tokens", "completion/ended", "memory/peak_mb", "lr"),
    *(f"time/{p}{unit}" for p in ("sample", "reward", "score", "update")
      for unit in ("", "_tokens_per_second")),
}  # fmt: skip


def test_every_tracker_is_told_the_same(config, monkeypatch):
    """TensorBoard, a stand-in for W&B, the file and an object of the user's."""
    runs = []

    class Run:
        id = "an-id"

        def __init__(self, **settings):
            self.settings, self.logged, self.finished = settings, [], False
            runs.append(self)

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    def table(columns, data):
        return columns, data

    wandb = types.SimpleNamespace(init=Run, Table=table)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    listener = Listener()
    told = replace(config, tensorboard=True, wandb="a-project", completions_every=2, table_rows=3)
    run(replace(told, checkpoint_every=3, profile_step=1), trackers=[listener])
    written = lines(config)
    assert listener.closed
    assert [step for step, _ in listener.told] == [0, 1, 2]
    assert listener.told[0][1].keys() >= NAMES
    assert 0 < listener.told[1][1]["time/share_of_ops"] < 1
    assert "ppo_kernels::" in Path(config.output_dir, "profile.txt").read_text()
    assert "time/share_of_ops" not in listener.told[0][1]
    for (step, values), line in zip(listener.told, written, strict=True):
        assert line == {"step": step, **{k: v for k, v in values.items() if math.isfinite(v)}}

    tables = Path(config.output_dir, "completions.jsonl").read_text().splitlines()
    rows = [json.loads(row) for row in tables]
    assert [row["step"] for row in rows] == [0, 0, 0, 2, 2, 2]
    assert listener.tables[1] == (2, [{k: row[k] for k in row if k != "step"} for row in rows[3:]])
    assert rows[0]["score"] == pytest.approx(tiny.reward([rows[0]["completion"]])[0])

    (one,) = runs
    assert (one.settings["project"], one.settings["id"]) == ("a-project", None)
    assert [values for _, values in one.logged if "lr" in values] == [v for _, v in listener.told]
    assert one.logged[1][1]["completions"][0] == ["prompt", "completion", "score"]
    assert one.finished
    board = EventAccumulator(str(Path(config.output_dir, "tensorboard"))).Reload()
    rewards = [event.value for event in board.Scalars("reward/mean")]
    assert rewards == pytest.approx([line["reward/mean"] for line in written])

    # A run that goes on stays the same run.
    run(replace(told, checkpoint_every=3, resume=True, steps=4))
    assert (runs[1].settings["id"], runs[1].settings["resume"]) == ("an-id", "allow")
    assert [step for step, values in runs[1].logged if "lr" in values] == [3]


def test_wandb_that_is_not_there(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"wandb: given 'p', which needs wandb: pip install"):
        run(replace(config, wandb="p"))


def test_the_share_of_ops_is_theirs(tmp_path):
    """An op inside of another counts once, and what is not ours does not."""
    from ppo_kernels.trainer.measure import profiled

    logits = torch.randn(64, 5000, requires_grad=True)
    tokens = torch.zeros(64, dtype=torch.long)
    with profiled(tmp_path / "a.txt", True) as ours:
        for _ in range(20):
            pk.logprobs_from_logits(logits, tokens).sum().backward()
    with profiled(tmp_path / "b.txt", True) as others:
        for _ in range(20):
            logits.log_softmax(-1).sum().backward()
    assert others["time/share_of_ops"] == 0
    assert 0.1 < ours["time/share_of_ops"] <= 1
