"""Commands side by side: the output in order, every failure told, and nothing left over after a signal."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.house.tree import ROOT

LIMIT_S = 30.0


def argv(log: Path, beside: list[str], command: str) -> list[str]:
    given = [part for each in beside for part in ("--beside", each)]
    return [sys.executable, "-m", "tests.house.beside", "--log", str(log), *given, "--", "sh", "-c", command]


def run(tmp_path: Path, beside: list[str], command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(argv(tmp_path / "new" / "log", beside, command), cwd=ROOT, capture_output=True, text=True, check=False)


def until(condition: Callable[[], object]) -> None:
    pause = threading.Event()
    for _ in range(int(LIMIT_S / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it did not come to that")


def test_what_ran_beside_is_shown_afterwards_in_its_order(tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    beside = ["echo one; nice; seq 3 >&2", f"echo two; while test -e {tmp_path}/gate; do sleep 0.02; done"]
    done = run(tmp_path, beside, f"until grep -q '^two' {tmp_path}/new/log; do sleep 0.02; done; echo main; rm {tmp_path}/gate")
    assert (done.returncode, done.stderr) == (0, "")
    shown = done.stdout.split("\n")
    assert shown[0] == "main"
    assert [line for line in shown if line in {"main", "one", "19", "1", "2", "3", "two"}] == ["main", "one", "19", "1", "2", "3", "two"]
    assert (tmp_path / "new" / "log").read_text() in done.stdout


@pytest.mark.parametrize(
    ("beside", "command", "status"),
    [
        (["true"], "exit 3", 3),
        (["exit 4", "true"], "true", 1),
        (["true", "exit 4"], "true", 1),
        (["exit 4"], "exit 3", 3),
        (["kill -9 $$"], "true", 1),
        (["true"], "kill -9 $$", 137),
        ([], "true", 0),
    ],
)
def test_any_failure_is_one(tmp_path: Path, beside: list[str], command: str, status: int) -> None:
    done = run(tmp_path, [f"echo begun; {each}" for each in beside], command)
    assert done.returncode == status
    assert done.stdout.splitlines().count("begun") == len(beside)
    assert [line for line in done.stdout.splitlines() if line.startswith("FAILED")] == [
        f"FAILED: echo begun; {each}" for each in beside if each != "true"
    ]


@pytest.mark.parametrize(("number", "whole_group"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGHUP, True)])
def test_a_signal_ends_everything(tmp_path: Path, number: signal.Signals, whole_group: bool) -> None:
    """As a terminal sends it, to all of a group, or as somebody sends it who knows one process only."""
    held = "import os, sys, time; open(sys.argv[1], 'w').write(f'{os.getpid()} '); time.sleep(600)"
    names = [tmp_path / "beside", tmp_path / "main"]
    beside, command = (f'{sys.executable} -c "{held}" {name}' for name in names)
    process = subprocess.Popen(
        argv(tmp_path / "log", [f"{beside}; touch {tmp_path}/next", f"touch {tmp_path}/next"], f"exec {command}"),
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0,
    )  # fmt: skip
    until(lambda: all(name.exists() and name.read_text().endswith(" ") for name in names))
    pids = [int(name.read_text()) for name in names]
    (os.killpg if whole_group else os.kill)(process.pid, number)
    assert process.wait(LIMIT_S) == 128 + number
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))  # whoever reaps orphans does so soon
    assert not (tmp_path / "next").exists()
