"""The poller against nodes on real sockets: answers, silence, nonsense, slowness."""

from collections.abc import Callable
from typing import Any

import pytest
import trio

from core.events import Event, NodePolled, NodeSilent, Upstream
from core.units import AgentId, Instant
from servers import poller as module
from servers.poller import Poller
from tests.servers.fake_node import FakeNode, running

A, B = AgentId("a"), AgentId("b")


class Told:
    """What the poller told the router; `until` waits for it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.unknown: list[AgentId] = []
        self._more = trio.Event()

    def apply(self, event: Event) -> None:
        self.events.append(event)
        self._more.set()
        self._more = trio.Event()

    async def until(self, wanted: Callable[[Any], bool]) -> Any:
        with trio.fail_after(10):
            while True:
                for event in self.events:
                    if wanted(event):
                        return event
                await self._more.wait()


def poller_of(told: Told, *, check_every_s: float = 30.0) -> Poller:
    return Poller(
        told.apply,
        now=lambda: Instant(trio.current_time()),
        known=lambda agent_id: agent_id not in told.unknown,
        check_every_s=check_every_s,
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOADED_EVERY_S", 0.02)
    monkeypatch.setattr(module, "CHECK_GAP_S", 0.001)


async def test_a_node_is_asked_everything_at_first_and_what_is_loaded_again_and_again() -> None:
    told = Told()
    async with running(FakeNode()) as node, trio.open_nursery() as nursery:
        poller = poller_of(told)
        poller.watch(A, node.upstream)
        nursery.start_soon(poller.run)
        full = await told.until(lambda event: isinstance(event, NodePolled) and event.alive)
        assert (full.version, full.installed[0]["name"], full.loaded) == ("0.33.0", "m:latest", None)
        assert full.asked_at <= trio.current_time()
        node.answers["/api/ps"] = {"models": [{"name": "m:latest"}]}
        loaded = await told.until(lambda event: isinstance(event, NodePolled) and event.loaded)
        assert (loaded.alive, loaded.version, loaded.installed) == (False, None, None)
        assert node.asked.count("/api/version") == 1
        nursery.cancel_scope.cancel()


async def test_a_refused_connection_is_told_at_once_and_the_node_is_back_at_its_first_answer() -> None:
    told = Told()
    node = FakeNode()
    async with running(node):
        pass
    async with trio.open_nursery() as nursery:
        poller = poller_of(told)
        nursery.start_soon(poller.run)
        await trio.testing.wait_all_tasks_blocked()
        poller.watch(A, node.upstream)
        assert await told.until(lambda event: event == NodeSilent(agent_id=A, refused=True))
        async with running(node):
            assert await told.until(lambda event: isinstance(event, NodePolled) and event.alive)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("answer", [500, b"not json", b"[]", {"version": 7}, b"\xff{}", b"HTTP"])
async def test_an_answer_that_is_none_is_silence_but_no_refusal(answer: Any) -> None:
    told = Told()
    async with running(FakeNode()) as node, trio.open_nursery() as nursery:
        node.answers["/api/version"] = answer
        poller = poller_of(told)
        poller.watch(A, node.upstream)
        nursery.start_soon(poller.run)
        assert await told.until(lambda event: event == NodeSilent(agent_id=A, refused=False))
        nursery.cancel_scope.cancel()


async def test_a_node_that_cannot_list_its_models_lives_all_the_same() -> None:
    told = Told()
    async with running(FakeNode()) as node, trio.open_nursery() as nursery:
        node.answers["/api/tags"] = 500
        node.answers["/api/ps"] = 500
        poller = poller_of(told)
        poller.watch(A, node.upstream)
        nursery.start_soon(poller.run)
        full = await told.until(lambda event: isinstance(event, NodePolled))
        assert (full.alive, full.installed) == (True, None)
        nursery.cancel_scope.cancel()


async def test_no_models_is_an_empty_list() -> None:
    told = Told()
    async with running(FakeNode()) as node, trio.open_nursery() as nursery:
        node.answers["/api/tags"] = {"models": None}
        poller = poller_of(told)
        poller.watch(A, node.upstream)
        nursery.start_soon(poller.run)
        assert (await told.until(lambda event: isinstance(event, NodePolled))).installed == []
        nursery.cancel_scope.cancel()


async def test_answers_are_limited_in_size_and_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWER_MAX_BYTES", 1000)
    monkeypatch.setattr(module, "ANSWER_LIMIT_S", 0.05)
    monkeypatch.setattr(module, "CONNECT_LIMIT_S", 0.05)
    told = Told()
    async with running(FakeNode()) as large, running(FakeNode()) as silent, trio.open_nursery() as nursery:
        large.answers["/api/version"] = b'{"version":"' + b"9" * 2000 + b'"}'
        silent.answers["/api/version"] = None
        poller = poller_of(told)
        poller.watch(A, large.upstream)
        poller.watch(B, silent.upstream)
        nursery.start_soon(poller.run)
        assert await told.until(lambda event: event == NodeSilent(agent_id=A, refused=False))
        assert await told.until(lambda event: event == NodeSilent(agent_id=B, refused=False))
        nursery.cancel_scope.cancel()


async def test_long_lists_are_read_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARSE_INLINE_BYTES", 10)
    told = Told()
    async with running(FakeNode()) as node, trio.open_nursery() as nursery:
        poller = poller_of(told)
        poller.watch(A, node.upstream)
        nursery.start_soon(poller.run)
        assert (await told.until(lambda event: isinstance(event, NodePolled))).version == "0.33.0"
        nursery.cancel_scope.cancel()


async def test_a_slow_node_delays_no_other() -> None:
    told = Told()
    async with running(FakeNode()) as slow, running(FakeNode()) as quick, trio.open_nursery() as nursery:
        slow.answers = dict.fromkeys(slow.answers)
        poller = poller_of(told)
        poller.watch(A, slow.upstream)
        poller.watch(B, quick.upstream)
        nursery.start_soon(poller.run)
        assert (await told.until(lambda event: isinstance(event, NodePolled))).agent_id == B
        nursery.cancel_scope.cancel()


async def test_a_probe_asks_everything_now() -> None:
    told = Told()
    async with running(FakeNode()) as node, trio.open_nursery() as nursery:
        poller = poller_of(told)
        poller.watch(A, node.upstream)
        nursery.start_soon(poller.run)
        await told.until(lambda event: isinstance(event, NodePolled) and event.alive)
        node.answers["/api/version"] = {"version": "0.34.0"}
        poller.probe(A)
        poller.probe(B)
        assert await told.until(lambda event: isinstance(event, NodePolled) and event.version == "0.34.0")
        nursery.cancel_scope.cancel()


async def test_a_node_that_refuses_what_is_loaded_is_checked_at_once() -> None:
    told = Told()
    node = FakeNode()
    async with trio.open_nursery() as nursery:
        async with running(node):
            poller = poller_of(told)
            poller.watch(A, node.upstream)
            nursery.start_soon(poller.run)
            await told.until(lambda event: isinstance(event, NodePolled) and event.loaded is not None)
        assert await told.until(lambda event: event == NodeSilent(agent_id=A, refused=True))
        nursery.cancel_scope.cancel()


async def test_forgotten_nodes_are_asked_no_more() -> None:
    told = Told()
    async with running(FakeNode()) as node, running(FakeNode()) as other, trio.open_nursery() as nursery:
        poller = poller_of(told, check_every_s=0.01)
        poller.watch(A, node.upstream)
        poller.watch(B, other.upstream)
        nursery.start_soon(poller.run)
        await told.until(lambda event: event.agent_id == A)
        await told.until(lambda event: event.agent_id == B)
        poller.forget(A)
        told.unknown.append(B)
        with trio.fail_after(5):
            while B in poller._nodes:  # noqa: ASYNC110
                await trio.sleep(0.01)
        seen = len(node.asked) + len(other.asked)
        told.events.clear()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert told.events == []
        assert len(node.asked) + len(other.asked) <= seen + 1
        nursery.cancel_scope.cancel()


async def test_a_node_that_moved_is_asked_at_its_new_address(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Told()
    async with running(FakeNode()) as old, running(FakeNode()) as new, trio.open_nursery() as nursery:
        new.answers["/api/version"] = {"version": "new"}
        poller = poller_of(told)
        poller.watch(A, old.upstream)
        nursery.start_soon(poller.run)
        await told.until(lambda event: isinstance(event, NodePolled))
        poller.watch(A, new.upstream)
        assert await told.until(lambda event: isinstance(event, NodePolled) and event.version == "new")
        poller.watch(A, new.upstream)
        monkeypatch.setattr(module, "NODES_MAX", 1)
        poller.watch(B, Upstream(host="127.0.0.1", port=1))
        assert list(poller._nodes) == [A]
        nursery.cancel_scope.cancel()


async def test_a_kept_connection_that_breaks_without_a_byte_is_no_silence() -> None:
    """A node may close an idle connection in the very moment in which it is asked over it."""
    told = Told()
    node = OneAnswerEach()
    async with running(node) as node, trio.open_nursery() as nursery:
        poller = poller_of(told)
        poller.watch(A, node.upstream)
        nursery.start_soon(poller.run)
        await told.until(lambda event: isinstance(event, NodePolled) and event.loaded is not None)
        await told.until(lambda _: node.broken >= 3)
        assert all(isinstance(event, NodePolled) for event in told.events)
        nursery.cancel_scope.cancel()


class OneAnswerEach(FakeNode):
    """Takes a second request on a connection, and closes instead of answering it."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            for answered in (False, True):
                head = await stream.receive_some(65536)
                if answered or not head:
                    self.broken += bool(head)
                    return
                await stream.send_all(self._response(self.answers[head.split(b" ")[1].decode()]))


