"""The parts of README.md that are generated: between <!-- NAME --> and <!-- /NAME -->."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ppo_kernels import info
from ppo_kernels.bench import results, summary

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def generated() -> dict[str, str]:
    return {"op table": info.markdown(info.backend_table()), "speed table": speed()}


def speed() -> str:
    """Table and figure of every device in benchmarks/results."""
    parts = []
    for path in sorted(ROOT.glob("benchmarks/results/*/results.csv")):
        rows = results.read_csv(path)
        parts += filter(None, (summary.headline(rows), summary.levels(rows), summary.calls(rows)))
        if path.with_name("speed.png").exists():
            parts.append(f"![speed against size]({path.with_name('speed.png').relative_to(ROOT)})")
    return "\n\n".join(parts) or "`make bench` measures the machine it runs on."


def rendered(text: str) -> str:
    """The README's text with every generated part as it should be."""
    for name, body in generated().items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m: f"{m[1]}{body}\n{m[2]}", text, flags=re.S)  # noqa: B023
        if found != 1:
            raise ValueError(f"README.md: expected one part named {name!r}, found {found}")
    return text


if __name__ == "__main__":
    before = README.read_text()
    after = rendered(before)
    if sys.argv[1:] == ["--write"] and after != before:
        README.write_text(after)
    sys.exit(0 if "--write" in sys.argv or after == before else 1)
