"""Fine-tuning, generating and evaluating: what is learnt, held out, measured and refused."""

import json
import math
from dataclasses import fields

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

import trainer_tiny as tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_kernels.trainer import (
    EvalConfig,
    GenerateConfig,
    InputError,
    RewardConfig,
    SFTConfig,
    evaluate_policy,
    generate,
    sft,
)
from ppo_kernels.trainer.cli import parse_config
from ppo_kernels.trainer.commands import main_eval, main_generate, main_reward, main_sft
from ppo_kernels.trainer.fine_tuning import (
    collate,
    encode,
    fit,
    perplexity,
    split_rows,
)
from ppo_kernels.trainer.rlhf.run import RLHFConfig
from ppo_kernels.trainer.runs import StepLog
from ppo_kernels.trainer.text_metrics import Mean, bleu, distinct_n, rouge

PAIRS = [{"prompt": f"w{i}", "completion": f"w{i + 6} w0"} for i in range(6)]
CONFIGS = (SFTConfig, RewardConfig, GenerateConfig, EvalConfig, RLHFConfig)


pytestmark = pytest.mark.usefixtures("one_thread")


def own_perplexity(model, tokenizer, examples):
    """By torch alone, one example at a time, without padding."""
    total, count = 0.0, 0
    for tokens, first in examples:
        ids = torch.tensor([tokens])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        for position in range(max(first, 1), len(tokens)):
            if tokens[position] != tokenizer.unk_token_id:
                total -= float(logprobs[position - 1, tokens[position]].detach())
                count += 1
    return math.exp(total / count)


# Fine-tuning


def test_prompts_are_given_and_completions_learnt():
    tokenizer = tiny.tokenizer()
    examples = encode([{"prompt": "w1 w2", "completion": "w3 zzz"}], tokenizer, 32, "data")
    assert tokenizer.convert_ids_to_tokens(examples[0].tokens) == [
        *("<bos>", "w1", "w2", "w3", "<unk>", "<eos>")
    ]
    longer = encode([{"text": "w1 w1 w1 w1 w1 w1 w1"}], tokenizer, 32, "data")
    batch = collate([*examples, *longer], tokenizer)
    # the word after the prompt and the end are learnt; prompt, unknown word, padding are not
    assert batch.wanted[0].tolist() == [False, False, True, False, True, False, False, False]
    assert batch.wanted[1].all()
    assert batch.live.sum(-1).tolist() == [6, 9]


def test_the_last_message_of_a_conversation_is_learnt():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = (
        "<bos>{% for m in messages %} {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %} w9{% endif %}"
    )
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    (example,) = encode([{"messages": messages}], tokenizer, 32, "data")
    words = tokenizer.convert_ids_to_tokens(example.tokens)
    assert words == ["<bos>", "w1", "w9", "w2", "w3", "<eos>"]
    assert words[example.first :] == ["w2", "w3", "<eos>"]


def test_perplexity_is_that_of_torch():
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    rows = [*PAIRS, {"prompt": "w1 w2 w3", "completion": "zzz w4"}]
    examples = encode(rows, tokenizer, 32, "data")
    found = perplexity(model, tokenizer, examples, batch=3)
    assert found == pytest.approx(own_perplexity(model, tokenizer, examples), rel=1e-5)


def test_micro_batches_change_no_weight(tmp_path):
    tokenizer = tiny.tokenizer()
    examples = encode([*PAIRS, {"text": "w1 w2 w3 w4"}], tokenizer, 32, "data")
    weights = []
    for micro_batch in (7, 2):
        model = tiny.model(dropout=0.0)
        config = SFTConfig(steps=3, batch=7, micro_batch=micro_batch, lr=1e-2)
        with StepLog(None, 3, "sft") as log:
            fit(model, tokenizer, examples, config, log)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*weights, atol=2e-5, rtol=1e-4)
    assert not torch.equal(weights[0], torch.cat([p.flatten() for p in tiny.model().parameters()]))


