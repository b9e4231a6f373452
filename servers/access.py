"""Who may do what (contract 8): modes `auto`, `required`, `off`; areas inference, management, registering, an agent's own calls.

Decides from the peer's address, what forwarded it, Host and Origin, the owner of the peer's socket, and tokens. Knows no route and no
router. Invariants: a forwarded caller is never local, whoever forwards; whatever cannot be told is decided against the caller, except
the socket's owner where the system does not tell it; nothing here logs or returns a token.
"""

import enum
import ipaddress
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final

import trio

from core.errors import RemoteError
from core.events import Record
from core.keys import INFERENCE, MANAGEMENT, Keys, Refusal
from core.units import AgentId
from edge.denied import Asks, Denied, Peer
from edge.proxy import KEYED
from servers import clock
from servers.peer import Address, own_names, owned_by_us, parse_address
from servers.settings import Settings
from servers.tokens import Tokens

FORWARDING: Final = frozenset({b"x-forwarded-for", b"forwarded", b"x-real-ip", b"x-forwarded-host", b"x-forwarded-proto", b"via"})
"""Any of these says that the peer speaks for somebody else."""

FORWARDED_MAX: Final = 50
"""Entries of `X-Forwarded-For` that are looked at."""

USER_HEADER: Final = b"x-openwebui-user-id"
CLIENT_NAME_MAX: Final = 200
NEAR_CACHE_MAX: Final = 10_000

_NEAR: Final = tuple(
    map(
        ipaddress.ip_network,
        ("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10", "::1", "fe80::/10", "fc00::/7"),
    )
)
_METADATA: Final = frozenset(map(ipaddress.ip_address, ("169.254.169.254", "100.100.100.200", "192.0.0.192", "fd00:ec2::254")))
"""Where clouds tell machines their secrets."""

ADMIN_NEEDED: Final = (
    "this needs the admin token: call from the coordinator's own machine and user, "
    "or send 'Authorization: Bearer <token>' (the token lies in the file admin-token of the coordinator's data directory)"
)
KEY_NEEDED: Final = "an API key is required: send it as 'Authorization: Bearer <key>' or 'x-api-key: <key>'"
KEY_WRONG: Final = "the API key is not valid"
KEY_NOT_FOR_THIS: Final = "the API key has expired, or is not made for asking models: ask for another one"
JOIN_NEEDED: Final = (
    "registering needs a join token: make one with 'ollama-router token join' on the coordinator "
    "and give it to the agent as ROUTER_JOIN_TOKEN"
)
JOIN_WRONG: Final = "the join token is unknown or has expired: make a new one with 'ollama-router token join' on the coordinator"
AGENT_NEEDED: Final = "this needs the agent's own token: register again to get one"


class Area(enum.Enum):
    """What a route is about, as far as access is concerned."""

    INFERENCE = "inference"
    MANAGEMENT = "management"
    REGISTERING = "registering"
    AGENT = "agent"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls. `address`: the real client, None when a proxy did not tell. `ours`: Host and Origin are this machine's own."""

    peer: Address | None
    peer_port: int
    address: Address | None
    forwarded: bool
    ours: bool
    token: str | None

    @property
    def from_loopback(self) -> bool:
        """The connection comes from this machine and nothing says that it was forwarded."""
        return self.peer is not None and self.peer.is_loopback and not self.forwarded


@dataclass(frozen=True, slots=True)
class Standing:
    """What a registering caller is to us."""

    trusted: bool
    local: bool
    known_as: AgentId | None


