"""Generated parts of README.md and pages of docs: between <!-- NAME --> and <!-- /NAME -->."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ppo_kernels import info
from ppo_kernels._op import BACKENDS, OPS
from ppo_kernels.bench import results, summary
from ppo_kernels.integrations import openrlhf, torchrl, trl, verl
from ppo_kernels.ops._policy import VARIANTS
from ppo_kernels.ops.importance import CORRECTIONS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DROP_IN = ROOT / "docs/drop_in.md"
PAGES = (README, ROOT / "docs/variants.md", DROP_IN)


def generated(page: Path) -> dict[str, str]:
    if page == README:
        return {"op table": info.markdown(info.backend_table()), "speed table": speed()}
    if page == DROP_IN:
        return {"replaced": replaced()}
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
    rows = [["variant", "loss of a token", "kind", "backends", "paper"]]
    for name, v in VARIANTS.items():
        formula = v.formula.replace("|", r"\|")
        rows.append([f"`{name}`", formula, v.kind, backends("clipped_loss"), v.paper])
    return info.markdown(rows)


def corrections() -> str:
    rows = [["kind", "weight", "backends", "source"]]
    for name, c in CORRECTIONS.items():
        rows.append([f"`{name}`", c.formula, backends("importance_weights"), c.paper])
    return info.markdown(rows)


def backends(op: str) -> str:
    return ", ".join(b for b in BACKENDS if b == "torch" or b in OPS[op].kernels)


def replaced() -> str:
    """What `patch()` puts where, for every host."""
    parts = []
    for host in (trl.HOST, verl.HOST, openrlhf.HOST, torchrl.HOST):
        rows = [[f"{host.package} {', '.join(host.versions)}", "ours", "what changes"]]
        for r in host.replacements:
            module, _, name = r.target.partition(":")
            calls = ", ".join(f"`{c}`" for c in r.calls.split(", "))
            rows.append([f"`{module.removeprefix(host.package + '.')}.{name}`", calls, r.changes])
        parts.append(info.markdown(rows))
    return "\n\n".join(parts)


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
