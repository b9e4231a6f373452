"""`python -m tests.bench`: measure, print, and write docs/performance.md. `--long` takes longer runs, for figures to quote.

Exits with 1 when a bar is missed.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.bench.measure import Figures, measure_all, table
from tests.bench.programs import all_running, more_files, needed
from tests.house.tree import ROOT

PAGE = ROOT / "docs" / "performance.md"


def machine() -> str:
    """Where this was measured, in words that name nobody."""
    nginx = (
        subprocess.run([needed("nginx", "nginx-light"), "-v"], capture_output=True, text=True, check=True).stderr.strip().rpartition("/")[2]
    )
    model = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    return f"{os.cpu_count()} cores ({model or platform.machine()}), Python {platform.python_version()}, nginx {nginx}"


def page(figures: Figures, command: str) -> str:
    return f"""# Performance

Measured with `{command}` on {machine()}. That command writes this page.

Everything runs on the same cores: the load generator (`wrk`, one thread), nginx as nodes that answer at once (one worker), and the proxy
under test. *direct* asks a node itself, *nginx* is plain nginx in front of the same nodes (`worker_processes 2`, upstream `keepalive 64`,
HTTP/1.1, no access log; for streams also `proxy_buffering off`, without which it holds lines back), *router* is the coordinator in one
process with its embedded edge. The three take turns, round by round; the figures are medians.

{table(figures)}

Real nodes take tens of milliseconds per token, so these loads are far above what one coordinator meets; they show what is left over.
Ratios hold on other machines; the absolute figures belong to this one.
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure the router against plain nginx.")
    parser.add_argument("--long", action="store_true", help="longer runs, for figures to quote")
    parser.add_argument("--seconds", type=int, help="length of one run")
    parser.add_argument("--rounds", type=int, help="runs of each load on each side")
    chosen = parser.parse_args()
    seconds = chosen.seconds or (8 if chosen.long else 3)
    rounds = chosen.rounds or (5 if chosen.long else 3)
    more_files()
    try:
        with tempfile.TemporaryDirectory() as place, all_running(Path(place)) as bench:
            figures = measure_all(bench, Path(place), seconds=seconds, rounds=rounds)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(figures))
    command = "make prove" if chosen.long else "make bench"
    PAGE.write_text(page(figures, command if not (chosen.seconds or chosen.rounds) else " ".join(["python -m tests.bench", *sys.argv[1:]])))
    for miss in figures.misses():
        print(f"MISSED: {miss}")
    return 1 if figures.misses() else 0


if __name__ == "__main__":
    sys.exit(main())
