"""Generated parts of README.md and docs/variants.md: between <!-- NAME --> and <!-- /NAME -->."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ppo_kernels import info
from ppo_kernels._op import BACKENDS, OPS
from ppo_kernels.bench import results, summary
from ppo_kernels.ops._policy import VARIANTS
from ppo_kernels.ops.importance import CORRECTIONS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "docs/variants.md")


def generated(page: Path) -> dict[str, str]:
    if page == README:
        return {"op table": info.markdown(info.backend_table()), "speed table": speed()}
    return {"variants": variants(), "corrections": corrections()}


def speed() -> str:
    """Table and figure of every device in benchmarks/results."""
    parts = []
    for path in sorted(ROOT.glob("benchmarks/results/*/results.csv")):
        rows = results.read_csv(path)
        parts += filter(None, (summary.headline(rows), summary.levels(rows), summary.calls(rows)))
        if path.with_name("speed.png").exists():
            parts.append(f"![speed against size]({path.with_name('speed.png').relative_to(ROOT)})")
    return "\n\n".join(parts) or "`make bench` measures the machine it runs on."


def variants() -> str:
    backends = ", ".join(b for b in BACKENDS if b == "torch" or b in OPS["clipped_loss"].kernels)
    rows = [["variant", "loss of a token", "kind", "backends", "paper"]]
    for name, v in VARIANTS.items():
        rows.append([f"`{name}`", v.formula.replace("|", r"\|"), v.kind, backends, v.paper])
    return info.markdown(rows)


def corrections() -> str:
    rows = [[f"`{name}`", c.formula, c.paper] for name, c in CORRECTIONS.items()]
    return info.markdown([["kind", "weight", "source"], *rows])


def rendered(page: Path) -> str:
    """The page's text with every generated part as it should be."""
    text = page.read_text()
    for name, body in generated(page).items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m: f"{m[1]}{body}\n{m[2]}", text, flags=re.S)  # noqa: B023
        if found != 1:
            raise ValueError(f"{page.name}: expected one part named {name!r}, found {found}")
    return text


if __name__ == "__main__":
    stale = [page for page in PAGES if rendered(page) != page.read_text()]
    if sys.argv[1:] == ["--write"]:
        for page in stale:
            page.write_text(rendered(page))
    sys.exit(0 if "--write" in sys.argv else bool(stale))
