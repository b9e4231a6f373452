"""`python -m tests.bench [PART...]`: measure, print, and write docs/performance.md. `--long` takes longer runs, for figures to quote.

Parts: `speed`, `selection`, `scaling`, `gaps`, `idle`; all of them when none is named. Exits with 1 when a bar is missed.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from tests.bench import gaps, idle, measure, page, scaling, selected
from tests.bench.children import end_in_order, more_files

SECONDS, ROUNDS = 3, 5
LONG_SECONDS, LONG_ROUNDS = 6, 5


def measured(part: str, place: Path, *, seconds: int, rounds: int, say: Callable[[str], None]) -> Any:
    """What `part` finds, in an empty directory."""
    if part == "speed":
        return measure.run(place, seconds=seconds, rounds=rounds, say=say)
    if part == "selection":
        return selected.run(place, rounds=rounds, say=say)
    if part == "scaling":
        return scaling.run(place, seconds=max(3, seconds // 2), rounds=max(1, rounds // 2), say=say)
    if part == "gaps":
        return gaps.run(place, hold_s=2.0 * seconds, rounds=max(1, rounds // 2), say=say)
    return idle.run(place, say=say)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure the router against plain nginx and its own bars.")
    parser.add_argument("parts", nargs="*", metavar="PART", choices=[[], *page.PARTS], help=f"of {', '.join(page.PARTS)}; by default all")
    parser.add_argument("--long", action="store_true", help="longer runs, for figures to quote")
    parser.add_argument("--seconds", type=int, help="length of one run")
    parser.add_argument("--rounds", type=int, help="runs of each load on each side")
    chosen = parser.parse_args()
    seconds = chosen.seconds or (LONG_SECONDS if chosen.long else SECONDS)
    rounds = chosen.rounds or (LONG_ROUNDS if chosen.long else ROUNDS)
    command = " ".join([".venv/bin/python -m tests.bench", *sys.argv[1:]])
    console = Console(stderr=True)
    more_files()
    end_in_order()
    missed: list[str] = []
    for part in chosen.parts or [name for name in page.PARTS if name != "selection" or selected.exists()]:
        began = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as place, console.status(part) as status:
                Path(place).chmod(0o755)  # nginx's workers may be another user's
                result = measured(part, Path(place), seconds=seconds, rounds=rounds, say=status.update)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        page.keep(part, command, result)
        page.write()
        console.print(f"{part}: {time.monotonic() - began:.0f} s")
        Console().print(Markdown(page.section(part, result)))
        missed += page.misses(part, result)
    for miss in missed:
        print(f"MISSED: {miss}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