def test_sft_learns_and_leaves_its_files(tmp_path):
    config = SFTConfig(output_dir=str(tmp_path / "run"), steps=60, batch=6, lr=2e-2, threads=1)
    result = sft(
        config,
        model=tiny.model(dropout=0.0),
        tokenizer=tiny.tokenizer(),
        data=PAIRS,
        eval_data=PAIRS,
    )
    assert result.perplexity < 1.5 < 10 < result.perplexity_before
    files = {path.name for path in result.output_dir.iterdir()}
    assert files == {"config.json", "log.jsonl", "summary.json", "model"}
    again = parse_config(["--config", str(tmp_path / "run/config.json")], "sft", kind=SFTConfig)
    assert again == config
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(60))
    assert lines[-1]["loss"] < lines[0]["loss"] / 4
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    examples = encode(PAIRS, tokenizer, 32, "data")
    assert own_perplexity(model, tokenizer, examples) == pytest.approx(result.perplexity, rel=1e-4)
    with pytest.raises(InputError, match=r"output_dir: given .* holds config\.json already"):
        sft(config, model=tiny.model(), tokenizer=tiny.tokenizer(), data=PAIRS)


def test_a_model_from_scratch_on_the_command_line(tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text(
        "".join(f"a {word} film .\n" for word in ["good", "bad", "long", "short", "dull"])
    )
    argv = [f"--data={texts}", f"--output_dir={tmp_path / 'run'}", "--eval_fraction=0.2"]
    argv += ["--words=20", "--width=16", "--layers=1", "--heads=2", "--steps=3", "--batch=4"]
    assert main_sft(argv) == 0
    assert "held-out perplexity" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert (model.config.n_layer, model.config.n_embd) == (1, 16)
    assert json.loads((tmp_path / "run/summary.json").read_text())["held_out"] == 1


def test_what_is_held_out_is_not_trained_on():
    rows = [{"prompt": f"P {i % 10}", "completion": str(i)} for i in range(100)]
    training, held_out = split_rows(rows, 0.2, seed=0)
    assert {row["prompt"] for row in training} & {row["prompt"] for row in held_out} == set()
    assert (len(training), len(held_out)) == (80, 20)
    same = [{"text": "A b"}, {"text": "a  B"}, {"text": "c"}]
    for seed in range(4):
        sides = [
            {row["text"].casefold().replace(" ", "") for row in s}
            for s in split_rows(same, 0.5, seed)
        ]
        assert not sides[0] & sides[1]
    with pytest.raises(InputError, match="data: given 1 different texts, too few"):
        split_rows([{"text": "a"}, {"text": "A"}], 0.5, seed=0)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "data: given no text"),
        ([{"txt": "a"}], r"row 1 has the columns \['txt'\], expected 'text', or 'prompt'"),
        ([{"text": 3}], "row 1 has no text under 'text'"),
        ([{"messages": []}], "row 1 has no messages"),
        ([{"prompt": "w1 " * 40, "completion": "w1"}], "row 1 has a prompt of 41 tokens, expected"),
    ],
)
def test_wrong_texts(tmp_path, rows, expected):
    with pytest.raises(InputError, match=expected):
        sft(
            SFTConfig(output_dir=str(tmp_path / "run")),
            model=tiny.model(),
            tokenizer=tiny.tokenizer(),
            data=rows,
            eval_data=PAIRS,
        )
    assert not (tmp_path / "run").exists()


# Generating and evaluating


def folder_of(tmp_path, name, seed):
    tiny.model(seed=seed, dropout=0.0).save_pretrained(tmp_path / name)
    tiny.tokenizer().save_pretrained(tmp_path / name)
    return str(tmp_path / name)


def test_generate(tmp_path, capsys):
    model = folder_of(tmp_path, "model", 0)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "w1", "id": 1}\n{"prompt": "w2 w3", "id": 2}\n')
    argv = [f"--model={model}", f"--prompts={prompts}", "--samples_per_prompt=3", "--batch=4"]
    argv += ["--max_new_tokens=5"]
    assert main_generate(argv) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["id"] for line in lines] == [1, 1, 1, 2, 2, 2]
    assert set(lines[0]) == {"prompt", "id", "completion", "ended"}
    assert len({line["completion"] for line in lines}) > 1
    assert main_generate([*argv, f"--output={tmp_path / 'out.jsonl'}"]) == 0
    again = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert again == lines
    assert main_generate([*argv, f"--output={tmp_path / 'out.jsonl'}"]) == 2
    assert "which exists; expected a new one" in capsys.readouterr().err
    found = generate(
        GenerateConfig(max_new_tokens=5),
        model=tiny.model(),
        tokenizer=tiny.tokenizer(),
        prompts=tiny.PROMPTS,
    )
    assert [one.row for one in found] == tiny.PROMPTS


