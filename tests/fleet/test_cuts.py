"""Every protocol's stream, cut wherever it can be cut: what was sent passes, and an end that the node did not say never looks like one."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.fleet.edges import Edge
from tests.fleet.fleet import ScriptedNode, line, open_fleet, openai_chunk, serving, sse
from tests.fleet.rawhttp import Answer, Caller, Hangup, wait_until

pytestmark = pytest.mark.through_nginx(Edge.GATEWAYS, Edge.HANDED_OVER)

NDJSON, SSE = "application/x-ndjson", "text/event-stream"


def named(name: str, **more: Any) -> bytes:
    return b"event: %b\n" % name.encode() + sse({"type": name, **more})


def compact(**said: Any) -> bytes:
    return json.dumps(said, separators=(",", ":")).encode() + b"\n"


STREAMS: dict[str, tuple[str, list[bytes], int]] = {
    "/api/chat": (NDJSON, [line('a"done":true'), line("\u00e9"), line("", done=True, done_reason="stop")], 3),
    "/api/generate": (
        NDJSON,
        [compact(response='\n{"error":1}', done=False), compact(response="b", done=False), compact(response="", done=True, context=[1, 2])],
        3,
    ),
    "/v1/chat/completions": (SSE, [sse(openai_chunk("data: [DONE]")), sse(openai_chunk("b")), sse(b"[DONE]")], 3),
    "/v1/completions": (SSE, [sse({"choices": [{"text": "a", "index": 0}]}), sse({"choices": [{"text": "b"}]}), sse(b"[DONE]")], 3),
    "/v1/responses": (
        SSE,
        [
            named("response.created", response={"status": "in_progress"}),
            named("response.output_text.delta", delta="event: response.completed"),
            named("response.completed", response={"status": "completed"}),
        ],
        3,
    ),
    "/v1/messages": (
        SSE,
        [
            named("message_start", message={"role": "assistant"}),
            named("content_block_delta", index=0, delta={"type": "text_delta", "text": "event: message_stop"}),
            named("message_delta", delta={"stop_reason": "end_turn"}),
            named("message_stop"),
        ],
        4,
    ),
}
ERRORS: dict[str, bytes] = {
    "/api/chat": b'{"error":"the runner died"}\n',
    "/api/generate": b'{"error":"the runner died"}\n',
    "/v1/chat/completions": sse({"error": {"message": "the runner died", "type": "api_error"}}),
    "/v1/completions": sse({"error": {"message": "the runner died", "type": "api_error"}}),
    "/v1/responses": named(
        "response.failed", response={"status": "failed", "error": {"code": "server_error", "message": "the runner died"}}
    ),
    "/v1/messages": named("error", error={"type": "api_error", "message": "the runner died"}),
}
BODY = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "a"}], "prompt": "a", "input": "a", "max_tokens": 9}


def error_in(path: str, body: bytes) -> str:
    """The words of the last line or event, which must be an error in the protocol's manner."""
    lines = [text for text in body.split(b"\n") if text]
    if path.startswith("/api"):
        return str(json.loads(lines[-1])["error"])
    assert body.endswith(b"\n\n")
    said = json.loads(lines[-1].removeprefix(b"data: "))
    if path == "/v1/responses":
        assert lines[-2] == b"event: response.failed"
        assert said["response"]["status"] == "failed"
        return str(said["response"]["error"]["message"])
    if path == "/v1/messages":
        assert lines[-2] == b"event: error"
        assert said["type"] == "error"
    return str(said["error"]["message"])


class Node(ScriptedNode):
    """Sends what it is told to of an answer, and ends it as told."""

    def __init__(self) -> None:
        super().__init__(self._send)
        self.kind, self.data, self.clean = "", b"", False

    async def _send(self, caller: Caller) -> None:
        await caller.begin_chunks(self.kind)
        await caller.chunk(self.data)
        if not self.clean:
            raise Hangup
        await caller.end_chunks()


Ask = Callable[[bytes, bool], Any]


