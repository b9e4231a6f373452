"""Models on the move, over real sockets: pulls on many nodes as one, failures, deaths, clients that leave; copies, deletions."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import ollama
import pytest
import trio
from trio.testing import MockClock

from agent.simulated.models import SimulatedModel, guessed_model
from agent.simulated.registry import Failure, Registry
from agent.simulated.server import SimulatedOllama
from tests.fleet.fleet import Fleet, ScriptedNode, open_fleet, serving
from tests.fleet.rawhttp import Caller, Handler, ask, wait_until

SMALL = "llama3.2:3b"
NEW = SimulatedModel(name="fresh:1b", size_bytes=40_000_000, digest="f" * 64)
NODES = ("alpha", "beta", "gamma")


@asynccontextmanager
async def three(*, bytes_s: float = 400e6, agents: bool = False) -> AsyncIterator[tuple[Fleet, dict[str, SimulatedOllama]]]:
    """Three nodes, each with a registry of its own, so that one may fail alone; with agents in front of them if wished."""
    nodes = {
        name: SimulatedOllama(name=name, models=[SMALL], registry=Registry([NEW, SMALL], bytes_s=bytes_s), load_s=0.01) for name in NODES
    }
    async with trio.open_nursery() as nursery:
        for node in nodes.values():
            await nursery.start(node.run)
        ports = {} if agents else {name: node.port for name, node in nodes.items()}
        async with open_fleet(ports) as fleet:
            if agents:
                for name, node in nodes.items():
                    await fleet.start_agent(node.port, name)
                await fleet.wait_ready(len(nodes))
            yield fleet, nodes
        nursery.cancel_scope.cancel()


def names(node: SimulatedOllama) -> list[str]:
    return sorted(model.name for model in node.models.values())


async def tasks(fleet: Fleet) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (await fleet.ask("GET", "/api/tasks")).json()
    return found


@pytest.mark.parametrize("agents", [False, True])
async def test_a_pull_reaches_every_node_and_is_told_as_one(agents: bool) -> None:
    async with three(bytes_s=60e6, agents=agents) as (fleet, nodes):
        answer = await fleet.ask("POST", "/api/pull", {"model": "fresh:1b"})
        assert (answer.status, answer.headers["content-type"], answer.whole) == (200, "application/x-ndjson", True)
        lines = answer.lines()
        assert [lines[0], lines[-1]] == [{"status": "pulling manifest"}, {"status": "success"}]
        assert [line["status"] for line in lines[-3:]] == ["verifying sha256 digest", "writing manifest", "success"]
        shown = [line for line in lines if "digest" in line]
        totals = {line["digest"]: line["total"] for line in shown}
        direct = (await fleet.ask("GET", "/api/tags")).json()["models"]
        size = next(row["size"] for row in direct if row["name"] == "fresh:1b")
        assert max(totals.values()) <= sum(totals.values()) <= size  # of one node, not of three
        assert shown
        for digest in totals:
            done = [line.get("completed", 0) for line in shown if line["digest"] == digest]
            assert done == sorted(done)
        assert all(names(node) == ["fresh:1b", SMALL] for node in nodes.values())
        chat = await fleet.chat("fresh:1b", stream=False)  # the router knows it already
        assert chat.status == 200
        made = await tasks(fleet)
        assert sorted(task["agent_name"] for task in made if task["status"] == "completed") == sorted(
            agent.name for agent in fleet.agents()
        )


async def test_a_node_that_fails_is_named_and_the_others_have_the_model() -> None:
    async with three() as (fleet, nodes):
        nodes["beta"].transfers.registry.fail(Failure(kind="manifest", text="403: go away"))
        lines = (await fleet.ask("POST", "/api/pull", {"model": "fresh:1b"})).lines()
        assert lines[-1] == {"error": "beta: pull model manifest: 403: go away"}
        assert not any(line.get("status") == "success" for line in lines)
        assert [name for name, node in nodes.items() if "fresh:1b" in names(node)] == ["alpha", "gamma"]
        whole = await fleet.ask("POST", "/api/pull", {"model": "fresh:1b", "stream": False})
        assert (whole.status, whole.json()["error"]) == (500, "beta: pull model manifest: 403: go away")
        nodes["beta"].transfers.registry.recover()
        again = await fleet.ask("POST", "/api/pull", {"model": "fresh:1b", "stream": False})
        assert (again.status, again.headers["content-type"], again.body) == (200, "application/json", b'{"status":"success"}')


async def test_an_unknown_model_ends_with_ollamas_words() -> None:
    async with three() as (fleet, _):
        lines = (await fleet.ask("POST", "/api/pull", {"model": "nosuch"})).lines()
        assert lines[0] == {"status": "pulling manifest"}
        assert lines[-1]["error"].count("pull model manifest: file does not exist") == 3
        one = await fleet.ask("POST", "/api/pull", {"model": "nosuch"}, headers={"X-Ollama-Node": "beta"})
        assert one.lines()[-1] == {"error": "beta: pull model manifest: file does not exist"}


async def test_a_node_that_dies_in_mid_pull_goes_on_where_it_was_when_it_is_back() -> None:
    async with three(bytes_s=20e6) as (fleet, nodes), fleet.talk("/api/pull", {"model": "fresh:1b"}) as talk:
        await talk.wait_for(b'"completed"')
        beta = nodes["beta"]
        port = beta.port
        await beta.stop()
        async with trio.open_nursery() as nursery:
            await trio.sleep(0.3)
            await nursery.start(beta.run, "127.0.0.1", port)
            lines = (await talk.rest()).lines()
            assert lines[-1] == {"status": "success"}
            assert all("fresh:1b" in names(node) for node in nodes.values())
            (task,) = [task for task in await tasks(fleet) if task["agent_name"] == "beta"]
            assert (task["status"], task["attempts"] >= 2) == ("completed", True)
            nursery.cancel_scope.cancel()


async def test_an_agent_that_is_killed_in_mid_pull_goes_on_when_it_is_back() -> None:
    node = SimulatedOllama(name="alpha", models=[SMALL], registry=Registry([NEW], bytes_s=15e6))
    async with node.serve(), open_fleet() as fleet:
        agent = await fleet.start_agent(node.port, "alpha")
        await fleet.wait_ready(1)
        (found,) = fleet.agents()
        made = await fleet.ask("POST", f"/api/agents/{found.id}/models/pull", {"model_name": "fresh:1b"})

        async def task() -> dict[str, Any]:
            shown: dict[str, Any] = (await fleet.ask("GET", f"/api/tasks/{made.json()['task_id']}")).json()
            return shown

        with trio.fail_after(20):
            while (await task())["completed_bytes"] < 1_000_000:  # noqa: ASYNC110
                await trio.sleep(0.05)
        agent.kill()
        await wait_until(lambda: not node.transfers._running, what="the download stopped")
        await fleet.start_agent(node.port, "alpha")
        with trio.fail_after(20):
            while (await task())["status"] != "completed":  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert names(node) == ["fresh:1b", SMALL]


async def test_ollamas_own_python_client_sees_one_ollama() -> None:
    async with three(bytes_s=60e6) as (fleet, nodes):

        def use() -> list[Any]:
            client = ollama.Client(host=fleet.url, trust_env=False)
            seen = [progress.status for progress in client.pull("fresh:1b", stream=True)]
            assert client.copy("fresh:1b", "mine").status == "success"
            assert client.delete("mine").status == "success"
            with pytest.raises(ollama.ResponseError, match="model 'mine' not found"):
                client.delete("mine")
            with pytest.raises(ollama.ResponseError, match="pull model manifest: file does not exist"):
                client.pull("nosuch")
            with pytest.raises(ollama.ResponseError, match="not created through the router"):
                client.create("mine", from_=SMALL)
            return seen

        seen = await trio.to_thread.run_sync(use)
        assert (seen[0], seen[-1]) == ("pulling manifest", "success")
        assert all(names(node) == ["fresh:1b", SMALL] for node in nodes.values())


@pytest.mark.parametrize("agents", [False, True])
async def test_a_client_that_leaves_stops_all_three(agents: bool) -> None:
    async with three(bytes_s=2e6, agents=agents) as (fleet, nodes):
        async with fleet.talk("/api/pull", {"model": "fresh:1b"}) as talk:
            await talk.wait_for(b'"completed"')
        await wait_until(lambda: not any(node.transfers._running for node in nodes.values()), what="no download left")
        assert {(task["status"], task["error"]) for task in await tasks(fleet)} == {("cancelled", "the client that asked for it left")}
        assert all(names(node) == [SMALL] for node in nodes.values())


async def test_a_task_can_be_cancelled_and_what_came_is_kept() -> None:
    async with three(bytes_s=10e6) as (fleet, nodes):
        alpha = fleet.agent("alpha").id
        made = await fleet.ask("POST", f"/api/agents/{alpha}/models/pull", {"model_name": "fresh:1b"})
        assert made.status == 202
        task_id = made.json()["task_id"]

        async def completed() -> int:
            shown: int = (await fleet.ask("GET", f"/api/tasks/{task_id}")).json()["completed_bytes"]
            return shown

        with trio.fail_after(10):
            while await completed() < 5_000_000:  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert (await fleet.ask("DELETE", f"/api/tasks/{task_id}")).json()["status"] == "cancelled"
        await wait_until(lambda: not nodes["alpha"].transfers._running, what="the download stopped")
        again = await fleet.ask("POST", f"/api/agents/{alpha}/models/pull", {"model_name": "fresh:1b"})
        with trio.fail_after(10):
            while True:
                task = (await fleet.ask("GET", f"/api/tasks/{again.json()['task_id']}")).json()
                if task["layers"]:
                    break
                await trio.sleep(0.02)
        assert task["completed_bytes"] >= 4_000_000  # it did not begin anew


@pytest.mark.parametrize("agents", [False, True])
async def test_copy_and_delete_are_done_everywhere(agents: bool) -> None:
    async with three(agents=agents) as (fleet, nodes):
        copied = await fleet.ask("POST", "/api/copy", {"source": SMALL, "destination": "mine"})
        assert (copied.status, copied.body) == (200, b"")
        assert all(names(node) == [SMALL, "mine:latest"] for node in nodes.values())
        assert (await fleet.chat("mine", stream=False)).status == 200
        deleted = await fleet.ask("DELETE", "/api/delete", {"model": "", "name": "mine"})
        assert (deleted.status, deleted.body) == (200, b"")
        assert all(names(node) == [SMALL] for node in nodes.values())
        assert not any(row["name"] == "mine:latest" for row in (await fleet.ask("GET", "/api/ps")).json()["models"])
        assert (await fleet.chat("mine", stream=False)).status == 404
        again = await fleet.ask("DELETE", "/api/delete", {"name": "mine"})
        assert (again.status, again.json()) == (404, {"error": "model 'mine' not found"})


async def test_a_name_with_differing_files_is_deleted_wherever_it_is() -> None:
    nodes = [SimulatedOllama(name=name, models=[guessed_model(SMALL)], load_s=0.01) for name in ("alpha", "beta")]
    drifted = SimulatedOllama(name="gamma", models=[SimulatedModel(name=SMALL, size_bytes=2_019_393_189, digest="d" * 64)])
    async with nodes[0].serve(), nodes[1].serve(), drifted.serve():
        ports = {node.name: node.port for node in (*nodes, drifted)}
        async with open_fleet(ports) as fleet:
            shown = (await fleet.ask("GET", "/api/models/drift")).json()
            (drift,) = shown["drift"]
            assert (drift["model"], drift["canonical"]) == (SMALL, nodes[0].models[next(iter(nodes[0].models))].hex_digest)
            assert {entry["agent_name"]: entry["digest"] for entry in drift["digests"]}["gamma"] == "d" * 64
            assert (await fleet.ask("DELETE", "/api/delete", {"model": SMALL})).status == 200
            assert not any(node.models for node in (*nodes, drifted))


async def test_an_unload_reaches_every_node_where_the_model_is_loaded() -> None:
    async with three() as (fleet, nodes):
        for node in nodes.values():
            assert (await ask(node.port, "POST", "/api/generate", {"model": SMALL, "prompt": ""})).status == 200
        await wait_until(lambda: all(agent.loaded for agent in fleet.agents()), what="all loaded")
        answer = await fleet.ask("POST", "/api/generate", {"model": SMALL, "prompt": "", "keep_alive": 0})
        assert answer.json()["done_reason"] == "unload"
        for node in nodes.values():
            with trio.fail_after(10):
                while (await ask(node.port, "GET", "/api/ps")).json()["models"]:  # noqa: ASYNC110
                    await trio.sleep(0.02)


async def test_success_is_believed_only_when_the_nodes_list_shows_the_model(fast_clock: MockClock) -> None:
    async def says_so(caller: Caller) -> None:
        await caller.begin_chunks()
        await caller.chunk(b'{"status":"pulling manifest"}\n{"status":"pulling aaa","digest":"sha256:aaa","total":100,"completed":100}\n')
        await caller.chunk(b'{"status":"success"}\n')
        await caller.end_chunks()

    node = ScriptedNode(says_so)
    async with serving(node), open_fleet({"alpha": node.port}) as fleet:
        lines = (await fleet.ask("POST", "/api/pull", {"model": "fresh:1b"}, patience_s=900)).lines()
        assert "alpha: the node said success, but does not list the model" in lines[-1]["error"]
        assert {"status": "success"} not in lines
        assert (await fleet.ask("POST", "/api/pull", {"model": "m"})).lines()[-1] == {"status": "success"}


async def test_a_node_works_on_one_thing_at_a_time_and_nodes_do_not_wait_for_each_other() -> None:
    begun: list[str] = []
    at_once = dict.fromkeys(NODES, 0)
    most = dict.fromkeys(NODES, 0)
    gates = {name: trio.Event() for name in NODES}

    def script(name: str) -> Handler:
        async def work(caller: Caller) -> None:
            begun.append(f"{name} {caller.method} {caller.target}")
            at_once[name] += 1
            most[name] = max(most[name], at_once[name])
            await gates[name].wait()
            at_once[name] -= 1
            await caller.answer(b'{"status":"success"}')

        return work

    nodes = {name: ScriptedNode(script(name), models=("m:latest", "n:latest")) for name in NODES}
    async with (
        serving(*nodes.values()),
        open_fleet({name: node.port for name, node in nodes.items()}) as fleet,
        trio.open_nursery() as nursery,
    ):
        for body in ({"model": "m"}, {"model": "n"}):
            nursery.start_soon(fleet.ask, "POST", "/api/pull", body)
        await wait_until(lambda: len(begun) == len(NODES), what="one thing on each node")
        gates["alpha"].set()
        await wait_until(lambda: len(begun) > len(NODES), what="alpha to go on")
        assert begun[len(NODES) :] == ["alpha POST /api/pull"]
        nursery.cancel_scope.cancel()
    assert set(most.values()) == {1}


async def test_the_policy_places_models_and_removes_what_it_placed_alone() -> None:
    async with three() as (fleet, nodes):
        put = await fleet.ask("PUT", "/api/models/policy", {"models": [{"model": "fresh:1b", "count": 2}, {"model": SMALL}]})
        assert put.status == 200
        await wait_until(lambda: sum("fresh:1b" in names(node) for node in nodes.values()) == 2, what="two copies")

        async def placed() -> int:
            return len((await fleet.ask("GET", "/api/models/policy")).json()["placed"])

        with trio.fail_after(20):
            while await placed() < 2:  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert (await fleet.ask("PUT", "/api/models/policy", {"models": []})).status == 200
        await wait_until(lambda: not any("fresh:1b" in names(node) for node in nodes.values()), within_s=20, what="none left")
        assert all(names(node) == [SMALL] for node in nodes.values())  # never what it did not place
