"""One inference request of a simulated Ollama, from its body to its last byte, and the faults on the way.

Decides what is written when the machine says that something is due. Knows the machine only through `Engine`.

Invariant: whatever way this ends, the machine is told, so that nothing is generated for a client that has left.
"""

import time
from collections.abc import Sequence
from typing import Final

import msgspec
import trio

from agent.simulated import native, openai
from agent.simulated.answers import Piece, answer, go_json, whole_microseconds
from agent.simulated.asking import Ask
from agent.simulated.engine import Desk, Engine, RequestLog
from agent.simulated.faults import BUSY, LINE_TEXT, LOAD_TEXT, RUNNER_GONE, Fault, Faults
from agent.simulated.library import Library
from agent.simulated.models import Knobs
from agent.simulated.native import JSON_TYPE, Figures, Wall
from agent.simulated.openai import TranslationError
from agent.simulated.protocols import PROTOCOLS, plain
from agent.simulated.reading import Refusal
from agent.simulated.scripts import UNFINISHED, scripted
from agent.simulated.wire import ConnectionOver, Header, Reply, Request
from core.simulation.node import Came

STATUS_TEXTS: Final = {500: RUNNER_GONE, 503: BUSY, 499: "request canceled"}
CANCELLED_TEXT: Final = "error reading llama-server response: context canceled"
HTML: Final = b"<html><head><title>502 Bad Gateway</title></head><body>nothing here</body></html>"
MID_STREAM: Final = frozenset({"close", "reset", "cut", "end", "error", "stall", "malformed", "huge"})


class Inference:
    """Serves the inference routes of one node."""

    def __init__(self, engine: Engine, faults: Faults, knobs: Knobs, library: Library, wall: Wall) -> None:
        self.engine = engine
        self.library = library
        self.knobs = knobs
        self.wall = wall
        self._faults = faults

    async def serve(self, request: Request, reply: Reply, log: RequestLog) -> None:
        """Answer `request`. Raises `ConnectionOver` when the connection is of no further use."""
        began = time.perf_counter()
        stream_headers: Sequence[Header] = ()
        protocol = PROTOCOLS[request.path]
        try:
            fields = protocol.read(request)
            log.model = fields.get("model", "")
            fault = self._faults.pick(request.path, log.model)
            log.fault = fault.kind if fault else None
            if fault is not None and await self.at_once(fault, reply):
                return
            stream_headers = protocol.stream_headers if fields.get("stream") else ()
            ask = protocol.ask(fields, self.library.for_inference, self.knobs)
        except (Refusal, TranslationError) as refusal:
            if isinstance(refusal, Refusal):
                reply.extra += stream_headers
            kind, body = protocol.refused(refusal, self.wall)
            await reply.whole(plain(refusal).status, body, kind)
            return
        reply.extra += stream_headers
        await _Serving(self, ask, reply, log, fault, request.path, began).run()

    async def at_once(self, fault: Fault, reply: Reply) -> bool:
        """Carry out a fault that needs no scheduling. False: the request goes on."""
        match fault.kind:
            case "silent":
                await trio.sleep_forever()
            case "close" | "reset" | "cut" if fault.after_tokens == 0:
                if fault.kind == "reset":
                    reply.connection.reset()
                raise ConnectionOver
            case "status" | "error" if fault.kind == "status" or fault.after_tokens == 0:
                status = fault.status if fault.kind == "status" else 500
                text = fault.text or STATUS_TEXTS.get(status, "failed on purpose")
                body = native.refused(Refusal(status, text), stream=False)[1]
                if fault.body is None and (protocol := PROTOCOLS.get(reply.request.path)) is not None:
                    body = protocol.refused(Refusal(status, text), self.wall)[1]
                await reply.whole(status, body if fault.body is None else fault.body.encode(), fault.content_type)
            case "html":
                await reply.whole(200, HTML, "text/html")
            case "empty":
                await reply.begin(native.NDJSON_TYPE)
                await reply.end()
            case "garbage":
                await reply.raw(b"\x00\x01 this is no HTTP\r\n\r\n")
                raise ConnectionOver
            case "drip":
                reply.piece_bytes, reply.pause_s = fault.piece_bytes, min(fault.seconds, 3600)
                return False
            case "hang-up":
                reply.hang_up = True
                return False
            case _:
                return False
        return True


