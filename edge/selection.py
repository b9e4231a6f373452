"""The selection endpoint: nginx brings each request here, and is told in headers which node gets it. HTTP/1.1 over a unix socket.

Decides what nginx may carry out itself; whatever else there is to do is handed to the embedded edge (`edge.handover`), so that both edges
answer alike. The node is the router's choice. A request that waits in the queue has its answer held back; when its connection closes
meanwhile, its client has left.

One task owns all connections, through an epoll of its own: reading, deciding and answering are one step, without a switch of tasks per
request. Invariants: a turn ends after `TURN_S`, and others get theirs; every request that the router was told of is in the handover's
table from then on; an answer that could not be sent whole ends its request. Bodies are only looked at, never kept.
"""

import ipaddress
import select
import socket
import time
from collections.abc import Callable, Iterable
from hashlib import sha1
from typing import Final
from typing import Protocol as Interface

import msgspec
import trio
from trio.lowlevel import checkpoint, wait_readable

from core.aliases import Aliases
from core.events import Ending, Forward, Lease, Route, Settled, Upstream
from core.history import EDGE_NGINX
from core.structs import Fact
from core.units import AgentId, RequestId
from edge.body import inspect_ordinary
from edge.denied import Denied
from edge.desk import Answer
from edge.handover import Carried, Decides, Handover
from edge.headers import host_of, safe_value
from edge.tally import Tally
from edge.wire_heads import HttpError, parse_request_head

TURN_S: Final = 0.002
"""So long at most without giving way to other tasks."""

RECEIVE_BYTES: Final = 16 << 10
"""Most requests are smaller, and a larger buffer costs more to get than they to read."""
RECEIVE_MORE_BYTES: Final = 128 << 10
BODY_MAX_BYTES: Final = 256 << 10
"""nginx sends no larger body here."""
HEAD_MAX_BYTES: Final = 64 << 10
EVENTS_MAX: Final = 256
ACCEPTS_IN_A_ROW: Final = 64
BACKLOG: Final = 1024
WAYS_MAX: Final = 4096
HEADS_MAX: Final = 1024
KNOWN_HEAD_MAX_BYTES: Final = 2 << 10

_LENGTH: Final = b"\r\nContent-Length: "
_CONNECTION: Final = b"\r\nX-Connection: "
_CR: Final = 0x0D
_LENGTH_DIGITS_MAX: Final = 8
_CLOSED: Final = getattr(select, "EPOLLHUP", 0) | getattr(select, "EPOLLERR", 0)
_READ: Final = getattr(select, "EPOLLIN", 0)

_ROUTES: Final = {
    b"/api/chat": Route.CHAT,
    b"/api/generate": Route.GENERATE,
    b"/api/embed": Route.EMBED,
    b"/api/embeddings": Route.EMBEDDINGS,
    b"/v1/chat/completions": Route.V1_CHAT,
    b"/v1/completions": Route.V1_COMPLETIONS,
    b"/v1/embeddings": Route.V1_EMBEDDINGS,
    b"/v1/responses": Route.V1_RESPONSES,
    b"/v1/messages": Route.V1_MESSAGES,
}
"""By the literal path, in its one plain spelling."""

_Forward: Final = Forward  # compiled code looks up by name what it imports of other code, but not what is final here

_TO_NODE: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX-Accel-Redirect: @node\r\n"
"""Where nginx goes on with the request, which it keeps; a place in `nginx/router.conf`."""
_TO_COORDINATOR: Final = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n"
_NOT_HERE: Final = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


class Asked:
    """Who asks for what, as the rules of access and history see a client's request. `peer_host`: nginx's own peer."""

    __slots__ = ("fields", "path", "peer_host", "peer_port")

    def __init__(self, peer_host: str, path: str, fields: dict[bytes, bytes]) -> None:
        self.peer_host = peer_host
        self.peer_port = 0
        self.path = path
        self.fields = fields