class Access:
    """The rules of one coordinator. `our_ports`: where it listens; may grow until serving begins."""

    def __init__(
        self,
        settings: Settings,
        tokens: Tokens,
        *,
        our_ports: Collection[int],
        keys: Keys | None = None,
        owner_is_ours: Callable[[Address, int, Collection[int]], bool | None] = owned_by_us,
    ) -> None:
        self._mode = settings.auth
        self._key_needed = settings.auth == "required" or settings.require_api_key
        self._trusted = settings.trusted_proxies
        self._tokens = tokens
        self._our_ports = our_ports
        self._owner_is_ours = owner_is_ours
        self._own_names = own_names()
        self._near: dict[str, bool] = {}
        self.keys = Keys() if keys is None else keys

    # ------------------------------------------------------------ the hot path: forwarded routes

    def gate(self, conn: Peer, head: Asks) -> Denied | None:
        """Whether this inference request may be served; None: it may. A request with an API key is counted as one of the key's."""
        fields = head.fields
        if (b"authorization" in fields or b"x-api-key" in fields) and self.keys:
            key_id = self._key_of(fields)
            if key_id is not None:
                return self._admitted(key_id)
        if self._mode == "off" and not self._key_needed:
            return None
        near = self._near.get(conn.peer_host)
        if near is None:
            near = self._judge(conn.peer_host)
        if near and not self._key_needed and FORWARDING.isdisjoint(fields):
            return None
        return self._inference(self.caller(conn.peer_host, conn.peer_port, fields))

    def judge_model(self, client: str, model: str | None, *, told_once: bool) -> Denied | None:
        """Whether the rules about models of `client` (as `client_of` names it) let it reach `model`: the name that the node will see."""
        if not client.startswith(KEYED):
            return None
        return _refused(self.keys.judge_model(client[len(KEYED) :], model, told_once=told_once))

    def spent(self, record: Record) -> None:
        """A request that came with an API key is over: what it used counts for that."""
        if (usage := record.usage) is not None:
            key_id = record.client[len(KEYED) :]
            self.keys.spend(key_id, prompt_tokens=usage.prompt_tokens, output_tokens=usage.output_tokens, now=clock.unix_ms())

    def client_of(self, conn: Peer, head: Asks) -> str:
        """The name under which a caller's requests queue: its API key, else the user that a trusted proxy names, else its address."""
        fields = head.fields
        if (b"authorization" in fields or b"x-api-key" in fields) and self.keys:
            key_id = self._key_of(fields)
            if key_id is not None:
                return KEYED + key_id
        if USER_HEADER in fields and self._is_trusted(parse_address(conn.peer_host)):
            return "user:" + fields[USER_HEADER][:CLIENT_NAME_MAX].decode("utf-8", "replace")
        return conn.peer_host if FORWARDING.isdisjoint(fields) else self.address_of(conn, head)

    def lasting_client(self, conn: Peer, head: Asks) -> str | None:
        """`client_of`, where that and the permission follow from this head and the settings alone; None: ask for each request."""
        if b"authorization" in head.fields or b"x-api-key" in head.fields or self.gate(conn, head) is not None:
            return None
        client = self.client_of(conn, head)
        return None if client.startswith(KEYED) else client

    def address_of(self, conn: Peer, head: Asks) -> str:
        """The real client's address, as far as trusted proxies tell it."""
        fields = head.fields
        if FORWARDING.isdisjoint(fields):
            return conn.peer_host
        return str(self._real_client(parse_address(conn.peer_host), fields) or conn.peer_host)

    def _judge(self, host: str) -> bool:
        if len(self._near) >= NEAR_CACHE_MAX:
            self._near.clear()
        near = self._near[host] = is_near(parse_address(host))
        return near

    def _inference(self, caller: Caller) -> Denied | None:
        if self._mode == "off" and not self._key_needed:
            return None
        if not self._key_needed and is_near(caller.address):
            return None
        if caller.token is None:
            return _denied(KEY_NEEDED)
        return None if self._tokens.is_admin(caller.token) or self._opens(caller.token, INFERENCE) else _denied(KEY_WRONG)

    def _key_of(self, fields: Mapping[bytes, bytes]) -> str | None:
        token = _token(fields)
        return None if token is None else self._tokens.key_of(token)

    def _admitted(self, key_id: str) -> Denied | None:
        now = clock.unix_ms()
        return _refused(self.keys.admit(key_id, now=now)) if self.keys.opens(key_id, INFERENCE, now=now) else _denied(KEY_NOT_FOR_THIS)

    def _opens(self, token: str, scope: str) -> bool:
        key_id = self._tokens.key_of(token)
        return key_id is not None and self.keys.opens(key_id, scope, now=clock.unix_ms())

    # ------------------------------------------------------------ everything else

    def caller(self, peer_host: str, peer_port: int, fields: Mapping[bytes, bytes]) -> Caller:
        """Who calls, from the connection and the request's folded header fields."""
        peer = parse_address(peer_host)
        forwarded = not FORWARDING.isdisjoint(fields)
        return Caller(
            peer=peer,
            peer_port=peer_port,
            address=self._real_client(peer, fields) if forwarded else peer,
            forwarded=forwarded,
            ours=self._is_ours(fields),
            token=_token(fields),
        )

    async def check(self, area: Area, caller: Caller, *, agent_id: str | None = None) -> None:
        """Let `caller` into `area`. `agent_id`: for the area AGENT, whose calls these are.

        Raises:
            RemoteError: 401, with what to do about it.
        """
        if area is Area.INFERENCE:
            if (denial := self._inference(caller)) is not None:
                raise RemoteError(denial.text, status=denial.status)
        elif area is Area.REGISTERING:
            await self.standing(caller)
        elif not await self.allows(area, caller, agent_id):
            raise RemoteError(AGENT_NEEDED if area is Area.AGENT else ADMIN_NEEDED, status=401)

    def shows_key(self, caller: Caller) -> bool:
        """Whether `caller` shows an API key, of whatever scope."""
        return caller.token is not None and self._tokens.key_of(caller.token) is not None

    async def allows(self, area: Area, caller: Caller, agent_id: str | None = None) -> bool:
        """Whether `caller` may enter an area that is for admins, or for the agent of that id.

        Who shows an API key is judged by the key, on this machine too: a program that was given a limited key is not to do more with it
        because of where it runs.
        """
        if self._mode == "off":
            return True
        if caller.token is not None:
            if self._tokens.is_admin(caller.token) or self._opens(caller.token, MANAGEMENT):
                return True
            if area is Area.AGENT and agent_id is not None and self._tokens.agent_of(caller.token) == agent_id:
                return True
            if self.shows_key(caller):
                return False
        return self._mode == "auto" and await self.is_local(caller)

    async def standing(self, caller: Caller) -> Standing:
        """What a caller that registers a node is to us.

        Raises:
            RemoteError: 401, it shows a join token that is none, or needs one.
        """
        local = (caller.token is not None and self._tokens.is_own_agent(caller.token)) or await self.is_local(caller)
        known_as = self._tokens.agent_of(caller.token) if caller.token is not None else None
        if self._mode == "off":
            return Standing(trusted=True, local=local, known_as=known_as)
        joins = caller.token is not None and (
            self._tokens.may_join(caller.token, now=clock.unix_ms())
            or self._tokens.is_admin(caller.token)
            or self._tokens.is_own_agent(caller.token)
        )
        if joins or (local and self._mode == "auto"):
            return Standing(trusted=True, local=local, known_as=known_as)
        if known_as is not None:
            return Standing(trusted=False, local=local, known_as=known_as)
        if self._mode == "required":
            raise RemoteError(JOIN_NEEDED if caller.token is None else JOIN_WRONG, status=401)
        return Standing(trusted=False, local=local, known_as=None)

    async def is_local(self, caller: Caller) -> bool:
        """The loopback rule: this machine, not forwarded, Host and Origin ours, a process of our user or root."""
        if not (caller.from_loopback and caller.ours) or caller.peer is None:
            return False
        owned = await trio.to_thread.run_sync(self._owner_is_ours, caller.peer, caller.peer_port, self._our_ports)
        return owned is not False

    # ------------------------------------------------------------ inside

    def _is_trusted(self, address: Address | None) -> bool:
        return address is not None and any(address.version == network.version and address in network for network in self._trusted)

    def _real_client(self, peer: Address | None, fields: Mapping[bytes, bytes]) -> Address | None:
        """The last address in `X-Forwarded-For` that no trusted proxy is; the peer itself when it is not trusted to tell."""
        if not self._is_trusted(peer):
            return peer
        told = fields.get(b"x-forwarded-for", b"").decode("ascii", "replace").split(",")[-FORWARDED_MAX:]
        client: Address | None = None
        for entry in reversed(told):
            client = _without_port(entry.strip())
            if client is None or not self._is_trusted(client):
                return client
        return client

    def _is_ours(self, fields: Mapping[bytes, bytes]) -> bool:
        """DNS rebinding and other sites' scripts: the page must have been loaded from here under a name of this machine."""
        host = fields.get(b"host", b"").decode("ascii", "replace").lower()
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        address = parse_address(name)
        if not (name in self._own_names or (address is not None and address.is_loopback)):
            return False
        origin = fields.get(b"origin")
        if origin is not None and origin.decode("ascii", "replace").lower() not in (f"http://{host}", f"https://{host}"):
            return False
        return fields.get(b"sec-fetch-site", b"none") in (b"none", b"same-origin")