async def test_five_hundred_nodes_are_all_known_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a question costs does not grow with the number of nodes that are asked."""
    monkeypatch.setattr(module, "LOADED_EVERY_S", 2.0)
    told = Told()
    ids = [AgentId(str(number)) for number in range(500)]
    async with running(FakeNode()) as node, trio.open_nursery() as nursery:
        poller = poller_of(told)
        for number, agent_id in enumerate(ids):
            poller.watch(agent_id, Upstream(host=f"127.0.1.{number // 250}", port=node.port, base_path=f"/{number}"))
        listeners = [await trio.open_tcp_listeners(node.port, host=f"127.0.1.{last}") for last in (0, 1)]
        node.answers = PrefixedAnswers(node.answers)
        for listener in listeners:
            nursery.start_soon(trio.serve_listeners, node.serve, listener)
        nursery.start_soon(poller.run)
        seen: set[AgentId] = set()

        def all_seen(event: Event) -> bool:
            if isinstance(event, NodePolled) and event.alive:
                seen.add(event.agent_id)
            return len(seen) == len(ids)

        await told.until(all_seen)
        nursery.cancel_scope.cancel()


class PrefixedAnswers(dict[str, Any]):
    """Answers whatever stands before the path."""

    def get(self, path: str, default: Any = None) -> Any:
        return super().get("/" + path.split("/", 2)[2], default)
