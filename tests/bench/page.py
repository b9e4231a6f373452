"""docs/performance.md, put together from what the parts of the benchmark found, each at its own time.

Decides what a part is and how the page is formed. Knows no figure. Invariant: the page shows for each part the command that measured it,
and what fell short.
"""

import os
import platform
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec

import native
from tests.bench import gaps, idle, measure, scaling, selected
from tests.bench.children import needed
from tests.house.tree import ROOT

PAGE = ROOT / "docs" / "performance.md"
KEPT = ROOT / "build" / "bench"
"""What each part found last."""
SOAKED = ROOT / "build" / "soak" / "verdict.txt"
PARTS: dict[str, tuple[ModuleType, type[Any]]] = {
    "speed": (measure, measure.Speed),
    "selection": (selected, selected.Selected),
    "scaling": (scaling, scaling.Scaling),
    "gaps": (gaps, gaps.Gaps),
    "idle": (idle, idle.Idle),
}


class Found(msgspec.Struct):
    """One part's findings."""

    command: str
    machine: str
    result: msgspec.Raw


def machine() -> str:
    """Where this was measured, in words that name nobody."""
    said = subprocess.run([needed("nginx", "nginx-light"), "-v"], capture_output=True, text=True, check=True).stderr
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    cores, router = len(os.sched_getaffinity(0)), "not compiled" if native.found() is None else "compiled"
    python = f"Python {platform.python_version()}, the router {router}"
    return f"{cores} cores ({model or platform.machine()}), {python}, nginx {said.strip().rpartition('/')[2]}"


def keep(part: str, command: str, result: Any) -> None:
    """Remember what `part` found, for the page."""
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"{part}.json").write_bytes(msgspec.json.encode(Found(command, machine(), msgspec.Raw(msgspec.json.encode(result)))))


def _kept() -> dict[str, tuple[Found, Any]]:
    found = {}
    for part, (_, kind) in PARTS.items():
        path = KEPT / f"{part}.json"
        if path.is_file():
            one = msgspec.json.decode(path.read_bytes(), type=Found)
            found[part] = (one, msgspec.json.decode(one.result, type=kind))
    return found


def misses(part: str, result: Any) -> list[str]:
    """The bars of `part` that were not reached."""
    missed: list[str] = PARTS[part][0].misses(result)
    return missed


def section(part: str, result: Any) -> str:
    text: str = PARTS[part][0].section(result)
    return text


def page() -> str:
    """The whole page, of the parts that were measured."""
    kept = _kept()
    short = [miss for part, (_, result) in kept.items() for miss in misses(part, result)]
    missed = "".join(f"* {miss}\n" for miss in short) or "Nothing: every bar on this page is reached.\n"
    sections = "\n\n".join(
        f"{section(part, result)}\n\nMeasured with `{found.command}` on {found.machine}." for part, (found, result) in kept.items()
    )
    if SOAKED.is_file():
        told = "`make soak` (`MINUTES=30` by default; how it judges: [operators.md](operators.md#memory)), as it ended last:"
        sections += f"\n\n## Soak\n\n{told}\n\n```\n{SOAKED.read_text().rstrip()}\n```"
    return f"""# Performance

`make bench` measures all of this and writes the page; `.venv/bin/python -m tests.bench PART...` measures only `speed`, `selection`,
`scaling`, `gaps` or `idle`, and leaves the other sections as they were found last. Everything runs on the same cores: clients, nodes and
what is measured. Real nodes take tens of milliseconds per token, so the loads at full speed are far above what one coordinator meets; they
show what is left over. Ratios hold on other machines; the absolute figures belong to this one.

## What falls short

{missed}
{sections}
"""


def write() -> None:
    PAGE.write_text(page())
