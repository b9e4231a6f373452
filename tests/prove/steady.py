"""A coordinator in a process of its own, with a node that answers small chats at once, and a steady flow of them through it."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.prove.test_store import Coordinator

READY_WITHIN_S = 60.0


@dataclass
class Flow:
    """`tests.prove.flow` at work."""

    process: subprocess.Popen[str]
    out: IO[str]
    """A file, for it must never wait for a reader."""

    def said(self) -> tuple[dict[str, float], list[str]]:
        """Its figures once it has ended, and the lines before them."""
        status = self.process.wait(180)
        with self.out as out:
            out.seek(0)
            lines = out.read().splitlines()
        assert status == 0, lines[-5:]
        told: dict[str, float] = json.loads(lines[-1])
        return told, lines[:-1]

    def figures(self) -> dict[str, float]:
        return self.said()[0]


def flow(coordinator: Coordinator, *options: str, rate: float) -> Flow:
    """Begin one."""
    command = [sys.executable, "-m", "tests.prove.flow", str(coordinator.port), "--rate", str(rate), *options]
    out = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by who reads it
    return Flow(subprocess.Popen(command, stdout=out, text=True), out)


@contextmanager
def running(place: Path, database: str, node_port: int, **environ: str) -> Iterator[Coordinator]:
    """A coordinator that answers; stopped in order, unless it has ended already."""
    coordinator = Coordinator(place, database, OLLAMA_BACKENDS=f"n=http://127.0.0.1:{node_port};slots=64", **environ)
    coordinator.start()
    try:
        deadline = time.monotonic() + READY_WITHIN_S
        while flow(coordinator, "--seconds", "0.1", rate=20).figures()["answered"] == 0:
            assert coordinator.process.poll() is None, coordinator.log
            assert time.monotonic() < deadline, coordinator.log
        yield coordinator
    finally:
        coordinator.end(signal.SIGTERM)
