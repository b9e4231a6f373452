"""The routes of a simulated Ollama that change what it has: pull, push, create, copy, delete, blobs.

Decides statuses, framing and content types of their answers. What happens is the library's, the transfers' and the creations'.
"""

from contextlib import aclosing
from typing import Any, Final

from agent.simulated.answers import go_json
from agent.simulated.creating import Creating, target
from agent.simulated.library import Library, blob_digest
from agent.simulated.names import parse_name
from agent.simulated.native import BARE_JSON_TYPE, JSON_TYPE, NDJSON_TYPE
from agent.simulated.reading import Refusal, read_request
from agent.simulated.transfer import Lines, Transfers
from agent.simulated.wire import Reply, Request

BLOBS: Final = "/api/blobs/"
TRANSFERS: Final = {"/api/pull": "PullRequest", "/api/push": "PushRequest", "/api/create": "CreateRequest"}


class Managing:
    """Answers what changes a node's models."""

    def __init__(self, library: Library, transfers: Transfers) -> None:
        self._library = library
        self._transfers = transfers
        self._creating = Creating(library, transfers)

    async def answer(self, request: Request, reply: Reply) -> None:
        """Answer a request to one of these routes. Raises `Refusal` for what was found wrong before anything was said."""
        body = bytes(request.body)
        if request.path.startswith(BLOBS):
            await self._blob(request, reply)
        elif request.path == "/api/copy":
            fields = read_request(body, "CopyRequest")
            self._library.copy(fields.get("source", ""), fields.get("destination", ""))
            await reply.whole(200, b"", "")
        elif request.path == "/api/delete":
            fields = read_request(body, "DeleteRequest")
            self._library.delete(fields.get("model") or fields.get("name") or "")
            await reply.whole(200, b"", "")
        else:
            fields = read_request(body, TRANSFERS[request.path])
            await self._tell(self._lines(request.path, fields), reply, stream=fields.get("stream", True))

    def _lines(self, path: str, fields: dict[str, Any]) -> Lines:
        spelling, insecure = fields.get("model") or fields.get("name") or "", bool(fields.get("insecure"))
        if path == "/api/pull":
            parse_name(spelling)
            return self._transfers.pull(spelling, insecure=insecure)
        if path == "/api/push":
            if not spelling:
                raise Refusal(400, "model is required")
            return self._transfers.push(spelling, insecure=insecure)
        return self._creating.create(target(fields), fields)

    async def _tell(self, lines: Lines, reply: Reply, *, stream: bool) -> None:
        """Send lines as they come, or only how it ended."""
        try:
            async with aclosing(lines) as told:
                async for line in told:
                    if stream:
                        await reply.chunks(NDJSON_TYPE, [go_json(line) + b"\n"])
        except Refusal as refusal:
            error = go_json({"error": refusal.text})
            if reply.status:
                await reply.chunks(NDJSON_TYPE, [error + b"\n"])
                await reply.end()
            else:
                await reply.whole(refusal.status, error, BARE_JSON_TYPE, chunked=stream)
            return
        if stream:
            await reply.end()
        else:
            await reply.whole(200, go_json({"status": "success"}), BARE_JSON_TYPE)

    async def _blob(self, request: Request, reply: Reply) -> None:
        digest = blob_digest(request.path.removeprefix(BLOBS))
        there = digest in self._library.blobs
        if request.method == "HEAD":
            if not there:
                raise Refusal(404, f'blob "sha256:{digest}" not found')
            await reply.whole(200, b"", "", bare=True)
        elif request.noted:
            await reply.whole(200, b"", "")
        elif request.truncated:
            await reply.whole(500, go_json({"error": "unexpected EOF"}), JSON_TYPE)
        else:
            self._library.upload(digest, bytes(request.body))
            await reply.whole(201, b"", "")

    def unread(self, request: Request) -> bool:
        """Whether the body of `request` is not going to be read: it is a blob that is there already, and large or kept back.

        Notes whether it is there: of two that upload one blob at once, both create it.
        """
        if request.method != "POST" or not request.path.startswith(BLOBS):
            return False
        try:
            there = blob_digest(request.path.removeprefix(BLOBS)) in self._library.blobs
            size = int(request.fields.get(b"content-length", b"0"))
        except (Refusal, ValueError):
            return False
        request.noted = there
        return there and (size >= UNREAD_BYTES or request.fields.get(b"expect", b"").lower() == b"100-continue")


UNREAD_BYTES: Final = 262_144
"""Smaller bodies are read even when nobody wants them."""