class _Serving:
    """One request that has been understood."""

    def __init__(self, owner: Inference, ask: Ask, reply: Reply, log: RequestLog, fault: Fault | None, route: str, began: float) -> None:
        self._engine = owner.engine
        self._runner = owner.library.runner_name(ask.model)
        self._knobs = owner.knobs
        self._ask = ask
        self._reply = reply
        self._log = log
        self._route = route
        self._read_s = time.perf_counter() - began
        self._protocol = PROTOCOLS[route]
        self._wall = owner.wall
        self._writer = self._protocol.writer(ask, owner.wall)
        self._fault = fault if fault is not None and fault.kind in MID_STREAM else None
        self._blank = fault is not None and fault.kind == "blank"
        self._leaks = fault is not None and fault.kind == "leak"
        self._load_error = (fault.text or LOAD_TEXT) if fault is not None and fault.kind == "load" else ""
        self._desk = Desk(log)
        self._pieces: list[Piece] = []
        self._reason = "stop"
        self._sent = 0

    async def run(self) -> None:
        """Serve it; the machine is let go of in any case."""
        ask, reply = self._ask, self._reply
        if ask.purpose == "unload":
            self._engine.unload(self._runner)
            await reply.whole(200, self._writer.loaded("unload"), JSON_TYPE)
            return
        if ask.purpose == "render":
            await reply.whole(200, self._writer.rendered(), JSON_TYPE)
            return
        if ask.purpose == "answer":
            question = ask.question
            if self._knobs.seed:
                question = msgspec.structs.replace(question, seed=(question.seed or 0) + self._knobs.seed)
            self._pieces, self._reason = scripted(ask.question) or answer(question, usual_tokens=self._knobs.answer_tokens)
        try:
            await self._scheduled()
        except trio.Cancelled:
            self._log.cancelled_at = reply.connection.gone_at or trio.current_time()
            raise
        finally:
            self._engine.leave(self._log.request_id)

    def _submit(self) -> None:
        ask = self._ask
        only_load = ask.runner_error is not None or ask.purpose == "load"
        fault = self._fault
        came = Came(
            request_id=self._log.request_id,
            model=self._runner,
            num_ctx=ask.num_ctx,
            options=ask.runner_options,
            keep_alive_s=ask.keep_alive_s,
            conversation=ask.conversation,
            output_tokens=0 if only_load else len(self._pieces),
            prompt_tokens=0 if only_load else max(1, ask.prompt_tokens),
            paced=ask.stream or fault is not None,
            hold_at=fault.after_tokens if fault is not None and fault.kind == "stall" else None,
            leaks=self._leaks,
            load_error=self._load_error,
        )
        self._engine.submit(came, self._desk)

    async def _scheduled(self) -> None:
        ask, desk = self._ask, self._desk
        self._submit()
        while True:
            await desk.change()
            if desk.refused:
                return await self._refuse(Refusal(503, BUSY))
            if desk.failed is not None:
                return await self._refuse(Refusal(500, desk.failed))
            if not await self._catch_up():
                return None
            if desk.held and not desk.timing:
                assert self._fault is not None
                await trio.sleep(min(self._fault.seconds, 1e9))
                desk.held = False
                self._engine.resume(self._log.request_id)
            if desk.timing is not None:
                break
        if ask.runner_error is not None:
            return await self._refuse(ask.runner_error)
        await self._finish(self._figures())
        self._log.done = True
        return None

    async def _catch_up(self) -> bool:
        """Send what is due. False: a fault has ended the answer."""
        while True:  # more may become due while something is written
            due = self._desk.tokens
            fault = self._fault if self._fault is not None and self._fault.kind != "stall" else None
            strikes_at = fault.after_tokens if fault is not None and fault.after_tokens >= self._sent else None
            until = due if strikes_at is None else min(due, strikes_at)
            await self._send(self._pieces[self._sent : until])
            self._sent = max(self._sent, until)
            if fault is not None and self._sent == strikes_at and (due > self._sent or self._desk.timing is not None):
                self._fault = None
                if not await self._strike(fault):
                    return False
            elif self._sent >= self._desk.tokens:
                return True

    async def _send(self, pieces: Sequence[Piece]) -> None:
        if not self._ask.stream:
            return
        told = [piece for piece in pieces if not piece.silent or self._ask.logprobs is not None]
        writes = [write for piece in told for write in self._writer.piece(piece)]
        if writes:
            await self._reply.chunks(self._writer.stream_type, writes)
            self._log.tokens_sent += len(told)

    async def _strike(self, fault: Fault) -> bool:
        """Carry out a fault in the middle of an answer. False: nothing more comes."""
        reply, writer, stream = self._reply, self._writer, self._ask.stream
        said = self._pieces[: self._sent]
        match fault.kind:
            case "close":
                raise ConnectionOver
            case "reset":
                reply.connection.reset()
            case "cut":
                await self._cut()
            case "end" if stream:
                if not reply.began:
                    await reply.begin(native.NDJSON_TYPE)
                await reply.end()
                return False
            case "end":
                await reply.whole(200, writer.unfinished(said), writer.whole_type)
                return False
            case "error" if stream:
                await reply.chunks(writer.stream_type, writer.stream_error(fault.text or LINE_TEXT))
                await reply.end()
                return False
            case "error":
                await self._refuse(Refusal(500, fault.text or LINE_TEXT))
                return False
            case "malformed" if stream:
                await reply.chunks(writer.stream_type, [b'{"model":"' + self._ask.spelling.encode() + b'",,"done":fal\n'])
            case "huge" if stream:
                await reply.chunks(writer.stream_type, writer.piece(Piece(content="x" * fault.size_bytes)))
            case _:
                await reply.whole(200, b'{"model":', writer.whole_type)
                return False
        return True

    async def _cut(self) -> None:
        """End the connection inside what would come next."""
        reply = self._reply
        following = self._pieces[self._sent : self._sent + 1] or [Piece(content=" never")]
        if self._ask.stream:
            whole = reply.framed(b"".join(self._writer.piece(following[0])))
            await reply.raw(whole[: len(whole) // 2])
            raise ConnectionOver
        await reply.cut_whole(self._writer.unfinished(self._pieces), self._writer.whole_type)

    async def _refuse(self, refusal: Refusal) -> None:
        """An error before the first token."""
        stream = self._ask.stream
        kind, body = self._protocol.refused(refusal, self._wall)
        if self._route.startswith("/api/"):
            kind, body = native.refused(refusal, stream=stream)
        await self._reply.whole(refusal.status, body, kind, chunked=stream and not refusal.early)

    def _figures(self) -> Figures:
        timing = self._desk.timing
        assert timing is not None
        read_ns = max(1, round(self._read_s * 1e9))
        load_ns = read_ns + round((timing.obtained - timing.came) * 1e9)
        waited_ns = round((timing.started - timing.obtained) * 1e9)
        prompt_ns = whole_microseconds(timing.first - timing.started)
        eval_ns = whole_microseconds(timing.finished - timing.first) if self._ask.purpose == "answer" else 0
        return Figures(
            total_ns=load_ns + waited_ns + prompt_ns + eval_ns,
            load_ns=load_ns,
            prompt_tokens=self._ask.prompt_tokens,
            prompt_ns=prompt_ns,
            eval_tokens=len(self._pieces),
            eval_ns=eval_ns,
        )

    async def _finish(self, figures: Figures) -> None:
        ask, reply, writer = self._ask, self._reply, self._writer
        if self._blank:
            await reply.whole(200, writer.unfinished([]), writer.whole_type)
        elif self._route == "/api/embed":
            await reply.whole(200, native.embedded(ask, figures), JSON_TYPE)
        elif self._route == "/api/embeddings":
            await reply.whole(200, native.embedding(ask), JSON_TYPE)
        elif self._route == "/v1/embeddings":
            await reply.whole(200, openai.embedded(ask), native.BARE_JSON_TYPE)
        elif ask.purpose == "load":
            await reply.whole(200, writer.loaded("load"), writer.whole_type)
        elif self._reason == UNFINISHED and ask.stream:
            await reply.end()
        elif self._reason == UNFINISHED:
            await reply.whole(200, writer.unfinished(self._pieces), writer.whole_type)
        elif ask.stream:
            await reply.chunks(writer.stream_type, writer.last(self._pieces, self._reason, figures))
            await reply.end()
        else:
            await reply.whole(200, writer.whole(self._pieces, self._reason, figures), writer.whole_type)


async def say_cancelled(reply: Reply, log: RequestLog) -> None:
    """What a client that only half-closed is told."""
    text = CANCELLED_TEXT if reply.began or log.tokens_generated else "request canceled"
    if not reply.began:
        status = 500 if log.tokens_generated else 499
        await reply.whole(status, native.refused(Refusal(status, text), stream=False)[1], JSON_TYPE)
    elif not log.route.startswith("/v1/"):
        await reply.raw(reply.framed(go_json({"error": text}) + b"\n"))
        await reply.end()