class _Head:
    """A head but for its body's length and the client's connection, and what follows from it. nginx sends few, each many times.

    `client`: who asks, where that and the permission to ask follow from the head; None: the rules are to be asked.
    """

    __slots__ = ("asked", "client", "explains", "is_post", "route", "target")

    def __init__(self, method: str, target: bytes, fields: dict[bytes, bytes], rules: "Rules") -> None:
        self.target = target
        self.is_post = method == "POST"
        self.route = _ROUTES.get(target)
        self.explains = b"x-explain" in fields
        self.asked = Asked(fields.get(b"x-peer", b"").decode("latin-1"), target.decode("latin-1"), fields)
        self.client = None if self.route is None else rules.lasting_client(self.asked, self.asked)


class Rules(Interface):
    """What the selection asks of `servers.access.Access`."""

    def gate(self, peer: Asked, asked: Asked, /) -> Denied | None: ...

    def client_of(self, peer: Asked, asked: Asked, /) -> str: ...

    def judge_model(self, client: str, model: str | None, /, *, told_once: bool) -> Denied | None: ...

    def lasting_client(self, peer: Asked, asked: Asked, /) -> str | None: ...


class Records(Interface):
    """Who wants to know of requests: `servers.history.History`."""

    def number(self) -> int: ...

    def open(self, request_id: RequestId, peer: Asked, asked: Asked, route: Route, stream: bool, number: int, edge: str, /) -> object: ...


class NodeRow(Fact, frozen=True):
    """A node that nginx may reach; `group` is what both sides call its upstream group."""

    group: str
    host: str
    port: int
    gateway: bool


class Nodes(Fact, frozen=True):
    """What `edge.nginx` needs to know: the answer to `GET /nodes`."""

    secret: str
    tally: str | None
    coordinator: str
    direct: bool
    nodes: list[NodeRow]


class _Way:
    """How nginx reaches a node, as the beginning of an answer."""

    __slots__ = ("agent_id", "direct", "name", "start")

    def __init__(self, agent_id: AgentId, name: str, direct: bool, start: bytes) -> None:
        self.agent_id = agent_id
        self.name = name
        self.direct = direct
        self.start = start


class _Connection:
    """One of nginx's connections. `data`: what came and is not a whole request yet.

    `known`, `head`: the head that came here last, up to its client's connection, as it was sent and as it was read.
    """

    __slots__ = ("_selection", "data", "head", "held", "known", "last", "sock", "unsent")

    def __init__(self, sock: socket.socket, selection: "Selection") -> None:
        self.sock = sock
        self.data = b""
        self.known = b""
        self.head: _Head | None = None
        self.held: Carried | None = None
        self.last: list[Carried] = []
        """Granted requests that were answered last."""
        self.unsent: list[Carried] = []
        """Granted requests whose answers did not get through."""
        self._selection = selection

    def decided(self, carried: Carried, effect: Answer) -> None:
        """The request whose answer was held back has one now."""
        self.held = None
        self.send(self._selection.answer(carried, effect), [carried])

    def send(self, data: bytes, carried: list[Carried]) -> None:
        """Send answers, which must fit into the socket; the loop finds a connection where they did not."""
        self.last = carried
        try:
            if self.sock.send(data) == len(data):
                return
        except OSError:
            pass
        self.unsent += carried
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


def can_select() -> bool:
    """Whether this system has what the endpoint is made of."""
    return hasattr(select, "epoll") and hasattr(socket, "AF_UNIX")


def group_of(upstream: Upstream) -> str:
    """The name of a node's upstream group."""
    return "n_" + sha1(host_of(upstream), usedforsecurity=False).hexdigest()[:12]


