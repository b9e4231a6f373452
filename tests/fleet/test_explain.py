"""`X-Explain: 1` tells an admin why that node, and nobody else."""

from tests.fleet.fleet import ScriptedNode, answer_well, chat, open_fleet, serving
from tests.fleet.rawhttp import Caller

WANTED = {"X-Explain": "1"}


async def test_an_admin_is_told_the_parts_of_the_choice() -> None:
    nodes = [ScriptedNode(answer_well), ScriptedNode(answer_well)]
    async with serving(*nodes) as ports, open_fleet(ports) as fleet:
        await fleet.wait_ready(2)
        for stream in (True, False):
            answer = await fleet.ask("POST", "/api/chat", chat(stream=stream), headers=WANTED)
            assert answer.status == 200
            chosen = answer.headers["x-ollama-node"]
            told = answer.headers["x-explain"]
            assert told.startswith("auto, forwarded after ")
            assert f"{chosen} (chosen): " in told
            assert "work" in told
        assert "x-explain" not in (await fleet.chat()).headers
        assert "x-explain" not in {name.lower() for node in nodes for caller in node.seen for name in caller.fields}


async def test_a_failed_answer_is_explained_too() -> None:
    async def fails(caller: Caller) -> None:
        await caller.answer(b'{"error":"out of memory"}', status=500)

    async with serving(ScriptedNode(fails)) as ports, open_fleet(ports) as fleet:
        await fleet.wait_ready(1)
        answer = await fleet.ask("POST", "/api/chat", chat(), headers=WANTED)
        assert answer.status == 500
        assert "was tried for this request" in answer.headers["x-explain"]


async def test_nobody_else_is_told() -> None:
    async with serving(ScriptedNode(answer_well)) as ports, open_fleet(ports) as fleet:
        await fleet.wait_ready(1)
        headers = {**WANTED, "X-Forwarded-For": "192.168.1.7"}
        answer = await fleet.ask("POST", "/api/chat", chat(), headers=headers)
        assert answer.status == 200
        assert "x-explain" not in answer.headers
