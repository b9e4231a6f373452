"""A stream that may go on from another node when its own one fails (`ROUTER_RESUME=text`).

Decides which bytes of it the client gets (whole lines or events, so that the rest can follow any of them) and how another node is asked for
the rest; `core.resume` decides whether that can be done at all. Streams that cannot be resumed never come here.

Invariants: the client never gets half a line that is not followed by the rest of it or by an honest end; what is kept is bounded by
`core.resume.TEXT_MAX_BYTES` and one line; what was not resumed ends exactly as it would have without this.
"""

import time

import msgspec

from core.events import Failure, Route
from core.resume import BODY_MAX_BYTES, Asked, Rest, Transcript, may_resume, tokens_left
from edge.body import Body, scan
from edge.capture import Capture
from edge.headers import go_json
from edge.jsonscan import Member, Scanner, fold
from edge.relay import NO_END, Good, Poured, finish, framed
from edge.splice import Patch
from edge.verdicts import LINE_KEEP_BYTES
from edge.wire import ClientConnection, UpstreamConnection, UpstreamCut, UpstreamGarbled


class Resumable:
    """One request whose answer may be resumed, from its first byte on."""

    def __init__(self, asked: Asked, members: list[Member], body: bytes) -> None:
        self.asked = asked
        self._members = {member.name: member for member in members}
        self._body = body
        self._sent = Transcript()
        self._began_ns = time.monotonic_ns()
        self._rest: Rest | None = None
        self._held = b""
        """What came after the last whole line, or tells a failure."""
        self._good: Good | None = None
        self._cut: UpstreamCut | None = None
        self._poured = Poured()
        """Of the parts before the present one."""

    @property
    def broken(self) -> bool:
        """Whether a part of the answer is with the client and the rest was asked for."""
        return self._rest is not None

    @property
    def note(self) -> str:
        """What the record says of an answer that was resumed."""
        return f"the rest of the answer came from another node, after {self._sent.tokens} pieces of text"

    # ------------------------------------------------------------ the bytes

    async def pour(
        self, good: Good, conn: UpstreamConnection, client: ClientConnection, *, head_bytes: bytes, capture: Capture | None
    ) -> Poured | tuple[Failure, str]:
        """Give the client a part of the answer. Returns how it ended, or why the rest is to be asked for. Raises ClientGone."""
        judge = good.judge
        assert judge is not None, "no stream"
        end = b"\n\n" if good.head.fields.get(b"content-type", b"").startswith(b"text/event-stream") else b"\n"
        if self._good is not None:
            good.framing = self._good.framing
        else:
            await client.send(head_bytes)
        self._good, self._cut, self._held = good, None, b""
        data = good.first
        while data:
            judge.feed(data)
            out = self._lines(data, end)
            if out:
                good.body_bytes += len(out)
                if capture is not None:
                    capture.take(out)
                await client.send(framed(good, out))
            try:
                data = await conn.read_some()
            except UpstreamCut as error:
                self._cut = error.with_traceback(None)
                break
        failure = self._failure()
        if failure is not None and self._rest is None and self._may_go_on():
            self._rest = Rest(self._sent, before_ns=time.monotonic_ns() - self._began_ns)
            self._poured.body_bytes, self._poured.chunks = good.body_bytes, conn.chunks_seen
            return failure
        return await self.end(conn, client, capture=capture)

    async def end(self, conn: UpstreamConnection | None, client: ClientConnection, *, capture: Capture | None) -> Poured:
        """End the answer as its last node ended it, or honestly. `conn`: to that node; None: it is gone. Raises ClientGone."""
        good, held, before = self._good, self._held, self._poured
        assert good is not None, "nothing was poured"
        out = b""
        if held:
            good.body_bytes += len(held)
            if capture is not None:
                capture.take(held)
            out = framed(good, held)
        poured = await finish(good, client, self.asked.route, out, self._cut, chunks=0 if conn is None else conn.chunks_seen)
        if conn is not None:
            poured.body_bytes += before.body_bytes
            poured.chunks += before.chunks
        return poured

    def _lines(self, data: bytes, end: bytes) -> bytes:
        """The whole lines in what is held and `data` that the client may have now."""
        data = self._held + data
        rest, sent = self._rest, self._sent
        if rest is None and not sent.plain:
            self._held = b""
            return data  # it cannot be resumed any more: nothing is held back
        *lines, self._held = data.split(end)
        if len(self._held) > LINE_KEEP_BYTES and rest is None:
            sent.plain = False
        out: list[bytes] = []
        for at, line in enumerate(lines):
            whole = line + end
            if rest is not None:
                out.append(rest.rewrite(whole))
            elif sent.take(whole):
                out.append(whole)
            else:
                self._held = end.join((*lines[at:], self._held))
                break
        return b"".join(out)

    def _failure(self) -> tuple[Failure, str] | None:
        """What went wrong with the present part, if its rest could come from elsewhere."""
        good, cut = self._good, self._cut
        assert good is not None
        assert good.judge is not None
        judge = good.judge
        end = judge.end()
        if end.error is not None:
            return Failure.ANSWERED, end.error
        if end.proper and not (cut is not None and judge.mid_line):
            return None
        if cut is not None:
            return (Failure.GARBLED if isinstance(cut, UpstreamGarbled) else Failure.DIED), str(cut)
        return None if judge.ends_in_repeats() else (Failure.DIED, NO_END)

    def _may_go_on(self) -> bool:
        return self._sent.plain and self._sent.tokens > 0 and tokens_left(self.asked, self._sent) != 0

    # ------------------------------------------------------------ asking for the rest

    @property
    def tokens(self) -> int:
        """How many pieces of text the client has from the first node."""
        return self._sent.tokens

    def patches(self) -> list[Patch]:
        """What makes the request one for the rest."""
        text = go_json(self._sent.text)
        made: list[Patch] = []
        if self.asked.route is Route.GENERATE:
            end = self._end_of("prompt")
            made.append(Patch(end - 1, end - 1, text[1:-1]))
        else:
            end = self._end_of("messages")
            made.append(Patch(end - 1, end - 1, b',{"role":"assistant","content":' + text + b"}"))
        left = tokens_left(self.asked, self._sent)
        if left is not None:
            made.append(self._limit(b"%d" % left))
        return made

    def _end_of(self, name: str) -> int:
        member = self._members[name]
        return member.start + member.size

    def _limit(self, tokens: bytes) -> Patch:
        if self.asked.route is Route.V1_CHAT:
            member = self._members["max_tokens"]
            return Patch(member.start, member.start + member.size, tokens)
        options = self._members["options"]
        scanner = Scanner(lambda key: key if key == "num_predict" else None)
        scanner.feed(self._body[options.start : options.start + options.size])
        inner = scanner.members[-1]
        start = options.start + inner.start
        return Patch(start, start + inner.size, tokens)


async def resumable(route: Route, body: Body) -> Resumable | None:
    """The request as one whose stream may be resumed; None: it cannot be."""
    data = body.data
    if data is None or len(data) > BODY_MAX_BYTES:
        return None
    scanner = await scan(body, fold)
    scanner.close()
    if scanner.problem is not None or scanner.top != 0x7B:
        return None
    try:
        members = [(member.name, msgspec.json.decode(data[member.start : member.start + member.size])) for member in scanner.members]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    asked = may_resume(route, members)
    return None if asked is None else Resumable(asked, scanner.members, data)
