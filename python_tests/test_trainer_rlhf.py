"""The whole chain on made-up reviews: report with every figure, files of every step."""

import json
import random
from importlib.resources import files

import pytest
import yaml

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")
pytest.importorskip("vaderSentiment")

from ppo_kernels.trainer import InputError
from ppo_kernels.trainer.commands import main_rlhf
from ppo_kernels.trainer.demo.data import Review
from ppo_kernels.trainer.rlhf import run as chain

GOOD = ["good", "great", "wonderful", "lovely", "superb"]
BAD = ["bad", "awful", "boring", "dreadful", "terrible"]

SIZES = {
    "sft": {"steps": 25, "batch": 16, "lr": 5e-3, "words": 40, "width": 32, "layers": 1},
    "reward": {"epochs": 8, "batch": 16, "lr": 3e-3},
    "ppo": {"steps": 2, "rollouts": 16, "minibatch": 8, "max_new_tokens": 6},
    "eval": {"samples": 32, "max_new_tokens": 6},
}


def reviews(count):
    """Sentences whose rating is how many of their words are good."""
    draw = random.Random(0)
    found = []
    for _ in range(count):
        words = [draw.choice(GOOD + BAD) for _ in range(3)]
        text = "The {} movie has a {} plot and {} music.".format(*words)
        found.append(Review(text, 2.0 * sum(word in GOOD for word in words) - 3))
    return found


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings(tmp_path):
    """Those of the package, made small."""
    folder = tmp_path / "settings"
    folder.mkdir()
    for step, sizes in SIZES.items():
        own = yaml.safe_load((files("ppo_kernels.trainer.rlhf") / f"{step}.yaml").read_text())
        assert set(sizes) <= set(own)
        (folder / f"{step}.yaml").write_text(yaml.safe_dump(own | sizes))
    return folder


def test_the_whole_chain(tmp_path, settings, monkeypatch, capsys):
    monkeypatch.setattr(chain, "load_reviews", lambda path: reviews(200))
    folder = tmp_path / "run"
    argv = [f"--output_dir={folder}", f"--settings={settings}", "--held_out=40"]
    assert main_rlhf(argv) == 0
    printed = capsys.readouterr().out

    lines = {
        name: [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").open()]
        for name in ("texts", "texts_held_out", "ratings", "ratings_held_out")
    }
    texts = {row["text"].casefold() for row in lines["texts"]}
    held_out = {row["text"].casefold() for row in lines["texts_held_out"]}
    assert len(held_out) == 40
    assert not texts & held_out
    assert {row["completion"].casefold() for row in lines["ratings_held_out"]} == held_out

    report = json.loads((folder / "report.json").read_text())
    reward = json.loads((folder / "reward" / "summary.json").read_text())
    metrics = json.loads((folder / "eval" / "metrics.json").read_text())
    sft = json.loads((folder / "sft" / "summary.json").read_text())
    assert report["perplexity"]["after"] == sft["perplexity"] < sft["perplexity_before"] / 2
    assert report["pair_accuracy"]["reward_model"] == reward["accuracy"] > 0.8
    assert 0.5 < report["pair_accuracy"]["vader"] <= 1
    for figure, name in (
        ("reward_model_score", f"reward, {folder}/reward/model"),
        ("vader_score", "reward, vader"),
    ):
        assert report[figure]["before"] == metrics["reference"][name]["mean"]
        assert report[figure]["after"] == metrics["policy"][name]["mean"]
    text = (folder / "report.md").read_text()
    for figure in (
        f"{report['perplexity']['after']:.1f}",
        f"{report['pair_accuracy']['reward_model']:.1%}",
        f"{report['reward_model_score']['after']:.3f}",
        f"{report['vader_score']['before']:.3f}",
        f"{report['vader_score']['after']:.3f}",
    ):
        assert figure in text
    assert text in printed
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_settings_that_are_not_there(tmp_path, capsys):
    argv = [f"--output_dir={tmp_path / 'run'}", f"--settings={tmp_path}"]
    assert main_rlhf(argv) == 2
    assert "expected a folder with sft.yaml" in capsys.readouterr().err


def test_sentences_that_differ_in_case_only_are_one():
    found = chain.distinct([Review("A film", 1.0), Review("a  Film", 2.0), Review("b", 0.0)])
    assert [review.text for review in found] == ["A film", "b"]


def test_more_held_out_than_there_is(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(chain, "load_reviews", lambda path: reviews(30))
    config = chain.RLHFConfig(output_dir=str(tmp_path), settings=str(settings), held_out=500)
    with pytest.raises(InputError, match="held_out: given 500, expected fewer than"):
        chain.run(config)
