"""The soak's clients: every kind of request, clients that leave and clients that read slowly, and an account of what they saw.

Decides the mixture. Knows no program, only ports. Invariant: a request counts as sent when all of it was, and its client stayed until it
had an answer's beginning or for `PATIENT_S`; only then must history know it.
"""

import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from tests.fleet.rawhttp import encode, request_bytes

MODEL: Final = "m:latest"
PATIENT_S: Final = 0.5
"""A client that leaves before its answer began stays at least so long."""
ANSWER_LIMIT_S: Final = 120.0
LARGE_BYTES: Final = 300_000
PAUSE_S: Final = 0.25
"""Between two requests of one client, on average."""
FILL_BYTES: Final = 6000
"""Of a prompt of `fill`: the router remembers its first 1, 2 and 4 KiB."""
KINDS: Final = {"chat": 30, "stream": 30, "openai": 12, "embed": 8, "leave": 8, "leave at once": 2, "slow": 4, "large": 2, "long": 4}


@dataclass
class Account:
    """What all clients saw."""

    sent: int = 0
    ids: set[str] = field(default_factory=set)
    left_early: int = 0
    """Left before the answer began, so without an id; among `sent`."""
    twice: int = 0
    """Ids that came with two answers."""
    without_id: int = 0
    unanswered: int = 0
    """The connection ended, or nothing came for `ANSWER_LIMIT_S`, though the client stayed; among `sent`."""
    statuses: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)


def _request(kind: str, dice: random.Random) -> bytes:
    tokens, rate = dice.randint(3, 40), dice.choice((50, 100, 200, 400))
    if kind == "long":
        tokens, rate = 150, 25
    if kind == "slow":
        tokens, rate = 60, 400
    prompt = f"tokens={tokens} rate={rate} conversation {dice.randrange(200)}"
    if kind == "fill":
        prompt = f"tokens=1 rate=1000 {dice.randbytes(FILL_BYTES // 2).hex()}"
    if kind == "large":
        prompt += " word" * (LARGE_BYTES // 5)
    body: dict[str, Any]
    messages = [{"role": "user", "content": prompt}]
    if kind == "embed":
        path, body = "/api/embed", {"model": MODEL, "input": prompt}
    elif kind == "openai":
        path, body = "/v1/chat/completions", {"model": MODEL, "messages": messages, "stream": True}
    else:
        path, body = "/api/chat", {"model": MODEL, "messages": messages, "stream": kind not in ("chat", "fill")}
    return request_bytes("POST", path, encode(body))


def _id_of(head: bytes) -> str:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"x-request-id":
            return value.strip().decode("latin-1")
    return ""


class Clients:
    """Clients that ask one thing after the other through one of `ports`. `stopping`: those of `run` end with what they asked last."""

    def __init__(self, ports: Sequence[int], *, seed: int) -> None:
        self.account = Account()
        self.stopping = False
        self._ports = ports
        self._seed = seed
        self._numbers = itertools.count()

    async def run(self, count: int) -> None:
        """So many clients, until `stopping` is set and all have ended. May be called again: others come then."""
        self.stopping = False
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(self._client, random.Random(self._seed * 1000 + next(self._numbers)))

    async def fill(self, requests: int, count: int) -> None:
        """So many small requests by so many clients without a pause, each with a prompt of its own."""
        numbers = iter(range(requests))

        async def client(dice: random.Random) -> None:
            for _ in numbers:
                await self._asked("fill", dice)

        async with trio.open_nursery() as nursery:
            for number in range(count):
                nursery.start_soon(client, random.Random(-self._seed * 1000 - number - 1))

    async def _client(self, dice: random.Random) -> None:
        kinds, weights = list(KINDS), list(KINDS.values())
        while not self.stopping:
            (kind,) = dice.choices(kinds, weights)
            await self._asked(kind, dice)
            await trio.sleep(dice.expovariate(1 / PAUSE_S))

    async def _asked(self, kind: str, dice: random.Random) -> None:
        try:
            await self._one(kind, dice)
        except OSError:
            self.account.statuses["no connection"] += 1

    async def _one(self, kind: str, dice: random.Random) -> None:
        stream = await trio.open_tcp_stream("127.0.0.1", dice.choice(self._ports))
        async with stream:
            if kind == "slow":
                stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, 4096)
            try:
                await stream.send_all(_request(kind, dice))
            except trio.BrokenResourceError:  # an early refusal may cut a large body
                pass
            self.account.sent += 1
            self.account.kinds[kind] += 1
            patience_s = PATIENT_S + dice.random() if kind == "leave at once" else ANSWER_LIMIT_S
            with trio.move_on_after(patience_s) as scope:
                head = await self._head(stream)
            if scope.cancelled_caught and kind == "leave at once":
                self.account.left_early += 1
                return
            if scope.cancelled_caught or not head:
                self.account.unanswered += 1
                return
            self._note(head)
            if kind in ("leave", "leave at once"):
                return
            with trio.move_on_after(ANSWER_LIMIT_S):
                await self._rest(stream, slowly=kind == "slow")

    async def _head(self, stream: trio.SocketStream) -> bytes:
        data = b""
        while b"\r\n\r\n" not in data:
            try:
                some = await stream.receive_some(4096)
            except trio.BrokenResourceError:
                return b""
            if not some:
                return b""
            data += some
        return data.partition(b"\r\n\r\n")[0]

    def _note(self, head: bytes) -> None:
        account, found = self.account, _id_of(head)
        account.statuses[head.split(b" ", 2)[1].decode("latin-1")] += 1
        account.without_id += not found
        account.twice += found in account.ids
        account.ids.add(found)

    async def _rest(self, stream: trio.SocketStream, *, slowly: bool) -> None:
        while True:
            if slowly:
                await trio.sleep(0.1)
            try:
                if not await stream.receive_some(512 if slowly else 65536):
                    return
            except trio.BrokenResourceError:
                return


def shown(account: Account) -> dict[str, Any]:
    """The account in figures."""
    return {
        "requests": account.sent, "ids": len(account.ids), "left before the answer": account.left_early, "no answer": account.unanswered,
        "answers without id": account.without_id, "ids twice": account.twice, "statuses": dict(sorted(account.statuses.items())),
        "kinds": dict(sorted(account.kinds.items())),
    }  # fmt: skip
