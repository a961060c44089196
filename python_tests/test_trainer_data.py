"""Tables, conversations, and rewards that settings name."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

import trainer_tiny as tiny
from transformers import GPT2ForSequenceClassification

from ppo_kernels.trainer import Config, InputError, Weighted, experience, train
from ppo_kernels.trainer.cli import parse_config
from ppo_kernels.trainer.data import load_rows, render_conversation, render_prompts
from ppo_kernels.trainer.reward_model import ModelReward
from ppo_kernels.trainer.rewards import load_reward, score

CPU = torch.device("cpu")
ROWS = [{"prompt": "w1, w2", "answer": "w3"}, {"prompt": "w4\n\u2028w5", "answer": "w6"}]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m.role }} {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def load(path):
    return load_rows(str(path), "data", "text")


# Tables


def test_every_format_gives_the_same_rows(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8"
    )
    (tmp_path / "t.csv").write_text(
        'prompt,answer\r\n"w1, w2",w3\r\n"w4\n\u2028w5",w6\r\n', encoding="utf-8", newline=""
    )
    assert load(tmp_path / "t.jsonl") == ROWS
    assert load(tmp_path / "t.csv") == ROWS


def test_parquet_and_saved_datasets(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "t.parquet")
    assert load(tmp_path / "t.parquet") == ROWS
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(InputError, match=r"data: given .*bad.parquet', which is no parquet file"):
        load(tmp_path / "bad.parquet")
    with pytest.raises(InputError, match="which cannot be read"):
        load(tmp_path / "none.parquet")


def test_saved_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(tmp_path / "whole")
    assert load(tmp_path / "whole") == ROWS
    datasets.DatasetDict({"a": whole, "b": whole}).save_to_disk(tmp_path / "splits")
    with pytest.raises(InputError, match=r"of the splits \['a', 'b'\], expected one split"):
        load(tmp_path / "splits")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected one that Dataset"):
        load(tmp_path / "empty")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"needs pyarrow; .*pip install 'ppo-kernels\[data\]'"):
        load(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.jsonl", b'{"text": "a"}\n\n[1]\n', "line 3 of .* is no JSON object"),
        ("t.jsonl", b'{"text": \n', "line 1 of .* is not JSON"),
        ("t.csv", b"a,b\n1\n", "row 1 of .* has not as many fields as the header"),
        ("t.csv", b"a\n1,2\n", "row 1 of .* has not as many fields as the header"),
        ("t.txt", b"\xff\xfe\xff", "is not UTF-8"),
    ],
)
def test_broken_tables(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"data: .*{expected}"):
        load(tmp_path / name)


# Conversations


def chat_tokenizer():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_tokens(["user", "assistant"])
    return tokenizer


def test_conversations_have_the_tokens_of_the_template():
    tokenizer = chat_tokenizer()
    messages = [{"role": "user", "content": "w1 w2"}]
    rows = render_prompts([{"prompt": messages, "answer": 1}, {"prompt": "w3"}], tokenizer)
    assert rows[0]["messages"] == messages
    assert rows[0]["answer"] == 1
    assert rows[1] == {"prompt": "w3"}
    wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    ids = tokenizer(rows[0]["prompt"])["input_ids"]
    assert ids == wanted
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", "user", "w1", "w2", "assistant"]


def test_conversations_that_cannot_be_rendered():
    with pytest.raises(InputError, match="row 1 is a conversation, but the tokenizer has no chat"):
        render_prompts([{"prompt": [{"role": "user", "content": "w1"}]}], tiny.tokenizer())
    with pytest.raises(InputError, match="has a message without 'role' and 'content'"):
        render_prompts([{"prompt": [{"role": "user"}]}], chat_tokenizer())
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    with pytest.raises(InputError, match="adds special tokens to the text of the chat template"):
        render_conversation([{"role": "user", "content": "w1"}], tokenizer, "here")


# Rewards


def test_rules():
    rows = [{"prompt": "w1", "answer": 3}, {"prompt": "w2", "answer": "x y"}]
    texts = ["w1 3", " x y "]
    assert score(load_reward(r"regex:\d$", CPU), rows, texts).tolist() == [1, 0]
    assert score(load_reward("length:3-5", CPU), rows, ["a b", "a b c"]).tolist() == [0, 1]
    assert score(load_reward("length:2-2", CPU), rows, ["a b", "a b c"]).tolist() == [1, 0]
    assert score(load_reward("exact:answer", CPU), rows, texts).tolist() == [0, 1]
    assert score(load_reward("exact:answer", CPU), rows, ["3", "xy"]).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("regex:(", r"the pattern '\(' is wrong"),
        ("length:5", "given 'length:5', expected length:LEAST-MOST"),
        ("length:5-2", "given 'length:5-2', expected length:LEAST-MOST"),
        ("nowhere", "given 'nowhere', expected 'module:name'"),
        ("no_such_module:f", "which does not import"),
    ],
)
def test_wrong_rewards(named, expected):
    with pytest.raises(InputError, match=f"reward: .*{expected}"):
        load_reward(named, CPU)


def test_an_exact_answer_needs_its_column():
    with pytest.raises(InputError, match=r"exact:truth needs a column 'truth' .* \['answer'\]"):
        score(load_reward("exact:truth", CPU), [{"prompt": "a", "answer": "b"}], ["c"])


def test_several_rewards_are_weighted():
    async def later(answer):
        return answer

    rows = [{"prompt": "a", "answer": 1.0}, {"prompt": "b", "answer": 2.0}]
    both = Weighted([(later, 10.0), (lambda completions: [1, 0], -0.5)])
    assert score(both, rows, ["x", "y"]).tolist() == [9.5, 20.0]
    named = load_reward({"length:1-1": 2.0, "regex:y": 3.0}, CPU)
    assert score(named, rows, ["x", "y"]).tolist() == [2.0, 5.0]
    assert repr(named) == "2.0 Length(least=1, most=1) + 3.0 Regex(pattern='y')"
    with pytest.raises(InputError, match=r"later: score 0 is nan"):
        score(both, [{"prompt": "a", "answer": float("nan")}], ["x"])


def test_weights_in_a_file_and_on_the_command_line(tmp_path):
    (tmp_path / "run.yaml").write_text('reward:\n  "regex:w1$": 1\n  trainer_tiny:reward: 0.5\n')
    wanted = {"regex:w1$": 1.0, "trainer_tiny:reward": 0.5}
    assert parse_config(["--config", str(tmp_path / "run.yaml")], "t").reward == wanted
    assert parse_config(["--reward", json.dumps(wanted)], "t").reward == wanted
    assert parse_config(["--reward", "length:5-20"], "t").reward == "length:5-20"
    for wrong in ({}, {"a:b": float("nan")}, {"": 1.0}, 3, ""):
        with pytest.raises(InputError, match=r"reward: given .*expected a reward, or rewards"):
            Config(reward=wrong)


def classifier(labels=1):
    torch.manual_seed(0)
    config = tiny.model(dropout=0.0).config
    config.num_labels = labels
    return GPT2ForSequenceClassification(config)


def test_a_model_folder_is_a_reward(tmp_path):
    model, tokenizer = classifier().eval(), tiny.tokenizer()
    model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    reward = load_reward(str(tmp_path / "rm"), CPU)
    prompts, texts = ["w1 w2", "w3"] * 40, ["w4", "w5 w6 w7"] * 40
    found = score(reward, [{"prompt": prompt} for prompt in prompts], texts)
    for i in range(2):  # one text at a time, without padding
        ids = [*tokenizer(f"{prompts[i]} {texts[i]}")["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids])).logits[0, 0]
        torch.testing.assert_close(found[i::2], alone.expand(40))
    assert not torch.equal(found[0], found[1])


def test_texts_too_long_for_the_reward_model_lose_their_beginning():
    reward = ModelReward(classifier(), tiny.tokenizer())
    ids = reward.encoder(["w1 " * 40], ["w2 w3"])[0]
    assert len(ids) == 32
    assert reward.encoder.tokenizer.decode(ids[-3:]) == "w2 w3 <eos>"


def test_folders_that_are_no_reward_model(tmp_path):
    classifier(labels=3).save_pretrained(tmp_path / "rm")
    tiny.tokenizer().save_pretrained(tmp_path / "rm")
    with pytest.raises(InputError, match="a model with 3 outputs, expected one"):
        load_reward(str(tmp_path / "rm"), CPU)
    (tmp_path / "rm" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="expected a folder with weights in safetensors"):
        load_reward(str(tmp_path / "rm"), CPU)


def one_step(tmp_path, **settings):
    small = {"steps": 1, "rollouts": 4, "minibatch": 4, "epochs": 1, "max_new_tokens": 4}
    small |= {"eval_samples": 0, "threads": 1, "output_dir": str(tmp_path)}
    return Config(**small | settings)


@pytest.mark.parametrize("whiten", [False, True])
def test_scores_are_clipped_and_rewards_whitened(tmp_path, monkeypatch, whiten):
    seen = {}
    gae = experience.pk.gae

    def spy(rewards, values, **settings):
        seen.update(rewards=rewards, mask=settings["mask"].bool())
        return gae(rewards, values, **settings)

    monkeypatch.setattr(experience.pk, "gae", spy)
    config = one_step(tmp_path, score_clip=2.0, whiten_rewards=whiten, kl_coef=0.0, whiten_eps=0.0)
    scores = [-7.0, 1.0, 0.5, 30.0]
    train(
        config,
        model=tiny.model(),
        tokenizer=tiny.tokenizer(),
        prompts=tiny.PROMPTS,
        reward=lambda completions: scores,
    )
    live = seen["rewards"][seen["mask"]]
    if whiten:
        assert float(live.std(unbiased=False)) == pytest.approx(1, rel=0.1)
    else:  # on the last token of each
        assert live[live != 0].tolist() == [-2, 1, 0.5, 2]
    assert float(live.mean()) == pytest.approx(1.5 / len(live), rel=1e-4)


def test_conversations_and_weighted_rewards_in_training(tmp_path):
    seen = []

    def reward(prompts, completions, messages, answer):
        seen.append((prompts[0], messages[0], answer[0]))
        return [0.0] * len(completions)

    tokenizer = chat_tokenizer()
    prompts = [{"prompt": [{"role": "user", "content": "w1"}], "answer": 7}]
    train(
        one_step(tmp_path),
        model=tiny.model(vocab_size=len(tokenizer)),
        tokenizer=tokenizer,
        prompts=prompts,
        reward=Weighted([(reward, 1.0), (tiny.reward, 0.5)]),
    )
    assert seen == [(" user w1 assistant", prompts[0]["prompt"], 7)]