def is_address(host: str) -> bool:
    """Whether `host` is an address: nginx looks no names up."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Selection:
    """One per coordinator. `run` it once."""

    def __init__(
        self,
        decider: Decides,
        handover: Handover,
        *,
        rules: Rules,
        new_id: Callable[[], RequestId],
        credential_of: Callable[[AgentId], bytes | None],
        nodes: Callable[[], Nodes],
        report: Callable[[Exception], None],
        aliases: Aliases | None = None,
        records: Records | None = None,
        tally: Tally | None = None,
        direct: bool = False,
    ) -> None:
        self._decider = decider
        self._handover = handover
        self._rules = rules
        self._new_id = new_id
        self._credential_of = credential_of
        self._nodes = nodes
        self._report = report
        self._aliases = aliases or None
        self._records = records
        self._tally = tally
        self._direct = direct
        self._ways: dict[Upstream, _Way | None] = {}
        self._heads: dict[bytes, _Head] = {}
        self._conns: dict[int, _Connection] = {}
        self.decided = 0
        """Requests that nginx was given a node for."""
        self.handed_over = 0

    @property
    def connections(self) -> int:
        """Of nginx, now."""
        return len(self._conns)

    # ------------------------------------------------------------ the loop

    async def run(self, listening: socket.socket, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve a listening, non-blocking socket until cancelled."""
        epoll = select.epoll()
        try:
            epoll.register(listening.fileno(), _READ)
            task_status.started()
            await self._serve(listening, epoll)
        finally:
            epoll.close()
            for conn in self._conns.values():
                conn.sock.close()
            self._conns.clear()

    async def _serve(self, listening: socket.socket, epoll: "select.epoll") -> None:
        conns, tally, table, now = self._conns, self._tally, self._handover.table, time.perf_counter
        fd, accepts = epoll.fileno(), listening.fileno()
        until = now() + TURN_S
        while True:
            events = epoll.poll(0, EVENTS_MAX)
            if not events:
                await wait_readable(fd)
                until = now() + TURN_S
                continue
            if tally is not None and table:
                tally.drain()  # endings make room for who asks, so they come first
            for ready, mask in events:  # all of them, whoever asks again meanwhile
                conn = conns.get(ready)
                if ready == accepts:
                    self._accept(listening, epoll)
                elif conn is not None:
                    self._ready(conn, mask)
                    if now() > until:
                        await checkpoint()
                        until = now() + TURN_S

    def _accept(self, listening: socket.socket, epoll: "select.epoll") -> None:
        for _ in range(ACCEPTS_IN_A_ROW):
            try:
                sock, _peer = listening.accept()
            except OSError:
                return
            sock.setblocking(False)
            self._conns[sock.fileno()] = _Connection(sock, self)
            epoll.register(sock.fileno(), _READ)

    def _ready(self, conn: _Connection, mask: int) -> None:
        """Read what is there, and answer what is whole."""
        try:
            data = conn.sock.recv(RECEIVE_MORE_BYTES if conn.data else RECEIVE_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:  # closed with the answer unread: the client had left
            conn.unsent += conn.last
            data = b""
        except OSError:
            data = b""
        if not data or mask & _CLOSED:
            self._close(conn)
            return
        if conn.held is not None:
            self._close(conn)  # nginx sends nothing before it has its answer
            return
        try:
            self._answer_all(conn, conn.data + data if conn.data else data)
        except HttpError:
            self._close(conn)
        except Exception as error:
            self._report(error)
            self._close(conn)

    def _close(self, conn: _Connection) -> None:
        """It is gone; so is the client whose answer was held back, and whoever did not get one."""
        del self._conns[conn.sock.fileno()]
        conn.sock.close()  # which takes it out of the epoll
        left = [*conn.unsent, conn.held] if conn.held is not None else conn.unsent
        conn.held = None
        for carried in left:
            carried.holder = None
            if self._handover.table.get(carried.request_id) is carried:
                self._handover.settle(carried, _left(carried.request_id))

    def _answer_all(self, conn: _Connection, data: bytes) -> None:
        """Answer each whole request in `data`. Raises HttpError: it cannot be read on."""
        granted: list[Carried] = []
        known, last = conn.known, conn.head
        if last is not None and data[: len(known)] == known:  # nothing else is sent as a rule
            named, begins, length = _rest_of_head(data, len(known))
            if begins and len(data) == begins + length:
                conn.data = b""
                answer = self._decide(conn, last, data[len(known) : named], data[begins:], granted)
                if answer is not None:
                    conn.send(answer, granted)
                return
        out: list[bytes] = []
        try:
            while data:
                end = data.find(b"\r\n\r\n") + 4
                if end < 4:
                    if len(data) > HEAD_MAX_BYTES:
                        raise HttpError(431, "a head that is too long")
                    break
                head, connection, length = self._read_head(conn, data, end)
                if length > BODY_MAX_BYTES:
                    raise HttpError(413, "a body that does not belong here")
                whole = end + length
                if len(data) < whole:
                    break
                body, data = data[end:whole], data[whole:]
                answer = self._decide(conn, head, connection, body, granted)
                if answer is None:
                    if data:
                        raise HttpError(400, "a request before the last one was answered")
                    break
                out.append(answer)
        finally:
            conn.data = data
            if out:
                conn.send(out[0] if len(out) == 1 else b"".join(out), granted)

    def _read_head(self, conn: _Connection, data: bytes, end: int) -> tuple[_Head, bytes | None, int]:
        """The head that ends at `end`, its client's connection, and its body's length. Raises HttpError."""
        at = data.rfind(_LENGTH, 0, end)
        told = data[at + len(_LENGTH) : end - 4] if at > 0 else b""
        key, named = b"", None
        if told.isdigit():  # as nginx writes it: what differs comes last
            cut = data.rfind(_CONNECTION, 0, at)
            if cut > 0 and _CR not in (name := data[cut + len(_CONNECTION) : at]):
                key, named = data[:cut], name
            else:
                key = data[:at]
            known = self._heads.get(key)
            if known is not None and len(told) < 19:
                if named is not None:
                    conn.known, conn.head = key + _CONNECTION, known
                return known, named, int(told)
        head = parse_request_head(data[:end])
        if head.chunked:
            raise HttpError(413, "a body that does not belong here")
        fields = dict(head.fields)
        connection = fields.pop(b"x-connection", None)
        read = _Head(head.method, head.target, fields, self._rules)
        if key and named == connection and b"content-length" not in fields and len(key) <= KNOWN_HEAD_MAX_BYTES:
            if len(self._heads) >= HEADS_MAX:
                self._heads.clear()
            self._heads[key] = read
        return read, connection, head.content_length or 0

    # ------------------------------------------------------------ one request

    def _decide(self, conn: _Connection, head: _Head, connection: bytes | None, body: bytes, granted: list[Carried]) -> bytes | None:
        """The answer; None: it is held back."""
        route, asked, client = head.route, head.asked, head.client
        if not head.is_post:
            return self._tell_nodes() if head.target == b"/nodes" else _NOT_HERE
        if route is None or head.explains:
            return _TO_COORDINATOR
        facts = inspect_ordinary(route, body)
        if facts is None or facts.unload:
            return _TO_COORDINATOR
        model = facts.model
        if self._aliases and self._aliases.models(model):
            return _TO_COORDINATOR
        if client is None:
            rules = self._rules
            client = rules.client_of(asked, asked)
            if rules.judge_model(client, model, told_once=facts.named_once) is not None or rules.gate(asked, asked) is not None:
                return _TO_COORDINATOR  # which says why
        request_id = self._new_id()
        carried = Carried(request_id, route=route, stream=facts.stream, connection=connection)
        if self._records is not None:
            number = self._records.number()
            self._records.open(request_id, asked, asked, route, facts.stream, number, EDGE_NGINX)
        self._handover.add(carried)
        self._decider.apply(facts.came(request_id, route, client, model))
        effect = carried.take_decision()
        if effect is None:
            carried.holder = conn
            conn.held = carried
            return None
        granted.append(carried)
        return self.answer(carried, effect)

    def answer(self, carried: Carried, effect: Answer) -> bytes:
        """What nginx is to do about it."""
        if type(effect) is _Forward:
            lease = effect.lease
            lease_id, agent_id, upstream = lease.id, lease.agent_id, lease.upstream
            carried.forward, carried.lease_id, carried.agent_id = effect, lease_id, agent_id
            way = self._ways.get(upstream)
            if way is None or way.name != lease.agent_name or way.agent_id != agent_id:
                way = self._find_way(lease)
            if way is not None and not effect.unload and effect.model is None and effect.raise_context is None:
                carried.direct = way.direct
                carried.since = self._handover.now()
                if way.direct and self._tally is not None:
                    self._tally.forwarded(carried)
                self.decided += 1
                return way.start + f"{lease_id}\r\nX-Request-Id: {carried.request_id}\r\n\r\n".encode("ascii")
        self.handed_over += 1
        self._handover.hand_over(carried, effect)
        return b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nX-Takeover: %b\r\n\r\n" % carried.request_id.encode("ascii")

    def _find_way(self, lease: Lease) -> _Way | None:
        """How nginx reaches this node; None: it may not, or cannot."""
        if len(self._ways) >= WAYS_MAX:
            self._ways.clear()
        way = self._ways[lease.upstream] = self._make_way(lease.agent_id, lease.agent_name, lease.upstream)
        return way

    def _make_way(self, agent_id: AgentId, name: str, upstream: Upstream) -> _Way | None:
        if upstream.tls or not (upstream.gateway or self._direct) or not is_address(upstream.host):
            return None
        lines = [_TO_NODE, b"X-Upstream: ", host_of(upstream), b"\r\nX-Node: ", safe_value(name)]
        if upstream.gateway and (credential := self._credential_of(agent_id)):
            lines += (b"\r\nX-Credential: ", credential)
        if upstream.base_path:
            lines += (b"\r\nX-Prefix: ", upstream.base_path.rstrip("/").encode("ascii", "replace"))
        return _Way(agent_id, name, not upstream.gateway, b"".join((*lines, b"\r\nX-Lease: ")))

    def _tell_nodes(self) -> bytes:
        body = msgspec.json.encode(self._nodes())
        return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def _rest_of_head(data: bytes, at: int) -> tuple[int, int, int]:
    """Of a head that names its client's connection at `at`, as nginx writes it: where the name ends, where the body begins and how long it
    is said to be. All 0: it is written otherwise."""
    size = len(data)
    named = at
    while named < size and data[named] != _CR:
        named += 1
    first = named + len(_LENGTH)
    if first > size or data[named:first] != _LENGTH:
        return 0, 0, 0
    length, end = 0, first
    while end < size and 0x30 <= data[end] <= 0x39:
        length = length * 10 + data[end] - 0x30
        end += 1
    digits, begins = end - first, end + 4
    if not 0 < digits <= _LENGTH_DIGITS_MAX or length > BODY_MAX_BYTES or data[end:begins] != b"\r\n\r\n":
        return 0, 0, 0
    return named, begins, length


def _left(request_id: RequestId) -> Settled:
    return Settled(request_id=request_id, ending=Ending.CANCELLED, status=499, message="the client left")


def reachable(upstreams: Iterable[Upstream], *, direct: bool) -> list[NodeRow]:
    """Rows of the nodes that nginx may reach, each once."""
    rows: dict[str, NodeRow] = {}
    for upstream in upstreams:
        if not upstream.tls and (upstream.gateway or direct) and is_address(upstream.host):
            group = group_of(upstream)
            rows[group] = NodeRow(group=group, host=upstream.host, port=upstream.port, gateway=upstream.gateway)
    return list(rows.values())