def check(path: str, answer: Answer, sent: bytes, *, over: bool, clean: bool, where: str) -> None:
    assert answer.status == 200, where
    assert answer.body.startswith(sent), where
    if over:
        assert (answer.whole, answer.body) == (True, sent), where
        return
    assert not answer.whole, where
    rest = answer.body[len(sent) :]
    end = b"\n" if path.startswith("/api") else b"\n\n"
    assert rest.startswith(b"\n") is not sent.endswith(end), where
    assert error_in(path, answer.body), where
    assert b"[DONE]" not in rest, where


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("clean", [False, True])
async def test_cut_at_every_byte(path: str, clean: bool) -> None:
    kind, pieces, _ = STREAMS[path]
    whole = b"".join(pieces)
    borders = {sum(map(len, pieces[:count])) for count in range(1, len(pieces) + 1)}
    near = {at + step for at in borders for step in (-3, -2, -1, 0, 1, 2)}
    places = sorted(at for at in near | set(range(1, len(whole), 11)) if 0 < at <= len(whole))
    last = len(whole) - len(pieces[-1])
    node = Node()
    async with serving(node), open_fleet([node.port]) as fleet:
        for at in places:
            node.kind, node.data, node.clean = kind, whole[:at], clean
            answer = await fleet.ask("POST", path, BODY)
            said = whole[last:at]
            over = at == len(whole) or (clean and said.rstrip() in (b"data: [DONE]", pieces[-1].rstrip() if kind == NDJSON else b"-"))
            check(path, answer, whole[:at], over=over, clean=clean, where=f"cut at {at} of {len(whole)}")
        await fleet.wait_settled()


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("clean", [False, True])
async def test_a_failure_that_the_node_told_is_told_once(path: str, clean: bool) -> None:
    kind, pieces, _ = STREAMS[path]
    node = Node()
    async with serving(node), open_fleet([node.port]) as fleet:
        node.kind, node.data, node.clean = kind, pieces[0] + ERRORS[path], clean
        answer = await fleet.ask("POST", path, BODY)
        assert (answer.body, answer.whole) == (node.data, clean)
        assert error_in(path, answer.body) == "the runner died"
        await fleet.wait_settled()
        await wait_until(lambda: fleet.coordinator.records.newest, what="its record")
        record = fleet.coordinator.records.newest[-1]
        assert (record.ending.value, record.message) == ("error", "the runner died")


async def test_a_whole_answer_that_is_cut_is_tried_elsewhere_and_never_half_given() -> None:
    async def half(caller: Caller) -> None:
        await caller.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 100\r\n\r\nhalf")
        raise Hangup

    async def well(caller: Caller) -> None:
        await caller.answer(b'{"text":"hello"}')

    part = b'--x\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
    form = part % (b"model", b"m") + part % (b'file"; filename="a', b"RIFF") + b"--x--\r\n"
    one, two = ScriptedNode(half), ScriptedNode(well)
    async with serving(one, two), open_fleet([one.port, two.port]) as fleet:
        for _ in range(2):
            answer = await fleet.ask("POST", "/v1/audio/transcriptions", form, headers={"Content-Type": "multipart/form-data; boundary=x"})
            assert (answer.status, answer.body, answer.headers["x-ollama-node"]) == (200, b'{"text":"hello"}', "node-2")
        assert two.seen[0].body == form


# ---------------------------------------------------------------- headers that tell


async def test_ids_and_traces_are_on_every_answer_and_with_every_node() -> None:
    async def well(caller: Caller) -> None:
        await caller.answer(b'{"model":"m","done":true}')

    node = ScriptedNode(well)
    trace = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "tracestate": "a=b", "X-Request-Id": "mine"}
    async with serving(node), open_fleet([node.port]) as fleet:
        answer = await fleet.ask("POST", "/api/chat", {**BODY, "stream": False}, headers=trace)
        request_id = answer.headers["x-request-id"]
        assert answer.headers["x-ollama-node"] == "node-1"
        head = node.seen[-1].head.decode().lower()
        assert f"traceparent: {trace['traceparent']}\r\n" in head
        assert "tracestate: a=b" in head
        assert head.count("x-request-id:") == 1
        assert f"x-request-id: {request_id}" in head
        ids = {request_id}
        for method, path, body in [
            ("POST", "/api/chat", {"model": "nobody"}), ("GET", "/api/tags", None), ("GET", "/v1/models", None), ("GET", "/nowhere", None),
            ("OPTIONS", "/api/chat", None), ("POST", "/v1/messages", {"model": "nobody"}), ("POST", "//api/chat", {}),
            ("GET", "/api/ps", None),
        ]:  # fmt: skip
            refused = await fleet.ask(method, path, body, headers=trace)
            ids.add(refused.headers["x-request-id"])
            assert "x-ollama-node" not in refused.headers
        assert len(ids) == 9
        assert "mine" not in ids
