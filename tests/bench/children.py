"""Processes that a measurement starts: found, started, watched, and ended by their own ids.

Decides how a program is started and stopped, and reads what the system knows of it (CPU time, memory, descriptors). Knows nothing of what
is measured. Invariant: what a `with` block started has ended when it is left, killed after `STOP_WITHIN_S` when it does not obey.
"""

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.house.tree import ROOT

READY_WITHIN_S = 60.0
STOP_WITHIN_S = 15.0
FILES = 20_000
"""Descriptors that a program of a measurement may open, when the system lets it."""
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def needed(program: str, package: str) -> str:
    """Where `program` is.

    Raises:
        RuntimeError: it is nowhere; one line that says what to install.
    """
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise RuntimeError(f"{program} is needed for this: install it with 'apt-get install {package}'")
    return found


def more_files(wanted: int = FILES) -> int:
    """Let this process and what it starts open as many files as thousands of streams need; how many it may now."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed


def end_in_order() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that what it started is stopped too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Child:
    """One program, perhaps with workers of its own; its output lies in a file."""

    def __init__(self, name: str, command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> None:
        self.name = name
        self.command = list(command)
        self.log = log
        self._environ = {**os.environ, **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command, env=self._environ, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )  # fmt: skip

    def lives(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    @staticmethod
    def signal_pid(pid: int, number: signal.Signals) -> None:
        """For one of `pids`; nothing when it has ended."""
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """End it, and wait for that; its exit status."""
        assert self._process is not None
        self.send(how)
        try:
            return self._process.wait(STOP_WITHIN_S)
        except subprocess.TimeoutExpired:
            for pid in self.pids():
                self.signal_pid(pid, signal.SIGKILL)
            self._process.kill()
            return self._process.wait()

    def pids(self) -> list[int]:
        """Of the program and all that descends from it."""
        return [self.pid, *descendants(self.pid)] if self.lives() else []

    def cpu_s(self) -> float:
        """Processor time that it and its workers took so far."""
        return sum(self.cpu_parts_s())

    def cpu_parts_s(self) -> tuple[float, float]:
        """`cpu_s`, its own and that in the kernel."""
        parts = [cpu_s(pid) for pid in self.pids()]
        return sum(own for own, _ in parts), sum(kernel for _, kernel in parts)

    def memory_bytes(self) -> int:
        """Resident memory of it and its workers."""
        return sum(_field(f"/proc/{pid}/statm", 1) * _PAGE for pid in self.pids())

    def descriptors(self) -> int:
        return sum(_count(f"/proc/{pid}/fd") for pid in self.pids())

    def said(self, last: int = 2000) -> str:
        """The end of its output."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-last:] if self.log.exists() else ""


def descendants(pid: int) -> list[int]:
    """Processes that it started, and theirs."""
    try:
        tasks = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]  # whichever thread started them
        children = [int(word) for text in tasks for word in text.split()]
    except OSError:
        return []
    return [found for child in children for found in (child, *descendants(child))]


def _field(path: str, number: int) -> int:
    try:
        return int(Path(path).read_text().split()[number])
    except OSError:
        return 0


def cpu_s(pid: int) -> tuple[float, float]:
    """Processor time that one process took so far, its own and that in the kernel."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0, 0.0
    return int(after_name[11]) / _TICKS, int(after_name[12]) / _TICKS


def _count(path: str) -> int:
    try:
        return len(os.listdir(path))
    except OSError:
        return 0


@contextmanager
def running(child: Child, *, port: int | None = None, path: str = "/api/version") -> Iterator[Child]:
    """`child`, started, and answering `path` on `port`.

    Raises:
        RuntimeError: it does not; with the end of what it said.
    """
    child.start()
    try:
        if port is not None:
            wait_for(port, path, child)
        yield child
    finally:
        child.stop()


def wait_for(port: int, path: str, child: Child | None = None, *, within_s: float = READY_WITHIN_S) -> None:
    """Until `path` on `port` is answered with 200.

    Raises:
        RuntimeError: it was not in time, or `child` has ended.
    """
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline and (child is None or child.lives()):
        try:
            if get(port, path)[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"nothing useful answers {path} on port {port}\n{child.said() if child is not None else ''}")


def get(port: int, path: str, *, within_s: float = 5.0) -> tuple[int, bytes]:
    """(status, body) of a GET whose answer ends with its connection, or has a length."""
    with socket.create_connection(("127.0.0.1", port), timeout=within_s) as line:
        line.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        got = b""
        while not _is_whole(got) and (data := line.recv(1 << 16)):
            got += data
    head, _, body = got.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return (int(words[1]) if len(words) > 1 else 0), body


def _is_whole(got: bytes) -> bool:
    head, found, body = got.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    return bool(found) and length is not None and len(body) >= int(length[1])


def metrics(port: int) -> dict[str, float]:
    """The coordinator's metrics without labels, and the sums of those with."""
    status, body = get(port, "/metrics", within_s=30.0)
    if status != 200:
        raise RuntimeError(f"/metrics answered {status}")
    found: dict[str, float] = {}
    for line in body.decode().splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            bare = name.partition("{")[0]
            found[bare] = found.get(bare, 0.0) + float(value)
    return found
