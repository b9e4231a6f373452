"""Requests that differ in runner options, with real sockets: each kind keeps its node, and a raised context is what the node reads."""

import json
from typing import Any

from agent.simulated.server import SimulatedOllama
from tests.fleet.fleet import Fleet, ScriptedNode, answer_well, chat, open_fleet, serving
from tests.fleet.rawhttp import wait_until

MODEL = "llama3.2:3b"
CONTEXTS = (2048, 8192)


def node_with(name: str) -> SimulatedOllama:
    """A load takes a tenth of a second, an answer a few milliseconds."""
    return SimulatedOllama(name=name, models=[MODEL], slots=1, load_s=0.1, decode_tokens_s=2000.0, prefill_tokens_s=50_000.0)


def question(context: int, **options: Any) -> dict[str, Any]:
    return chat(MODEL, options={"num_ctx": context, "num_predict": 2, **options})


async def metric(fleet: Fleet, name: str) -> float:
    """The sum of a counter over its labels."""
    text = (await fleet.ask("GET", "/metrics")).body.decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(f"ollama_router_{name}_total{{"))


async def test_two_clients_with_different_contexts_on_two_nodes_cost_two_loads_for_200_requests() -> None:
    nodes = [node_with("a"), node_with("b")]
    async with nodes[0].serve(), nodes[1].serve(), open_fleet({node.name: node.port for node in nodes}) as fleet:
        for number in range(200):
            answer = await fleet.ask("POST", "/api/chat", question(CONTEXTS[number % 2]))
            assert answer.whole, number
        assert sum(len(node.loads) for node in nodes) == 2
        assert await metric(fleet, "reloads") == 0
        assert await metric(fleet, "reloads_avoided") > 0
        summary = (await fleet.ask("GET", "/api/metrics/summary")).json()
        assert (summary["model_loads"], summary["model_reloads"]) == (2, 0)


async def test_only_the_value_of_a_raised_context_is_another_one() -> None:
    node = ScriptedNode(answer_well)  # its model is loaded with 4096
    async with serving(node), open_fleet({"one": node.port}, ROUTER_RAISE_CONTEXT="true") as fleet:
        await wait_until(lambda: fleet.agent("one").loaded, what="what is loaded")
        body = b'{ "model" : "m", "messages": [{"role":"user","content":"num_ctx"}], "options":{"num_ctx":  512 ,"seed":1}}'
        assert (await fleet.ask("POST", "/api/chat", body)).status == 200
        assert node.seen[-1].body == body.replace(b"512", b"4096")
        assert await metric(fleet, "reloads_avoided") == 1


async def test_bodies_pass_byte_for_byte_unless_the_operator_says_otherwise() -> None:
    node = ScriptedNode(answer_well)
    async with serving(node), open_fleet({"one": node.port}) as fleet:
        await wait_until(lambda: fleet.agent("one").loaded, what="what is loaded")
        body = json.dumps(chat(options={"num_ctx": 512})).encode()
        assert (await fleet.ask("POST", "/api/chat", body)).status == 200
        assert node.seen[-1].body == body
        assert await metric(fleet, "reloads") == 1