def _denied(text: str) -> Denied:
    return Denied(status=401, text=text, headers=((b"WWW-Authenticate", b"Bearer"),))


def _refused(refusal: Refusal | None) -> Denied | None:
    """What a key's refusal looks like on the wire."""
    if refusal is None:
        return None
    if refusal.status == 401:
        return _denied(refusal.text)
    wait = refusal.retry_after_s
    return Denied(status=refusal.status, text=refusal.text, headers=() if wait is None else ((b"Retry-After", b"%d" % wait),))


def is_near(address: Address | None) -> bool:
    """Whether Ollama on a LAN would expect this address: loopback, private, link-local, unique-local, 100.64/10."""
    return address is not None and any(address.version == network.version and address in network for network in _NEAR)


def node_host(claimed: str, caller: Caller) -> str:
    """Where a node is dialled that says it is at `claimed`: there, when it is an address that may be; else where it called from.

    Behind NAT the claimed address is the one in the node's own network; it is used as it is, for only there (a VPN, a shared LAN) the
    node can be dialled at all: the caller's address is the router box, which does not listen. Loopback, unspecified or no address from
    another machine is taken for ignorance, and the caller's address is used.

    Raises:
        RemoteError: 422, the address cannot be a node's; 400, it is no address.
    """
    address = parse_address(claimed)
    if address is None and claimed.strip():
        raise RemoteError("ip_address must be an IPv4 or IPv6 address, such as 192.168.1.100", status=400)
    if address is None or address.is_unspecified or (address.is_loopback and not caller.from_loopback):
        address = caller.address
    if address is None:
        raise RemoteError("the caller's address is not known: register with the ip_address that the coordinator can reach", status=422)
    if address.is_loopback and not caller.from_loopback:
        raise RemoteError(f"the address {address} means the coordinator's machine, but the caller is another one", status=422)
    check_node_address(address)
    return str(address)


