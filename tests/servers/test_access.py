"""Contract 8 as tables: who may enter which area in which mode, and what counts as this machine."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import RemoteError
from core.keys import make_key
from core.units import AgentId
from edge.denied import Denied
from servers import clock
from servers.access import Access, Area, Caller, Standing, check_node_address, folded, is_near, node_host
from servers.peer import parse_address
from servers.settings import Settings, load
from servers.tokens import Tokens

AGENT = AgentId("11111111-1111-4111-8111-111111111111")
ADMIN = "the-admin-token"


class House:
    """Access rules with tokens of every kind. `owned`: what the kernel says of the peer's socket."""

    def __init__(self, settings: Settings | None = None, *, owned: bool | None = True) -> None:
        self.tokens = Tokens(admin_token=ADMIN, join_token=None, fleet_secret="fleet")
        self.tokens_by_name = {
            "none": None,
            "admin": ADMIN,
            "join": self.tokens.mint_join_token(now=clock.unix_ms())[0],
            "agent": self.tokens.mint_agent_token(AGENT),
            "other agent": self.tokens.mint_agent_token(AgentId("other")),
            "wrong": "wrong-token",
        }
        self.access = Access(settings or Settings(), self.tokens, our_ports={8080}, owner_is_ours=lambda *_: owned)

    def caller(self, peer: str, fields: dict[str, str] | None = None, token: str = "none") -> Caller:
        given = {"Host": "localhost:8080", **(fields or {})}
        if (secret := self.tokens_by_name[token]) is not None:
            given["Authorization"] = f"Bearer {secret}"
        return self.access.caller(peer, 40000, folded(list(given.items())))


