"""Reward models: the loss is its formula, splits share nothing, agreement is counted right."""

import itertools
import json
import math
import random

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

import trainer_tiny as tiny

from ppo_kernels.trainer import InputError, RewardConfig, train_reward
from ppo_kernels.trainer.commands import main_reward
from ppo_kernels.trainer.feedback import overlap, read_feedback, split_feedback
from ppo_kernels.trainer.reward import batches, bradley_terry_loss
from ppo_kernels.trainer.reward_report import agreement
from ppo_kernels.trainer.rewards import load_reward, score

pytestmark = pytest.mark.usefixtures("one_thread")


def read(rows, min_gap=0.5):
    return read_feedback(rows, tiny.tokenizer(), min_gap, "data")


def ratings(count, prompts=None):
    """Texts rated by how many of their words are w0 rather than w1."""
    draw = random.Random(0)
    rows = []
    for i in range(count):
        words = [draw.choice(["w0", "w1", "w2", "w3"]) for _ in range(5)]
        rating = words.count("w0") - words.count("w1")
        rows.append({"completion": " ".join(words), "rating": rating})
        if prompts:
            rows[-1]["prompt"] = f"w{i % prompts}"
    return rows


def pairs(count):
    rows = ratings(2 * count)
    found = []
    for one, other in itertools.pairwise(rows):
        better, worse = sorted((one, other), key=lambda row: -row["rating"])
        if better["rating"] > worse["rating"]:
            found.append({"chosen": better["completion"], "rejected": worse["completion"]})
    return found[:count]


# Loss


def test_bradley_terry_is_its_formula():
    scores = torch.tensor([0.3, -1.2, 2.0, 0.7, 0.0], requires_grad=True)
    rated = torch.tensor([1.0, 0.5, -2.0, 3.0, 0.9])
    groups = torch.tensor([0, 0, 0, 1, 1])
    loss = bradley_terry_loss(scores, rated, groups, min_gap=0.5)
    better = [(0, 1), (0, 2), (1, 2), (3, 4)]
    expected = (
        sum(math.log1p(math.exp(-float((scores[i] - scores[j]).detach()))) for i, j in better) / 4
    )
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    loss.backward()
    gradient = torch.zeros(5)
    for i, j in better:
        slope = -torch.sigmoid((scores[j] - scores[i]).detach()) / 4
        gradient[i] += slope
        gradient[j] -= slope
    torch.testing.assert_close(scores.grad, gradient)


def test_without_a_pair_the_loss_is_a_connected_zero():
    scores = torch.tensor([1.0, 2.0], requires_grad=True)
    loss = bradley_terry_loss(scores, torch.tensor([1.0, 1.2]), torch.tensor([0, 0]), 0.5)
    loss.backward()
    assert float(loss.detach()) == 0
    assert scores.grad.tolist() == [0, 0]


# Data


def test_preferences_and_ratings_are_read_alike():
    found = read([{"prompt": "p", "chosen": "good", "rejected": [{"content": "bad"}]}] * 2)
    assert found.completions == ["good", "bad"] * 2
    assert found.prompts == ["p"] * 4
    assert found.ratings == [1, 0, 1, 0]
    assert found.groups == [1, 1, 2, 2]
    rated = read([{"completion": "a", "rating": "-1.5"}, {"completion": "b", "rating": 2}])
    assert (rated.ratings, rated.groups, rated.min_gap) == ([-1.5, 2], [0, 0], 0.5)
    mixed = [{"prompt": p, "completion": "c", "rating": 1} for p in "aba"]
    assert read(mixed).groups == [0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "data: given no row"),
        ([{"chosen": "a"}], r"row 1 has the columns \['chosen'\], expected 'chosen' and"),
        ([{"completion": "a", "rating": 1}, {"chosen": "a", "rejected": "b"}], "row 2 has the col"),
        ([{"chosen": "a", "rejected": "a"}], "row 1 has the same text under 'chosen' and"),
        ([{"chosen": "a", "rejected": " "}], "row 1 has no text under 'rejected'"),
        ([{"completion": "a", "rating": "best"}], "row 1 has the rating 'best', expected a number"),
        ([{"completion": "a", "rating": math.nan}], "row 1 has the rating nan"),
        ([{"completion": "a", "rating": 1, "prompt": 3}], "row 1 has no text under 'prompt'"),
    ],
)
def test_wrong_feedback(rows, expected):
    with pytest.raises(InputError, match=expected):
        read(rows)


