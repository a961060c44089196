"""The questions in a terminal, answered by single keys."""

import click

from ppo_kernels.trainer.rating.queue import Queue

ARROWS = {"\x1b[D": 1, "\x1b[C": 2, "\x1bOD": 1, "\x1bOC": 2}
HELP = {
    5: "1-5 stars   s skip   u undo   q quit",
    2: "1 or ← the first is better   2 or → the second   s skip   u undo   q quit",
}


def ask(queue: Queue) -> None:
    """Ask until all is answered, or the user quits."""
    while (key := queue.key) is not None:
        _show(queue)
        pressed = click.getchar()
        option = ARROWS.get(pressed, 0) if queue.options == 2 else 0
        if pressed.isdecimal():
            option = int(pressed)
        if pressed in ("q", "\x04"):
            return
        if pressed == "s":
            queue.skip(key)
        elif pressed in ("u", "\x7f"):
            queue.undo()
        elif 1 <= option <= queue.options:
            queue.answer(key, option)
            click.echo(f"→ {option}")


def _show(queue: Queue) -> None:
    state = queue.state()
    click.echo(f"\n{state['done']} of {state['total']}   {HELP[queue.options]}\n")
    if isinstance(state["prompt"], str):
        prompt = printable(state["prompt"])
    else:
        prompt = "".join(
            f"{printable(message['role'])}: {printable(message['content'])}\n"
            for message in state["prompt"]
        )
    for number, completion in enumerate(state["completions"], 1):
        if queue.options == 2:
            click.secho(f"[{number}] ", bold=True, nl=False)
        click.secho(prompt, dim=True, nl=False)
        click.echo(printable(completion))


def printable(text: str) -> str:
    """Write control characters as escapes: a completion must not steer the terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
