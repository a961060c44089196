"""Collecting ratings: the questions, the file, the page in a real browser, the terminal."""

import errno
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import threading
import time

import pytest

pytest.importorskip("transformers")
pytest.importorskip("flask")

import trainer_tiny as tiny

from ppo_kernels.trainer import InputError, RateConfig, rate
from ppo_kernels.trainer.commands import main_rate
from ppo_kernels.trainer.feedback import read_feedback
from ppo_kernels.trainer.rating import page, queue
from ppo_kernels.trainer.rating.queue import Queue, Stale, claimed, make_items
from ppo_kernels.trainer.rating.terminal import printable

ROWS = [{"prompt": f"prompt {i // 3}", "completion": f"text {i}", "ended": True} for i in range(6)]
CHAT = [{"role": "user", "content": "Say <b>hi</b>"}]
HOSTILE = "<script>document.title='owned'</script>\n<img src=x onerror=\"document.title='owned'\">"


def written(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stars(tmp_path, rows=ROWS, seed=0):
    return Queue(make_items(rows, "stars", 1, seed), tmp_path / "out.jsonl", "stars")


def pairs(tmp_path, rows=ROWS, per_prompt=1, seed=0):
    return Queue(make_items(rows, "pairs", per_prompt, seed), tmp_path / "out.jsonl", "pairs")


# Questions


def test_every_completion_is_asked_for_once_in_the_order_of_the_seed():
    rows = [*ROWS, {**ROWS[0], "ended": False}]
    items = list(make_items(rows, "stars", 1, 0).values())
    assert sorted(item.completions[0] for item in items) == [f"text {i}" for i in range(6)]
    assert list(make_items(rows, "stars", 1, 0).values()) == items
    assert list(make_items(rows, "stars", 1, 1).values()) != items


@pytest.mark.parametrize(("per_prompt", "expected"), [(1, 2), (2, 4), (None, 6), (9, 6)])
def test_pairs_are_of_one_prompt_and_differ(per_prompt, expected):
    items = list(make_items([*ROWS, *ROWS], "pairs", per_prompt, 0).values())
    assert len(items) == expected
    assert len({frozenset(item.completions) for item in items}) == expected
    prompts = {row["completion"]: row["prompt"] for row in ROWS}
    for item in items:
        assert len(set(item.completions)) == 2
        assert {prompts[text] for text in item.completions} == {item.prompt}


def test_neither_side_is_preferred():
    rows = [{"prompt": str(i), "completion": text} for i in range(400) for text in "ab"]
    first = [item.completions[0] for item in make_items(rows, "pairs", 1, 0).values()]
    assert 160 < first.count("a") < 240


@pytest.mark.parametrize(
    ("rows", "mode", "message"),
    [
        ([], "stars", "data: given no row"),
        ([{"prompt": "p"}], "stars", "data: row 1 has no text under 'completion'"),
        ([ROWS[0], "text"], "stars", "data: row 2 has no text under 'completion': 'text'"),
        ([{"prompt": 3, "completion": "x"}], "stars", "data: row 1 has neither a text nor"),
        ([{"prompt": ["hi"], "completion": "x"}], "stars", "data: row 1 has neither a text nor"),
        ([ROWS[0], ROWS[0]], "pairs", "data: given 2 rows without two different completions"),
    ],
)
def test_rows_that_cannot_be_asked_for(rows, mode, message):
    with pytest.raises(InputError, match=re.escape(message)):
        make_items(rows, mode, 1, 0)


# Answers


def test_ratings_are_rows_that_reward_reads(tmp_path):
    asked = stars(tmp_path)
    for option in (5, 1, 3, 2, 4, 1):
        asked.answer(asked.key, option)
    assert asked.key is None
    assert asked.done == 6
    rows = written(asked.path)
    assert [row["rating"] for row in rows] == [5, 1, 3, 2, 4, 1]
    by_text = {row["completion"]: row for row in ROWS}
    assert [{**by_text[row["completion"]], "rating": row["rating"]} for row in rows] == rows
    feedback = read_feedback(rows, tiny.tokenizer(), 0.5, "data")
    assert not feedback.is_pairs
    assert feedback.ratings == [5, 1, 3, 2, 4, 1]


def test_choices_are_rows_that_reward_reads(tmp_path):
    asked = pairs(tmp_path, per_prompt=None)
    expected = []
    for option in (1, 2, 2, 1, 2, 1):
        shown = asked.state()
        better, worse = shown["completions"] if option == 1 else shown["completions"][::-1]
        expected.append({"prompt": shown["prompt"], "chosen": better, "rejected": worse})
        asked.answer(asked.key, option)
    assert written(asked.path) == expected
    feedback = read_feedback(expected, tiny.tokenizer(), 0.5, "data")
    assert feedback.is_pairs
    assert feedback.completions[::2] == [row["chosen"] for row in expected]


@pytest.mark.parametrize("make", [stars, pairs])
def test_what_is_answered_is_not_asked_again(tmp_path, make):
    asked = make(tmp_path)
    asked.answer(asked.key, 2)
    left = [key for key in asked.items if key != next(iter(asked.items))]
    again = make(tmp_path)
    assert again.done == 1
    for key in left:
        assert again.key == key
        again.answer(key, 1)
    assert again.key is None
    assert len(written(asked.path)) == len(asked.items)


def test_other_rows_of_the_file_stay(tmp_path):
    other = {"prompt": "é", "completion": "elsewhere", "rating": 3}
    (tmp_path / "out.jsonl").write_text(json.dumps(other) + "\n")
    asked = stars(tmp_path)
    assert asked.done == 0
    asked.undo()
    assert written(asked.path) == [other]
    asked.answer(asked.key, 1)
    assert written(asked.path)[0] == other


def test_a_file_of_another_kind_is_refused_and_left(tmp_path):
    text = json.dumps({"chosen": "a", "rejected": "b"}) + "\n"
    (tmp_path / "out.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"output: row 1 .* expected completion, as mode 'stars'"):
        stars(tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == text


def test_undo_asks_again_also_after_a_new_start(tmp_path):
    asked = stars(tmp_path)
    first = asked.key
    asked.answer(first, 5)
    again = stars(tmp_path)
    assert again.can_undo
    again.undo()
    assert again.key == first
    assert written(asked.path) == []
    assert not again.can_undo
    again.undo()
    assert again.done == 0


def test_skipped_questions_come_last(tmp_path):
    asked = stars(tmp_path)
    order = list(asked.items)
    asked.skip(order[0])
    for key in [*order[1:], order[0]]:
        asked.answer(key, 1)
    assert asked.done == 6


def test_an_answer_counts_for_its_own_question_only(tmp_path):
    asked = stars(tmp_path)
    first = asked.key
    asked.answer(first, 4)
    for late in (lambda: asked.answer(first, 1), lambda: asked.skip(first)):
        with pytest.raises(Stale):
            late()
    assert [row["rating"] for row in written(asked.path)] == [4]


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_answer_that_cannot_be_written_is_not_lost(tmp_path, monkeypatch):
    asked = stars(tmp_path)
    asked.answer(asked.key, 4)
    before, key = asked.path.read_text(), asked.key
    with monkeypatch.context() as patch:
        patch.setattr(queue, "atomic_file", full_disk)
        for change in (lambda: asked.answer(key, 2), asked.undo):
            with pytest.raises(OSError, match="No space"):
                change()
    assert asked.key == key
    assert asked.done == 1
    assert asked.path.read_text() == before
    asked.answer(key, 2)
    assert [row["rating"] for row in written(asked.path)] == [4, 2]


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "out.jsonl"
    with (
        claimed(path),
        pytest.raises(InputError, match=r"output: .* another `ppo-kernels rate`"),
        claimed(path),
    ):
        pass
    with claimed(path):
        pass


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "likes"}, "mode: given 'likes', expected one of stars, pairs"),
        ({"port": 65536}, "port: given 65536, expected an integer in 0..65535"),
        ({"pairs_per_prompt": 0}, "pairs_per_prompt: given 0, expected an integer >= 1"),
        ({"output": "ratings.csv"}, "output: given 'ratings.csv', expected a file name that ends"),
        ({"output": None}, "output: not given"),
        ({"data": None}, "data: not given"),
        ({"data": "nowhere.jsonl"}, "data: given 'nowhere.jsonl', which cannot be read"),
        ({"ui": "terminal"}, "ui: given 'terminal', but the standard input is none"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path, settings, message, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(InputError, match=re.escape(message)):
        rate(RateConfig(**{"data": "x.jsonl", "output": str(tmp_path / "o.jsonl")} | settings))
    assert not list(tmp_path.iterdir())


def test_a_port_in_use_is_named(tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with page.socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = ["--data", tmp_path / "data.jsonl", "--output", tmp_path / "o.jsonl"]
        assert main_rate([str(a) for a in [*arguments, "--port", port]]) == 2
    assert f"port: given {port}, which cannot be used" in capsys.readouterr().err


# The page, without a browser


@pytest.fixture
def client(tmp_path):
    return page.make_app(stars(tmp_path), "token").test_client()


def test_only_this_machine_and_who_knows_the_address_are_answered(client):
    assert client.get("/token/state").status_code == 200
    assert client.get("/state").status_code == 404
    assert client.get("/other/state").status_code == 404
    assert client.get("/token/state", headers={"Host": "evil.example"}).status_code == 400
    body = json.dumps({"key": client.get("/token/state").json["key"], "option": 1})
    for action in ("answer", "skip", "undo", "finish"):  # what another site's form could send
        sent = client.post(f"/token/{action}", data=body, content_type="text/plain")
        assert sent.status_code == 415
    assert client.get("/token/state").json["done"] == 0
    assert "default-src 'none'" in client.get("/token/").headers["Content-Security-Policy"]


@pytest.mark.parametrize("option", [0, 6, "5", None, True, 2.0])
def test_options_are_checked(client, option):
    key = client.get("/token/state").json["key"]
    answer = client.post("/token/answer", json={"key": key, "option": option})
    assert answer.status_code == 400
    assert "expected 1 to 5" in answer.json["error"]


# The page in a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    found = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in found:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for argument in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"):
        options.add_argument(f"--{argument}")
    for argument in ("disable-background-networking", "disable-component-update", "disable-sync"):
        options.add_argument(f"--{argument}")
    service = webdriver.ChromeService(executable_path=found[1])
    driver = webdriver.Chrome(options=options, service=service)
    driver.implicitly_wait(0)
    yield driver
    driver.quit()


class Visit:
    """A rating served for a browser, which is on its page."""

    def __init__(self, browser, tmp_path, capfd, data, done=0, **settings):
        self.browser, self.path, self.result = browser, tmp_path / "out.jsonl", None
        config = RateConfig(output=str(self.path), port=0, open_page=False, **settings)

        def serve():
            self.result = rate(config, data=data)

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        shown = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+/\S+/\n", shown)):
            assert self.thread.is_alive(), shown
            shown += capfd.readouterr().out
        browser.get(found[0].strip())
        self.settle(done)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.thread.is_alive():
            self.browser.execute_script("act = null; document.getElementById('finish').click()")
        self.thread.join(20)
        assert not self.thread.is_alive()

    def settle(self, done):
        """Wait until the page shows that many answers and takes the next."""
        for _ in range(500):
            text = self.element("count").text
            if text.startswith(f"{done} of ") and not self.browser.execute_script("return busy"):
                return
            time.sleep(0.02)
        raise AssertionError(f"the page shows {self.element('count').text!r}, expected {done}")

    def element(self, name):
        return self.browser.find_element("css selector", f"#{name}")

    def press(self, key, done):
        self.browser.find_element("css selector", "body").send_keys(key)
        self.settle(done)

    @property
    def completions(self):
        found = self.browser.find_elements("css selector", ".completion")
        return [one.text for one in found]


def test_stars_by_keys_and_buttons(browser, tmp_path, capfd):
    with Visit(browser, tmp_path, capfd, ROWS) as visit:
        shown = []
        for done, key in enumerate("513"):
            shown += visit.completions
            assert visit.element("question").text == "How good is this?"
            assert not visit.element("end").is_displayed()
            visit.press(key, done + 1)
            assert [row["rating"] for row in written(visit.path)] == [5, 1, 3][: done + 1]
        assert [row["completion"] for row in written(visit.path)] == shown
        assert visit.element("progress").get_property("value") == 3
        visit.press("u", 2)
        assert visit.completions == shown[-1:]
        visit.press("9", 2)  # no such option: nothing happens
        visit.press("s", 2)
        assert visit.completions != shown[-1:]
        for done in range(2, 6):
            visit.browser.find_element("css selector", "[aria-label='4 of 5 stars']").click()
            visit.settle(done + 1)
        assert visit.element("end").is_displayed()
        assert visit.element("question").text == "Thank you"
        assert not visit.element("skip").is_enabled()
        visit.press("5", 6)
        visit.element("finish").click()
        visit.thread.join(20)
    assert visit.result == (visit.path, 6, 6)
    assert [row["rating"] for row in written(visit.path)] == [5, 1, 4, 4, 4, 4]
    assert written(visit.path)[-1]["completion"] == shown[-1]


def test_pairs_by_arrows_and_where_one_left_off(browser, tmp_path, capfd):
    settings = {"mode": "pairs", "pairs_per_prompt": None}
    with Visit(browser, tmp_path, capfd, ROWS, **settings) as visit:
        left, right = visit.completions
        visit.press("\ue014", 1)  # arrow right
        first = written(visit.path)[0]
        assert (first["chosen"], first["rejected"]) == (right, left)
        assert {row["prompt"] for row in ROWS if row["completion"] in (left, right)} == {
            first["prompt"]
        }
        next_pair = visit.completions
    assert visit.result == (visit.path, 1, 6)
    with Visit(browser, tmp_path, capfd, ROWS, done=1, **settings) as visit:
        assert visit.completions == next_pair
        visit.press("\ue012", 2)  # arrow left
    last = written(visit.path)[-1]
    assert [last["chosen"], last["rejected"]] == next_pair


def test_texts_are_shown_as_they_are(browser, tmp_path, capfd):
    rows = [{"prompt": CHAT, "completion": HOSTILE}]
    with Visit(browser, tmp_path, capfd, rows) as visit:
        assert visit.completions == [HOSTILE]
        assert "Say <b>hi</b>" in visit.element("cards").text
        assert browser.title == "Rating completions"
        visit.press("2", 1)
    assert written(visit.path) == [{**rows[0], "rating": 2}]


def test_the_page_says_what_went_wrong(browser, tmp_path, capfd, monkeypatch):
    with Visit(browser, tmp_path, capfd, ROWS) as visit:
        shown = visit.completions
        with monkeypatch.context() as patch:
            patch.setattr(queue, "atomic_file", full_disk)
            visit.press("3", 0)
            assert "cannot be written: No space left" in visit.element("error").text
        assert visit.completions == shown
        # another window answers; this one's answer is not taken for the next question
        script = (
            "fetch('answer', {method: 'POST', headers: {'Content-Type': 'application/json'},"
            " body: JSON.stringify({key: state.key, option: 5})}).then(arguments[0])"
        )
        browser.execute_async_script(script)
        visit.press("1", 1)
        assert visit.element("error").text == "this was answered elsewhere"
        visit.press("2", 2)
        assert not visit.element("error").is_displayed()
    assert [row["rating"] for row in written(visit.path)] == [5, 2]


# The terminal


def test_a_terminal_is_not_steered_by_what_it_shows():
    assert printable("a\x1b[2Jb\tc\n\x07é🙂") == "a\\x1b[2Jb\tc\n\\x07é🙂"


def test_keys_in_a_terminal(tmp_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "out.jsonl"
    program = (
        "import sys; from ppo_kernels.trainer.rating import RateConfig, rate\n"
        "print('now', rate(RateConfig(data=sys.argv[1], output=sys.argv[2], ui='terminal',"
        " mode='pairs', pairs_per_prompt=2)).done)"
    )
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path / "data.jsonl", out],
        stdin=child, stdout=child, stderr=child, start_new_session=True,
    )  # fmt: skip
    os.close(child)
    shown = b""

    def wait_for(text):
        nonlocal shown
        while text not in shown:
            ready, _, _ = select.select([parent], [], [], 60)
            assert ready, shown.decode()
            try:
                shown += os.read(parent, 65536)
            except OSError as error:
                raise AssertionError(shown.decode()) from error
        shown = shown.split(text, 1)[1]

    for keys, text in (
        (b"", b"0 of 4"), (b"x", b"0 of 4"), (b"1", b"1 of 4"), (b"2", b"2 of 4"),
        (b"u", b"1 of 4"), (b"s", b"1 of 4"), (b"\x1b[C", b"2 of 4"), (b"q", b"now 2"),
    ):  # fmt: skip
        while termios.tcgetattr(parent)[3] & termios.ICANON:  # until it listens to single keys
            time.sleep(0.02)
        os.write(parent, keys)
        wait_for(text)
    assert process.wait(20) == 0
    os.close(parent)
    rows = written(out)
    assert len(rows) == 2
    items = list(make_items(ROWS, "pairs", 2, 0).values())
    assert (rows[0]["chosen"], rows[0]["rejected"]) == items[0].completions
    assert (rows[1]["rejected"], rows[1]["chosen"]) == items[2].completions
