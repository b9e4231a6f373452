"""Measure each module of the core by its own tests alone: `python -m tests.house.coverage_by_module [module ...]`.

Its own are `test_<module>.py` and `test_<module>_<part>.py`; a file fits the module with the longest name only. A module that is only
covered because others use it has no tests that say what it should do. Both its statements and its branches must reach the bar. Modules are
measured side by side, as many as there are cores.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.house.tree import COVERAGE_PERCENT_MIN, ROOT, modules, own_tests

IGNORES = "--ignores"
"""Print, for pytest, what it may leave to this."""


def measure(module: Path) -> str:
    """What is wrong with the coverage of `module`; "" when nothing is."""
    tests = own_tests(module)
    if not (ROOT / tests[0]).is_file():
        return f"{module}: {tests[0]} does not exist"
    with tempfile.TemporaryDirectory() as place:
        environ = {**os.environ, "COVERAGE_FILE": str(Path(place) / "data")}
        run = [sys.executable, "-m", "coverage", "run", "--branch", "--source=", f"--include={module}", "-m", "pytest", *map(str, tests)]
        done = subprocess.run(run, cwd=ROOT, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            return f"{module}: its tests fail\n{done.stdout[-4000:]}{done.stderr[-1000:]}"
        report = [sys.executable, "-m", "coverage", "json", "--quiet", f"--include={module}", "-o", "-"]
        done = subprocess.run(report, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return f"{module}: {tests[0]} does not run it"
    (found,) = json.loads(done.stdout)["files"].values()
    summary = found["summary"]
    parts = {
        "statements": (summary["covered_lines"], summary["num_statements"]),
        "branches": (summary["covered_branches"], summary["num_branches"]),
    }
    percents = {name: 100 * covered / total if total else 100.0 for name, (covered, total) in parts.items()}
    if min(percents.values()) >= COVERAGE_PERCENT_MIN:
        return ""
    figures = ", ".join(f"{percent:.1f} % of its {name}" for name, percent in percents.items())
    return f"{module}: its own tests reach {figures}; missing lines {found['missing_lines']}, branches {found['missing_branches']}"


def owned() -> list[str]:
    """The test files that this runs: `make test` need not run them twice."""
    return sorted({str(path) for module in modules("core") for path in own_tests(module) if (ROOT / path).is_file()})


def main() -> int:
    if sys.argv[1:] == [IGNORES]:
        print("\n".join(f"--ignore={path}" for path in owned()))
        return 0
    chosen = [Path(name) for name in sys.argv[1:]] or modules("core")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        faults = [fault for fault in pool.map(measure, chosen) if fault]
    for fault in faults:
        print(fault)
    print(f"{len(chosen) - len(faults)} of {len(chosen)} modules of the core reach {COVERAGE_PERCENT_MIN} % by their own tests")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