def check_node_address(address: Address) -> None:
    """Whether anything that serves models can be at `address`, so that nobody aims the coordinator at something else.

    Raises:
        RemoteError: 422.
    """
    if address in _METADATA or address.is_link_local or address.is_multicast or address.is_unspecified:
        raise RemoteError(f"the address {address} cannot be a node's: it is a link-local, metadata or multicast address", status=422)
    if address.is_reserved and not address.is_loopback:
        raise RemoteError(f"the address {address} cannot be a node's: it is reserved", status=422)


def _without_port(entry: str) -> Address | None:
    """`1.2.3.4`, `1.2.3.4:80`, `::1` or `[::1]:80`."""
    if entry.startswith("["):
        entry = entry[1:].partition("]")[0]
    elif entry.count(":") == 1:
        entry = entry.partition(":")[0]
    return parse_address(entry)


def _token(fields: Mapping[bytes, bytes]) -> str | None:
    scheme, _, credentials = fields.get(b"authorization", b"").partition(b" ")
    token = credentials.strip() if scheme.lower() == b"bearer" else fields.get(b"x-api-key", b"").strip()
    return token.decode("utf-8", "surrogateescape") or None


def folded(headers: Collection[tuple[str, str]]) -> dict[bytes, bytes]:
    """Header pairs as `RequestHead.fields` has them: lower-case names, repeated ones joined with a comma."""
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        key, data = name.lower().encode("latin-1", "replace"), value.encode("latin-1", "replace")
        fields[key] = fields[key] + b", " + data if key in fields else data
    return fields
