"""Work that takes the interpreter for long, in a process of its own: it gets a question, and what it prints is the answer.

Decides how such a process is started, heard, and ended. Must never know what it computes. Invariants: its answer passes through here a
piece at a time, so memory does not grow with it; it is ended when nobody wants the rest; it yields to what serves (`servers.yielding`);
at most `AT_ONCE` run side by side. A thread would not do: it takes the interpreter from the loop at each of the loop's system calls.
"""

import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import trio

from core.errors import RemoteError
from servers.yielding import yield_to_serving

AT_ONCE: Final = 4
PIECE_BYTES: Final = 1 << 16
NOT_NOW: Final = 75
"""A process's status that says: what it needs does not answer (EX_TEMPFAIL)."""
_ROOT: Final = str(Path(__file__).resolve().parent.parent)

_running = 0


def command(module: str) -> tuple[list[str], dict[str, str]]:
    """The command and the environment that run one of this program's modules, wherever the working directory is."""
    paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
    return [sys.executable, "-P", "-m", module], {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


async def aside(module: str, question: bytes) -> AsyncGenerator[bytes, None]:
    """What `python -m module` answers to `question` on its standard input, in pieces. Close it (`aclose`) when the rest is not wanted.

    Raises:
        RemoteError: it cannot run now, or it did not come to its end.
    """
    global _running
    if _running >= AT_ONCE:
        raise RemoteError(f"{AT_ONCE} such questions are being answered already: ask again when one is over", status=503)
    _running += 1
    process: trio.Process | None = None
    try:
        argv, environ = command(module)
        try:
            process = await trio.lowlevel.open_process(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
        except OSError as error:
            raise RemoteError(f"no process can be started for this: {error.strerror}", status=503) from None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            await process.stdin.send_all(question)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # its status says more
        await process.stdin.aclose()
        while data := await process.stdout.receive_some(PIECE_BYTES):
            yield bytes(data)
        status = await process.wait()
        if status != 0:
            why = "the database does not answer" if status == NOT_NOW else f"the process that answers this ended with status {status}"
            raise RemoteError(why, status=503)
    finally:
        _running -= 1
        if process is not None:
            process.kill()
            with trio.CancelScope(shield=True):
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        await stream.aclose()
                await process.wait()


async def answered(module: str, question: bytes) -> bytes:
    """The whole answer. Raises RemoteError."""
    pieces = [piece async for piece in aside(module, question)]
    return b"".join(pieces)


def asked() -> bytes:
    """In such a process: its question. From here on it yields to what serves."""
    yield_to_serving()
    return sys.stdin.buffer.read()
