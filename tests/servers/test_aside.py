"""Work in a process of its own: its answer in pieces, its failures, its end when nobody wants the rest, and how many there may be."""

import sys
from pathlib import Path

import pytest
import trio

from core.errors import RemoteError
from servers import aside as module
from servers.aside import answered, aside

ECHO = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
ENDLESS = "import sys, os\nprint(os.getpid(), flush=True)\nwhile True: sys.stdout.buffer.write(b'x' * 65536)"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module called `answering`, to be written."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "answering.py"


def write(file: Path, text: str) -> None:
    file.write_text(text)


async def test_what_it_prints_is_the_answer_however_long(program: Path) -> None:
    write(program, ECHO)
    question = b"0123456789" * 300_000
    assert await answered("answering", question) == question


@pytest.mark.parametrize(("status", "why"), [(3, "ended with status 3"), (module.NOT_NOW, "the database does not answer")])
async def test_what_did_not_come_to_its_end_is_an_error(program: Path, status: int, why: str) -> None:
    write(program, f"print('half', flush=True); raise SystemExit({status})")
    with pytest.raises(RemoteError, match=why) as found:
        await answered("answering", b"?")
    assert found.value.status == 503


async def test_a_process_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RemoteError, match="no process can be started"):
        await answered("answering", b"?")


async def test_it_is_ended_when_nobody_wants_the_rest(program: Path) -> None:
    write(program, ENDLESS)
    pieces = aside("answering", b"")
    pid = int((await anext(pieces)).split(b"\n")[0])
    await pieces.aclose()
    assert not await trio.Path(f"/proc/{pid}").exists()


async def test_when_too_many_run_another_is_refused(program: Path) -> None:
    write(program, ENDLESS)
    running = [aside("answering", b"") for _ in range(module.AT_ONCE)]
    for pieces in running:
        await anext(pieces)
    with pytest.raises(RemoteError, match="already"):
        await answered("answering", b"")
    for pieces in running:
        await pieces.aclose()
    write(program, ECHO)
    assert await answered("answering", b"!") == b"!"


async def test_a_process_yields_to_what_serves(program: Path) -> None:
    write(program, "from servers.aside import asked\nimport os\nasked()\nprint(os.nice(0), end='')")
    assert int(await answered("answering", b"")) > 0