@pytest.mark.parametrize(
    "rows",
    [
        [{"completion": f"Text {i % 20}", "rating": i} for i in range(60)],
        [{"prompt": f"p{i % 20}", "completion": "same", "rating": i} for i in range(60)],
        # a chain of texts: 0-1, 1-2, then 3-4, 4-5, ...
        [{"chosen": f"t{i + i // 2}", "rejected": f"T{i + i // 2 + 1}"} for i in range(60)],
    ],
)
def test_no_text_or_prompt_is_on_both_sides(rows):
    feedback = read(rows)
    for seed in range(5):
        training, held_out = split_feedback(feedback, 0.3, seed)
        assert not overlap(training, held_out)
        sides = [
            {(prompt or text).casefold() for prompt, text in zip(*side[:2], strict=True)}
            for side in (training, held_out)
        ]
        assert not sides[0] & sides[1]
        assert len(training.groups) + len(held_out.groups) == len(feedback.groups)
        assert 0.2 <= len(held_out.groups) / len(feedback.groups) <= 0.3
        if feedback.is_pairs:
            assert held_out.ratings == [1, 0] * (len(held_out.ratings) // 2)


def test_feedback_that_cannot_be_split():
    chain = [{"chosen": f"t{i}", "rejected": f"t{i + 1}"} for i in range(20)]
    with pytest.raises(InputError, match="given 1 prompts or texts that share nothing, too few"):
        split_feedback(read(chain), 0.3, 0)


def test_batches_hold_every_text_once_and_keep_small_groups_whole():
    feedback = read(
        [{"prompt": f"p{i // 3}", "completion": str(i), "rating": i} for i in range(30)]
    )
    epoch = list(batches(feedback, 8, seed=0))
    assert sorted(i for batch in epoch for i in batch) == list(range(30))
    for batch in epoch:
        assert len(batch) <= 8
        for i in batch:
            assert {j for j in range(30) if j // 3 == i // 3} <= set(batch)
    one = list(batches(read(ratings(30)), 8, seed=0))
    assert sorted(map(len, one)) == [6, 8, 8, 8]
    assert one != list(batches(read(ratings(30)), 8, seed=1))


# Agreement


def test_agreement_counts_every_pair():
    torch.manual_seed(0)
    feedback = read(ratings(40, prompts=3))
    scores = torch.randn(40).round(decimals=1)
    found = agreement(scores, feedback, "bradley-terry")
    right, count = 0.0, 0
    for i, j in itertools.permutations(range(40), 2):
        same = feedback.groups[i] == feedback.groups[j]
        if same and feedback.ratings[i] - feedback.ratings[j] >= 0.5:
            count += 1
            right += float(scores[i] > scores[j]) + 0.5 * float(scores[i] == scores[j])
    assert found.pairs == count
    assert found.accuracy == pytest.approx(right / count)
    assert sum(each.size for each in found.calibration) == count


def test_calibration_of_a_model_whose_odds_are_right():
    draw = torch.Generator().manual_seed(0)
    rows, scores = [], []
    for i in range(4000):
        margin = float(torch.randn((), generator=draw) * 2)
        first = torch.rand((), generator=draw) < 1 / (1 + math.exp(-margin))
        texts = [f"a{i}", f"b{i}"]
        rows.append(dict(zip(("chosen", "rejected"), texts if first else texts[::-1], strict=True)))
        scores += [margin, 0.0] if first else [0.0, margin]
    right = agreement(torch.tensor(scores), read(rows), "bradley-terry")
    assert right.calibration_error < 0.02
    for each in right.calibration:
        assert each.observed == pytest.approx(each.predicted, abs=0.08)
    overconfident = agreement(torch.tensor(scores) * 4, read(rows), "bradley-terry")
    assert overconfident.calibration_error > 0.1
    assert overconfident.accuracy == right.accuracy


def test_calibration_of_ratings():
    feedback = read(ratings(200))
    found = agreement(torch.tensor(feedback.ratings) + 1, feedback, "regression")
    assert found.accuracy == 1
    assert found.calibration_error == pytest.approx(1)


# The command


@pytest.mark.parametrize(
    ("rows", "objective"),
    [(ratings(300), "bradley-terry"), (ratings(300), "regression"), (pairs(200), "bradley-terry")],
    ids=["ratings", "regression", "preferences"],
)
def test_it_learns_what_people_like(tmp_path, rows, objective):
    tiny.model(dropout=0.0).save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    config = RewardConfig(
        model=str(tmp_path / "lm"),
        output_dir=str(tmp_path / "run"),
        objective=objective,
        epochs=6,
        batch=32,
        lr=5e-3,
        threads=1,
    )
    result = train_reward(config, data=rows)
    assert result.agreement.accuracy > 0.9
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["accuracy"] == result.agreement.accuracy
    assert summary["training_texts"] + summary["texts"] == len(rows) * (1 + ("chosen" in rows[0]))
    assert (tmp_path / "run/calibration.png").read_bytes().startswith(b"\x89PNG")
    files = {path.name for path in (tmp_path / "run/model").iterdir()}
    assert "model.safetensors" in files
    reward = load_reward(str(tmp_path / "run/model"), torch.device("cpu"))
    found = score(reward, [{"prompt": ""}] * 2, ["w0 w0 w2 w0 w3", "w1 w2 w1 w3 w1"])
    again = result.reward(["", ""], ["w0 w0 w2 w0 w3", "w1 w2 w1 w3 w1"])
    assert found.tolist() == again
    assert found[0] > found[1] + 1


def test_held_out_data_that_was_trained_on_are_refused(tmp_path, capsys):
    tiny.model().save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    for name, texts in (("a", ["One  text", "two"]), ("b", ["three", "one text"])):
        rows = [{"completion": text, "rating": i} for i, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [f"--model={tmp_path / 'lm'}", f"--data={tmp_path / 'a.jsonl'}"]
    argv += [f"--eval_data={tmp_path / 'b.jsonl'}", f"--output_dir={tmp_path / 'run'}"]
    assert main_reward(argv) == 2
    assert "shares 1 prompts or texts with data, expected none; one of them: 'one text'" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_regression_needs_ratings(tmp_path):
    tiny.model().save_pretrained(tmp_path / "lm")
    tiny.tokenizer().save_pretrained(tmp_path / "lm")
    config = RewardConfig(model=str(tmp_path / "lm"), objective="regression")
    with pytest.raises(InputError, match="objective: given 'regression', which needs ratings"):
        train_reward(config, data=pairs(30))