def test_completions_end_before_stop_strings(tmp_path):
    config = GenerateConfig(max_new_tokens=12, samples_per_prompt=4, stop=["w3", "w4 w"])
    found = generate(config, model=tiny.model(), tokenizer=tiny.tokenizer(), prompts=tiny.PROMPTS)
    assert not any("w3" in one.completion or "w4 w" in one.completion for one in found)
    assert any(one.ended for one in found)


@pytest.fixture
def evaluated(tmp_path):
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    prompts = tmp_path / "p.jsonl"
    rows = [{"prompt": f"w{i}", "reference": "w0 w1 w2 w3"} for i in range(4)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EvalConfig(
        model=folder_of(tmp_path, "policy", 0),
        reference=folder_of(tmp_path, "reference", 1),
        prompts=str(prompts),
        reward={"trainer_tiny:reward": 2.0, "length:1-3": 0.5, "regex:w1": 0.0},
        output_dir=str(tmp_path / "eval"),
        samples=48,
        batch=20,
        max_new_tokens=6,
        threads=1,
    )
    texts = [{"text": "w1 w2 w3"}, {"text": "w4"}]
    return config, evaluate_policy(config, texts=texts), texts


def test_every_figure_of_an_evaluation(evaluated):
    config, result, texts = evaluated
    lines = [json.loads(line) for line in (result.output_dir / "samples.jsonl").open()]
    metrics = json.loads((result.output_dir / "metrics.json").read_text())
    report = (result.output_dir / "report.md").read_text()
    assert len(lines) == 2 * config.samples
    for name, model in (("policy", config.model), ("reference", config.reference)):
        mine = [line for line in lines if line["model"] == name]
        texts_of = [line["completion"] for line in mine]
        found = metrics[name]
        assert found["reward, reward"] == Mean.of(tiny.reward(texts_of))._asdict()
        for line in mine:
            parts = line["rewards"]
            whole = 2 * parts["reward"] + 0.5 * parts["Length(least=1, most=3)"]
            assert parts["weighted sum"] == pytest.approx(whole)
        assert found["distinct-2"] == distinct_n(texts_of, 2)
        assert found["BLEU"] == bleu(texts_of, ["w0 w1 w2 w3"] * len(texts_of))
        loaded = AutoModelForCausalLM.from_pretrained(model).eval()
        examples = encode(texts, tiny.tokenizer(), 32, "texts")
        expected = own_perplexity(loaded, tiny.tokenizer(), examples)
        assert found["perplexity of the texts"] == pytest.approx(expected, rel=1e-4)
        for metric, value in found.items():
            assert f"| {metric} " in report
            shown = f"{value['mean']:.3f} ± " if isinstance(value, dict) else f"{value:.3f}"
            assert shown in report
    assert "KL to reference, nats per completion" in metrics["policy"]
    assert "KL to reference, nats per completion" not in metrics["reference"]


def test_the_divergence_is_the_sum_over_each_completion(evaluated):
    config, result, _ = evaluated
    lines = [json.loads(line) for line in (result.output_dir / "samples.jsonl").open()]
    tokenizer = tiny.tokenizer()
    models = [
        AutoModelForCausalLM.from_pretrained(m).eval() for m in (config.model, config.reference)
    ]
    total, count = 0.0, 0
    for line in lines:
        if line["model"] != "policy":
            continue
        given = tokenizer(line["prompt"])["input_ids"]
        end = [tokenizer.eos_token_id] if line["ended"] else []
        said = tokenizer(line["completion"], add_special_tokens=False)["input_ids"] + end
        for model, sign in zip(models, (1, -1), strict=True):
            logits = model(input_ids=torch.tensor([given + said])).logits[0, :-1].detach()
            logits[:, [0, 1, 2]] = -torch.inf  # <pad>, <unk> and <bos> are never sampled
            logprobs = logits.log_softmax(-1)[len(given) - 1 :]
            total += sign * float(logprobs[range(len(said)), said].sum())
        count += 1
    kl = result.policy["KL to reference, nats per completion"]
    assert kl.mean == pytest.approx(total / count, rel=1e-4)


def test_evaluation_on_the_command_line_without_a_reference(tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("w1\n")
    argv = [f"--model={folder_of(tmp_path, 'policy', 0)}", f"--prompts={prompts}"]
    argv += [f"--output_dir={tmp_path / 'eval'}", "--samples=3", "--max_new_tokens=4"]
    assert main_eval(argv) == 0
    assert "| distinct-1 " in capsys.readouterr().out
    assert list(json.loads((tmp_path / "eval/metrics.json").read_text())) == ["policy"]
    assert main_eval(argv) == 2
    assert "output_dir: given" in capsys.readouterr().err


def test_means_have_intervals():
    values = [1.0, 2.0, 4.0, 5.0]
    found = Mean.of(values)
    assert found.mean == 3
    assert found.half_width == pytest.approx(1.96 * torch.tensor(values).std().item() / 2)
    assert Mean.of([2.0]).half_width == math.inf


def test_distinct_n_rouge_and_bleu():
    assert distinct_n(["a b a b", "a b"], 1) == 2 / 6
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4
    assert distinct_n(["a"], 2) == 0
    pytest.importorskip("rouge_score")
    pytest.importorskip("sacrebleu")
    # of two words one is right; of the reference's four words a half, and a quarter, are said
    found = rouge(["the cat", "x"], ["the dog ran off", "y"])
    assert found["rouge1"].mean == pytest.approx((2 * 0.5 * 0.25 / 0.75) / 2)
    assert found["rouge2"].mean == 0
    assert bleu(["a b c d e"], ["a b c d e"]) == pytest.approx(100)


def test_missing_packages_are_named(monkeypatch):
    modules = __import__("sys").modules
    monkeypatch.setitem(modules, "rouge_score.rouge_scorer", None)
    monkeypatch.setitem(modules, "sacrebleu.metrics.bleu", None)
    for function, name in ((rouge, "rouge-score"), (bleu, "sacrebleu")):
        with pytest.raises(InputError, match=rf"needs {name}; .*pip install 'ppo-kernels\[eval\]'"):
            function(["a"], ["b"])


# Settings


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_setting_is_checked_and_explained(kind, capsys):
    for field in fields(kind):
        if field.type != (list[str] | None):
            with pytest.raises(InputError, match=f"^{field.name}: given"):
                kind(**{field.name: object()})
    with pytest.raises(SystemExit):
        parse_config(["--help"], "x", kind=kind)
    text = "".join(capsys.readouterr().out.split())
    lines = __import__("inspect").getsource(kind).split('"""')[1::2]
    assert len(lines) == len(fields(kind)) + 1
    for line in lines:
        assert "".join(line.split()) in text


@pytest.mark.parametrize(
    ("command", "argv", "expected"),
    [
        (main_sft, ["--step=3"], "step: no such setting; did you mean steps?"),
        (main_sft, [], "data: not given"),
        (main_sft, ["--heads=3"], "heads: given 3, expected a divisor of width=128"),
        (main_reward, ["--objective=x"], "objective: given 'x', expected Literal"),
        (main_reward, [], "model: not given"),
        (main_generate, [], "model: not given"),
        (main_generate, ["--batch=0"], "batch: given 0, expected an integer >= 1"),
        (main_eval, ["--model=m"], "prompts: not given"),
    ],
)
def test_mistakes_end_in_one_line(command, argv, expected, capsys):
    assert command(argv) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("main", "name", "where"),
    [(main_generate, "generate", ""), (main_sft, "sft", "; what was finished is in runs/x")],
)
def test_ctrl_c_ends_in_one_line(monkeypatch, capsys, main, name, where):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"ppo_kernels.trainer.commands.{name}", interrupted)
    assert main(["--output_dir", "runs/x"] if where else []) == 130
    assert capsys.readouterr().err == f"\nppo-kernels {name}: interrupted{where}\n"
