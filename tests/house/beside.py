"""Run one command on the terminal and others beside it: `python -m tests.house.beside --log FILE [--beside COMMAND]... -- COMMAND...`.

The others run one after another, yield the processor to whatever else wants it, and write into the log, which is shown once the first
command is over, so that nothing is interleaved. Must never know what it runs. Invariants: the exit status is 0 only when every command's
was, and every command runs whatever became of those before it; when this ends, by itself or by a signal, all that it started has ended.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

YIELDS: Final = 19
"""Steps of niceness: what waits on the terminal's side gets the processor at once."""
GRACE_S: Final = 10.0
"""What a command that is told to end gets to do so."""
LOOK_S: Final = 0.1
"""Between two looks for a signal."""
SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Beside(threading.Thread):
    """The commands beside, each in a process group of its own. `stop` ends the one that runs and lets no other begin."""

    def __init__(self, commands: list[str], log: Path) -> None:
        super().__init__(daemon=True)
        self.failed: list[str] = []
        self._commands = commands
        self._log = log
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self) -> None:
        for command in self._commands:
            with self._log.open("a") as log:
                print(f"$ {command}", file=log, flush=True)
                began_s = time.monotonic()
                with self._lock:
                    if self._stopped:
                        return
                    self._process = process = subprocess.Popen(
                        ["nice", "-n", str(YIELDS), "sh", "-c", command],
                        stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0,
                    )  # fmt: skip
                status = process.wait()
                _end_group(process)
                with self._lock:
                    self._process = None
                if status:
                    self.failed.append(command)
                print(f"({time.monotonic() - began_s:.0f} s, exit status {status})\n", file=log)

    def stop(self) -> None:
        """Blocks until it has ended."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                _end_group(self._process)
        self.join()


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """End all that runs in the group of `process`."""
    with contextlib.suppress(ProcessLookupError):
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.killpg(process.pid, number)
            deadline_s = time.monotonic() + GRACE_S
            while time.monotonic() < deadline_s:
                process.poll()  # a leader that nobody waits for would stay
                os.killpg(process.pid, 0)
                time.sleep(0.01)


def run(command: list[str], beside: list[str], log: Path) -> int:
    """Returns the exit status: the first command's, or 1 when that was 0 and one beside failed; 128 and its number after a signal."""
    told: list[int] = []
    for each in SIGNALS:
        signal.signal(each, lambda number, _: told.append(number))
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    others = Beside(beside, log)
    others.start()
    try:
        process = subprocess.Popen(command)
        _wait(lambda: process.poll() is not None, told)
        if process.poll() is None:
            _interrupt(process, by_terminal=told[0] == signal.SIGINT)
        if not told and others.is_alive():
            print(f"Waiting for what runs beside that ({log}).", flush=True)
        _wait(lambda: not others.is_alive(), told)
    finally:
        others.stop()
    if told:
        return 128 + told[0]
    print(f"\nBeside that ({log}):\n\n{log.read_text(encoding='utf-8', errors='replace')}", end="")
    for failed in others.failed:
        print(f"FAILED: {failed}")
    sys.stdout.flush()
    return 128 - process.returncode if process.returncode < 0 else process.returncode or int(bool(others.failed))


def _wait(condition: Callable[[], bool], told: list[int]) -> None:
    """Until it is true, or a signal came."""
    while not told and not condition():
        time.sleep(LOOK_S)


def _interrupt(process: "subprocess.Popen[bytes]", *, by_terminal: bool) -> None:
    """End `process` as Ctrl-C does, so that it puts away what it started. A terminal has told it already; twice would cut that short."""
    if not by_terminal:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> int:
    """For the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.house.beside", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--log", type=Path, required=True, help="where the output of what runs beside goes")
    parser.add_argument("--beside", action="append", default=[], metavar="COMMAND", help="for the shell; may be given again")
    parser.add_argument("command", nargs="+", help="runs on the terminal")
    given = parser.parse_args()
    return run(given.command, given.beside, given.log)


if __name__ == "__main__":
    sys.exit(main())
