"""Measure each module of the core by its own tests alone: `python -m tests.house.coverage_by_module [module ...]`.

Its own are `test_<module>.py` and `test_<module>_<part>.py`; a file fits the module with the longest name only. A module that is only
covered because others use it has no tests that say what it should do. Both its statements and its branches must reach the bar. Modules are
measured side by side, as many as there are cores, each in a process that forks off once what all of them need is loaded.
Invariant: nothing of the core is loaded before that, for what runs while a module is loaded counts too.
"""

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import coverage
import pytest

from tests.house.tree import COVERAGE_PERCENT_MIN, ROOT, modules, own_tests

IGNORES = "--ignores"
"""Print, for pytest, what it may leave to this."""
LOADED = ("hypothesis.internal.conjecture.engine", "hypothesis.strategies", "trio.testing")
"""Slow to load, and needed by nearly all."""


def measure(module: Path) -> str:
    """What is wrong with the coverage of `module`; "" when nothing is. For a process of its own."""
    tests = own_tests(module)
    if not (ROOT / tests[0]).is_file():
        return f"{module}: {tests[0]} does not exist"
    with tempfile.TemporaryFile() as said:
        for number in (1, 2):
            os.dup2(said.fileno(), number)
        measured = coverage.Coverage(data_file=None, branch=True, include=[str(module)])
        measured.set_option("run:source", [])  # it would come before `include`, and trace all there is
        measured.start()
        status = pytest.main(["-W", "ignore::pytest.PytestAssertRewriteWarning", *map(str, tests)])
        measured.stop()
        sys.stdout.flush()
        if status != pytest.ExitCode.OK:
            said.seek(0)
            return f"{module}: its tests fail\n{said.read().decode(errors='replace')[-5000:]}"
        return _judge(module, measured)


def _judge(module: Path, measured: coverage.Coverage) -> str:
    with tempfile.NamedTemporaryFile() as place:
        try:
            measured.json_report(include=[str(module)], outfile=place.name)
        except coverage.exceptions.NoDataError:
            return f"{module}: {own_tests(module)[0]} does not run it"
        (found,) = json.loads(place.read())["files"].values()
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


def in_processes(job: Callable[[Path], str], items: list[Path]) -> list[str]:
    """`job` of each item in a process that forks off, as many at once as there are cores; the results in the items' order."""
    with tempfile.TemporaryDirectory() as place:
        results = [Path(place, str(number)) for number in range(len(items))]
        running: dict[int, Path] = {}
        failed: set[Path] = set()

        def wait() -> None:
            pid, status = os.wait()
            if status:
                failed.add(running[pid])
            del running[pid]

        for item, result in zip(items, results, strict=True):
            if len(running) == (os.cpu_count() or 1):
                wait()
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    result.write_text(job(item), encoding="utf-8")
                    status = 0
                finally:
                    os._exit(status)
            running[pid] = result
        while running:
            wait()
        return [
            f"{item}: it could not be measured" if result in failed else result.read_text(encoding="utf-8")
            for item, result in zip(items, results, strict=True)
        ]


def owned() -> list[str]:
    """The test files that this runs: `make test` need not run them twice."""
    return sorted({str(path) for module in modules("core") for path in own_tests(module) if (ROOT / path).is_file()})


def main() -> int:
    if sys.argv[1:] == [IGNORES]:
        print("\n".join(f"--ignore={path}" for path in owned()))
        return 0
    chosen = [Path(name) for name in sys.argv[1:]] or modules("core")
    for name in LOADED:
        importlib.import_module(name)
    faults = [fault for fault in in_processes(measure, chosen) if fault]
    for fault in faults:
        print(fault)
    print(f"{len(chosen) - len(faults)} of {len(chosen)} modules of the core reach {COVERAGE_PERCENT_MIN} % by their own tests")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
