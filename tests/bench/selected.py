"""How many nodes the selection endpoint chooses in a second, alone, and its bars. Runs `python -m tests.bench.selection`."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median

import msgspec

from tests.house.tree import ROOT

BARS = {10: 20_000, 100: 12_000}
"""Decisions per second, by nodes."""


class Selected(msgspec.Struct):
    """By number of nodes."""

    per_s: dict[int, float]
    alone_per_s: dict[int, float]
    """With a core of its own: by the processor time of a decision."""


def exists() -> bool:
    return (ROOT / "tests" / "bench" / "selection.py").is_file()


def run(_: Path, *, rounds: int, say: Callable[[str], None]) -> Selected:
    """Medians of so many runs."""
    found: dict[int, list[tuple[float, float]]] = {}
    for number in range(rounds):
        say(f"selection alone, {number + 1} of {rounds}")
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.selection"], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )
        rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| [\d.]+ µs \| ([\d,]+)/s \|$", done.stdout, re.MULTILINE)
        if not rows:
            raise RuntimeError(f"tests.bench.selection said nothing of use:\n{done.stdout}{done.stderr}"[-1000:])
        for nodes, *rates in rows:
            per_s, alone_per_s = (float(rate.replace(",", "")) for rate in rates)
            found.setdefault(int(nodes.replace(",", "")), []).append((per_s, alone_per_s))
    per_s_of = {nodes: median(one for one, _ in values) for nodes, values in found.items()}
    return Selected(per_s_of, {nodes: median(other for _, other in values) for nodes, values in found.items()})


def misses(found: Selected) -> list[str]:
    return [
        f"selection alone: {found.per_s.get(nodes, 0):,.0f} decisions/s with {nodes} nodes, not {bar:,}"
        for nodes, bar in BARS.items()
        if found.per_s.get(nodes, 0) < bar
    ]


def section(found: Selected) -> str:
    rows = ["## Selection alone", "", "What nginx asks, without nginx (`python -m tests.bench.selection`); who asks shares the cores.", ""]
    rows += ["| nodes | decisions/s | bar | by processor time, with a core of its own |", "| ---: | ---: | --- | ---: |"]
    rows += [
        f"| {nodes:,} | {per_s:,.0f} | {f'≥ {BARS[nodes]:,}' if nodes in BARS else ''} | {found.alone_per_s[nodes]:,.0f}/s |"
        for nodes, per_s in found.per_s.items()
    ]
    return "\n".join(rows)