CALLERS: dict[str, tuple[str, dict[str, str]]] = {
    "loopback": ("127.0.0.1", {}),
    "lan": ("192.168.1.20", {}),
    "public": ("203.0.113.9", {}),
    "forwarded from lan": ("127.0.0.1", {"X-Forwarded-For": "192.168.1.20"}),
    "forwarded from public": ("127.0.0.1", {"X-Forwarded-For": "203.0.113.9"}),
    "forwarded from itself": ("127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}),
    "rebound name": ("127.0.0.1", {"Host": "evil.example:8080"}),
    "other site's script": ("127.0.0.1", {"Origin": "https://evil.example"}),
}

# caller -> per area the tokens that open it in mode auto ("none": open to all). An admin's token opens everything.
AUTO: dict[str, dict[Area, set[str]]] = {
    "loopback": {Area.INFERENCE: {"none"}, Area.MANAGEMENT: {"none"}, Area.AGENT: {"none"}},
    "lan": {Area.INFERENCE: {"none"}, Area.MANAGEMENT: set(), Area.AGENT: {"agent"}},
    "public": {Area.INFERENCE: set(), Area.MANAGEMENT: set(), Area.AGENT: {"agent"}},
    "forwarded from lan": {Area.INFERENCE: {"none"}, Area.MANAGEMENT: set(), Area.AGENT: {"agent"}},
    "forwarded from public": {Area.INFERENCE: set(), Area.MANAGEMENT: set(), Area.AGENT: {"agent"}},
    "forwarded from itself": {Area.INFERENCE: {"none"}, Area.MANAGEMENT: set(), Area.AGENT: {"agent"}},
    "rebound name": {Area.INFERENCE: {"none"}, Area.MANAGEMENT: set(), Area.AGENT: {"agent"}},
    "other site's script": {Area.INFERENCE: {"none"}, Area.MANAGEMENT: set(), Area.AGENT: {"agent"}},
}
REQUIRED: dict[Area, set[str]] = {Area.INFERENCE: set(), Area.MANAGEMENT: set(), Area.AGENT: {"agent"}}
TOKENS = ("none", "admin", "join", "agent", "other agent", "wrong")


async def may(house: House, area: Area, caller: Caller) -> bool:
    refused: RemoteError | None = None
    try:
        await house.access.check(area, caller, agent_id=AGENT)
    except RemoteError as error:
        refused = error
    assert refused is None or refused.status == 401
    assert not any(token and token in str(refused) for token in house.tokens_by_name.values())
    return refused is None


@pytest.mark.parametrize("who", CALLERS)
@pytest.mark.parametrize("mode", ["auto", "required", "off"])
async def test_the_matrix(mode: str, who: str) -> None:
    house = House(Settings(auth=mode))
    for area in (Area.INFERENCE, Area.MANAGEMENT, Area.AGENT):
        opens = {"auto": AUTO[who][area], "required": REQUIRED[area], "off": {"none"}}[mode]
        for token in TOKENS:
            expected = "none" in opens or token in opens or token == "admin"
            peer, fields = CALLERS[who]
            assert await may(house, area, house.caller(peer, fields, token)) is expected, (mode, who, area, token)


# caller and token -> trusted; None: refused
REGISTERING: dict[str, dict[str, dict[str, bool | None]]] = {
    "auto": {
        "loopback": dict.fromkeys(TOKENS, True),
        "lan": {"none": False, "admin": True, "join": True, "agent": False, "other agent": False, "wrong": False},
        "forwarded from itself": {"none": False, "join": True, "wrong": False},
    },
    "required": {
        "loopback": {"none": None, "admin": True, "join": True, "agent": False, "wrong": None},
        "lan": {"none": None, "admin": True, "join": True, "agent": False, "wrong": None},
    },
    "off": {"public": {"none": True, "wrong": True}, "loopback": {"none": True}},
}


@pytest.mark.parametrize(
    ("mode", "who", "token", "trusted"),
    [(mode, who, token, trusted) for mode, rows in REGISTERING.items() for who, row in rows.items() for token, trusted in row.items()],
)
async def test_registering(mode: str, who: str, token: str, trusted: bool | None) -> None:
    house = House(Settings(auth=mode))
    peer, fields = CALLERS[who]
    caller = house.caller(peer, fields, token)
    if trusted is None:
        with pytest.raises(RemoteError) as caught:
            await house.access.check(Area.REGISTERING, caller)
        assert caught.value.status == 401
        return
    known_as = {"agent": AGENT, "other agent": AgentId("other")}.get(token)
    assert await house.access.standing(caller) == Standing(trusted=trusted, local=who == "loopback", known_as=known_as)


async def test_the_agent_that_up_started_is_at_home_wherever_it_calls_from() -> None:
    house = House(Settings(auth="required"))
    house.tokens_by_name["own"] = house.tokens.mint_own_agent_token()
    assert await house.access.standing(house.caller("192.168.1.5", token="own")) == Standing(trusted=True, local=True, known_as=None)


async def test_an_agents_token_opens_only_its_own_calls() -> None:
    house = House()
    caller = house.caller("192.168.1.20", token="agent")
    await house.access.check(Area.AGENT, caller, agent_id=AGENT)
    with pytest.raises(RemoteError):
        await house.access.check(Area.AGENT, caller, agent_id="somebody-else")
    with pytest.raises(RemoteError):
        await house.access.check(Area.AGENT, caller)


@pytest.mark.parametrize("mode", ["auto", "required", "off"])
async def test_who_shows_a_key_is_judged_by_the_key_also_on_this_machine(mode: str) -> None:
    house = House(Settings(auth=mode))
    for name, scopes in (("asks", ("inference",)), ("manages", ("management",))):
        house.tokens_by_name[name] = house.tokens.mint_key(name)
        house.access.keys.add(make_key(key_id=name, name=name, scopes=scopes, now=clock.unix_ms()))
    for name, opens in (("asks", mode == "off"), ("manages", True)):
        caller = house.caller("127.0.0.1", token=name)
        assert house.access.shows_key(caller)
        assert await may(house, Area.MANAGEMENT, caller) is opens
    assert not house.access.shows_key(house.caller("127.0.0.1", token="admin"))


# ---------------------------------------------------------------- this machine


LOCAL: list[tuple[str, dict[str, str], bool | None, bool]] = [
    ("127.0.0.1", {}, True, True),
    ("::1", {"Host": "[::1]:8080"}, True, True),
    ("::ffff:127.0.0.1", {"Host": "127.0.0.1"}, True, True),
    ("127.0.0.1", {"Host": "localhost"}, None, True),
    ("127.0.0.1", {}, False, False),
    ("192.168.1.20", {}, True, False),
    ("127.0.0.1", {"Host": ""}, True, False),
    ("127.0.0.1", {"Host": "localhost.evil.example"}, True, False),
    ("127.0.0.1", {"Host": "127.0.0.1.evil.example:8080"}, True, False),
    ("127.0.0.1", {"Host": "192.168.1.20:8080"}, True, False),
    ("127.0.0.1", {"Origin": "http://localhost:8080"}, True, True),
    ("127.0.0.1", {"Origin": "http://LOCALHOST:8080"}, True, True),
    ("127.0.0.1", {"Origin": "http://localhost:3000"}, True, False),
    ("127.0.0.1", {"Origin": "null"}, True, False),
    ("127.0.0.1", {"Sec-Fetch-Site": "same-origin"}, True, True),
    ("127.0.0.1", {"Sec-Fetch-Site": "cross-site"}, True, False),
    ("127.0.0.1", {"X-Forwarded-For": "127.0.0.1"}, True, False),
    ("127.0.0.1", {"Forwarded": "for=127.0.0.1"}, True, False),
    ("127.0.0.1", {"X-Real-IP": "127.0.0.1"}, True, False),
    ("127.0.0.1", {"X-Forwarded-Proto": "https"}, True, False),
    ("127.0.0.1", {"Via": "1.1 proxy"}, True, False),
    ("", {}, True, False),
]


@pytest.mark.parametrize(("peer", "fields", "owned", "local"), LOCAL)
async def test_what_counts_as_this_machine(peer: str, fields: dict[str, str], owned: bool | None, local: bool) -> None:
    house = House(owned=owned)
    assert await house.access.is_local(house.caller(peer, fields)) is local


FORWARDED: list[tuple[str, str, str, str | None]] = [
    ("127.0.0.1", "203.0.113.9", "loopback", "203.0.113.9"),
    ("127.0.0.1", "127.0.0.1, 203.0.113.9", "loopback", "203.0.113.9"),
    ("127.0.0.1", "10.9.9.9, 203.0.113.9, 127.0.0.1", "loopback", "203.0.113.9"),
    ("10.0.0.2", "203.0.113.9", "loopback", "10.0.0.2"),
    ("10.0.0.2", "203.0.113.9, 10.0.0.3", "10.0.0.0/24", "203.0.113.9"),
    ("127.0.0.1", "203.0.113.9:5555", "loopback", "203.0.113.9"),
    ("127.0.0.1", "[2001:db8::1]:5555", "loopback", "2001:db8::1"),
    ("127.0.0.1", "unknown", "loopback", None),
    ("127.0.0.1", "203.0.113.9, ", "loopback", None),
    ("127.0.0.1", "10.0.0.5", "none", "127.0.0.1"),
]


@pytest.mark.parametrize(("peer", "told", "trusted", "client"), FORWARDED)
def test_the_real_client_is_the_last_one_that_no_trusted_proxy_is(peer: str, told: str, trusted: str, client: str | None) -> None:
    house = House(load({"ROUTER_TRUSTED_PROXIES": trusted}))
    caller = house.caller(peer, {"X-Forwarded-For": told})
    assert caller.address == (parse_address(client) if client else None)
    assert not caller.from_loopback


@given(st.lists(st.ip_addresses().map(str) | st.text(max_size=8), max_size=5), st.sampled_from(["127.0.0.1", "10.0.0.2", "203.0.113.1"]))
def test_no_forwarding_header_makes_a_caller_local_or_a_public_peer_near(told: list[str], peer: str) -> None:
    house = House()
    caller = house.caller(peer, {"X-Forwarded-For": ", ".join(told)})
    assert not caller.from_loopback
    if peer == "203.0.113.1":
        assert not is_near(caller.address)


def test_repeated_headers_are_judged_together() -> None:
    house = House()
    fields = folded([("Host", "localhost"), ("X-Forwarded-For", "203.0.113.9"), ("X-Forwarded-For", "127.0.0.1")])
    assert house.access.caller("127.0.0.1", 1, fields).address == parse_address("203.0.113.9")


@pytest.mark.parametrize(
    ("address", "near"),
    [
        ("127.9.9.9", True), ("10.1.2.3", True), ("172.16.0.1", True), ("172.32.0.1", False), ("192.168.0.1", True), ("169.254.1.1", True),
        ("100.64.0.1", True), ("100.128.0.1", False), ("8.8.8.8", False), ("192.0.2.1", False), ("::1", True), ("fe80::1", True),
        ("fd12::1", True), ("2001:db8::1", False), ("2606:4700::1", False),
    ],
)  # fmt: skip
def test_near_addresses(address: str, near: bool) -> None:
    assert is_near(parse_address(address)) is near


# ---------------------------------------------------------------- the gate


class Conn:
    peer_port = 40000

    def __init__(self, peer_host: str) -> None:
        self.peer_host = peer_host


class Head:
    def __init__(self, **fields: str) -> None:
        self.fields = folded([(name.replace("_", "-"), value) for name, value in fields.items()])


def gate(settings: Settings, peer: str, **fields: str) -> Denied | None:
    conn: Any = Conn(peer)
    head: Any = Head(**fields)
    access = House(settings).access
    assert access.gate(conn, head) == access.gate(conn, head)
    return access.gate(conn, head)


def test_the_gate_lets_a_lan_in_and_asks_the_world_for_a_key() -> None:
    assert gate(Settings(), "192.168.1.20") is None
    denied = gate(Settings(), "203.0.113.9")
    assert denied is not None
    assert (denied.status, denied.headers) == (401, ((b"WWW-Authenticate", b"Bearer"),))
    assert gate(Settings(), "203.0.113.9", authorization=f"bearer {ADMIN}") is None
    assert gate(Settings(), "203.0.113.9", x_api_key=ADMIN) is None
    assert gate(Settings(), "203.0.113.9", authorization="Bearer wrong") is not None
    assert gate(Settings(), "203.0.113.9", authorization=f"Basic {ADMIN}") is not None


def test_the_gate_sees_through_a_proxy() -> None:
    assert gate(Settings(), "127.0.0.1", x_forwarded_for="203.0.113.9") is not None
    assert gate(Settings(), "127.0.0.1", x_forwarded_for="192.168.1.9") is None
    assert gate(Settings(), "127.0.0.1", via="1.1 proxy") is not None


def test_the_gate_asks_everyone_when_keys_are_required_and_nobody_when_off() -> None:
    for settings in (Settings(auth="required"), Settings(require_api_key=True), Settings(auth="off", require_api_key=True)):
        assert gate(settings, "127.0.0.1") is not None
        assert gate(settings, "127.0.0.1", x_api_key=ADMIN) is None
    assert gate(Settings(auth="off"), "203.0.113.9") is None


def test_the_gates_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servers.access.NEAR_CACHE_MAX", 2)
    access = House().access
    head: Any = Head()
    for last in range(5):
        conn: Any = Conn(f"10.0.0.{last}")
        assert access.gate(conn, head) is None
    assert len(access._near) <= 2


@pytest.mark.parametrize(
    ("peer", "fields", "client"),
    [
        ("192.168.1.20", {}, "192.168.1.20"),
        ("127.0.0.1", {"x_forwarded_for": "203.0.113.9"}, "203.0.113.9"),
        ("127.0.0.1", {"via": "1.1 x"}, "127.0.0.1"),
        ("127.0.0.1", {"x_openwebui_user_id": "u1", "x_forwarded_for": "203.0.113.9"}, "user:u1"),
        ("192.168.1.20", {"x_openwebui_user_id": "u1"}, "192.168.1.20"),
    ],
)
def test_clients_queue_under_their_own_name(peer: str, fields: dict[str, str], client: str) -> None:
    conn: Any = Conn(peer)
    head: Any = Head(**fields)
    assert House().access.client_of(conn, head) == client


@pytest.mark.parametrize(
    ("peer", "fields", "client"),
    [
        ("192.168.1.20", {}, "192.168.1.20"),
        ("127.0.0.1", {"x_openwebui_user_id": "u1", "x_forwarded_for": "10.0.0.9"}, "user:u1"),
        ("127.0.0.1", {"x_forwarded_for": "10.0.0.9"}, "10.0.0.9"),
        ("192.168.1.20", {"authorization": "Bearer x"}, None),
        ("192.168.1.20", {"x_api_key": "x"}, None),
        ("203.0.113.9", {}, None),
        ("key:k", {}, None),
    ],
)
def test_who_is_judged_once_for_all(peer: str, fields: dict[str, str], client: str | None) -> None:
    conn: Any = Conn(peer)
    head: Any = Head(**fields)
    access = House().access
    assert access.lasting_client(conn, head) == client
    if client is not None:
        assert (access.gate(conn, head), access.client_of(conn, head)) == (None, client)


# ---------------------------------------------------------------- where nodes may be


LAN = Caller(parse_address("192.168.1.20"), 1, parse_address("192.168.1.20"), forwarded=False, ours=True, token=None)
HERE = replace(LAN, peer=parse_address("127.0.0.1"), address=parse_address("127.0.0.1"))


@pytest.mark.parametrize(
    ("claimed", "caller", "host"),
    [
        ("192.168.1.30", LAN, "192.168.1.30"),
        ("10.8.0.2", LAN, "10.8.0.2"),
        ("::ffff:10.8.0.2", LAN, "10.8.0.2"),
        ("fd00::5", LAN, "fd00::5"),
        ("0.0.0.0", LAN, "192.168.1.20"),
        ("", LAN, "192.168.1.20"),
        ("127.0.0.1", LAN, "192.168.1.20"),
        ("::1", LAN, "192.168.1.20"),
        ("127.0.0.1", HERE, "127.0.0.1"),
        ("0.0.0.0", HERE, "127.0.0.1"),
    ],
)
def test_a_node_is_dialled_where_it_says_or_where_it_called_from(claimed: str, caller: Caller, host: str) -> None:
    assert node_host(claimed, caller) == host


@pytest.mark.parametrize(
    ("claimed", "caller", "status"),
    [
        ("gpu1", LAN, 400),
        ("169.254.169.254", LAN, 422),
        ("169.254.169.254", HERE, 422),
        ("::ffff:169.254.169.254", LAN, 422),
        ("100.100.100.200", LAN, 422),
        ("fd00:ec2::254", LAN, 422),
        ("fe80::1", LAN, 422),
        ("224.0.0.1", LAN, 422),
        ("255.255.255.255", LAN, 422),
        ("64:ff9b::a9fe:a9fe", LAN, 422),
        ("0.0.0.0", replace(LAN, address=None), 422),
        ("127.0.0.1", replace(HERE, forwarded=True, address=parse_address("127.0.0.1")), 422),
    ],
)
def test_nobody_aims_the_coordinator_at_something_else(claimed: str, caller: Caller, status: int) -> None:
    with pytest.raises(RemoteError) as caught:
        node_host(claimed, caller)
    assert caught.value.status == status


def test_loopback_is_an_address_of_nodes_when_an_admin_says_so() -> None:
    loopback = parse_address("127.0.0.1")
    assert loopback is not None
    check_node_address(loopback)
