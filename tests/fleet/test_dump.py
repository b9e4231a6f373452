"""A dump of a coordinator under load is played again, and the same comes of it."""

from pathlib import Path

import msgspec
import pytest
import trio
from click.testing import CliRunner

from core import dump
from core.invariants import check
from core.simulation import __main__ as simulation
from core.simulation.playback import play
from servers import tape
from servers.cli import main
from servers.tokens import ADMIN_TOKEN_FILE
from tests.fleet.fleet import ScriptedNode, answer_well, many, open_fleet, serving
from tests.fleet.rawhttp import Caller

SECRET = "the prompt that nobody may see"
REQUESTS = 200
"""Each of which makes two steps or more."""
STEPS_PER_LENGTH = 150


class Moody:
    """Every third answer is an error that quotes the prompt."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, caller: Caller) -> None:
        self.asked += 1
        if self.asked % 3:
            await answer_well(caller)
        else:
            await caller.answer(b'{"error":"error parsing tool call: raw=\'%b\', out of memory"}' % SECRET.encode(), status=500)


async def test_a_dump_under_load_replays_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "STEPS_PER_LENGTH", STEPS_PER_LENGTH)
    dumps: list[bytes] = []
    async with serving(ScriptedNode(Moody()), ScriptedNode(answer_well)) as ports, open_fleet(ports) as fleet:
        await fleet.wait_ready(2)

        async def job(number: int) -> None:
            await fleet.chat(content=SECRET, stream=number % 2 == 0)
            if number in (20, 120):
                answer = await fleet.ask("GET", "/api/admin/dump")
                assert answer.status == 200
                dumps.append(answer.body)

        await many(REQUESTS, 16, job)
        await fleet.chat(content=SECRET)
        file = tmp_path / "router.dump"
        token = (fleet.data_dir / ADMIN_TOKEN_FILE).read_text().strip()
        command = ["dump", "-o", str(file), "--url", fleet.url, "--token", token]
        result = await trio.to_thread.run_sync(lambda: CliRunner().invoke(main, command))
        assert result.exit_code == 0, result.output
        assert file.stat().st_mode & 0o777 == 0o600
        assert token.encode() not in file.read_bytes()
        dumps.append(file.read_bytes())
    loaded = [dump.load(data) for data in dumps]
    for data, one in zip(dumps, loaded, strict=True):
        played = play(one, invariants=check)
        assert (played.failure, played.difference) == ("", "")
        assert played.same
        assert SECRET.encode() not in data
    *under_load, last = (one.steps[-1][0] for one in loaded)
    assert max(under_load) < last
    assert 0 < len(loaded[2].steps) <= 2 * STEPS_PER_LENGTH < REQUESTS * 2  # what went before them is forgotten
    assert simulation.main(["--replay", str(file)]) == 0


async def test_without_the_admin_token_there_is_no_dump() -> None:
    async with open_fleet([], ROUTER_AUTH="required") as fleet:
        assert (await fleet.ask("GET", "/api/admin/dump")).status == 401


def test_another_form_and_a_damaged_file_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "router.dump"
    for data, said in (
        (b"ollama-router dump 99\nrest", "form 99"),
        (dump.FIRST_LINE + b"\0\0\0\x09abc", "damaged"),
        (dump.FIRST_LINE + msgspec.msgpack.encode(7), "damaged"),
        (dump.FIRST_LINE, "damaged"),
    ):
        file.write_bytes(data)
        assert simulation.main(["--replay", str(file)]) == 2
        told = capsys.readouterr().err
        assert said in told
        assert told.count("\n") == 1
