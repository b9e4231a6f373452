"""Whose socket it is, from the kernel's tables: written ones, and this machine's own."""

import ipaddress
import os
import socket
import struct
import sys
from pathlib import Path

import pytest

from servers.peer import own_names, owned_by_us, parse_address, socket_owners

LINUX = sys.platform.startswith("linux")
HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def hexed(address: str, port: int) -> str:
    packed = ipaddress.ip_address(address).packed
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed)) + f":{port:04X}"


def row(local: tuple[str, int], remote: tuple[str, int], *, state: str = "01", uid: int = 1000, inode: int = 4711) -> str:
    return (
        f"   0: {hexed(*local)} {hexed(*remote)} {state} 00000000:00000000 00:00000000 00000000  {uid}        0 {inode} 1 0 20 4 30 10 -1\n"
    )


CLIENT, SERVER = ("127.0.0.1", 40000), ("127.0.0.1", 8080)


def owners(*rows: str, host: str = "127.0.0.1", port: int = 40000) -> list[int]:
    return socket_owners([HEADER, *rows, "garbage\n"], ipaddress.ip_address(host), port, {8080})


def test_the_clients_own_socket_is_found() -> None:
    assert owners(row(SERVER, CLIENT, uid=1), row(CLIENT, SERVER, uid=1000), row(("127.0.0.1", 40001), SERVER, uid=2)) == [1000]


def test_an_ipv4_client_in_an_ipv6_socket_is_found() -> None:
    assert owners(row(("::ffff:127.0.0.1", 40000), ("::ffff:127.0.0.1", 8080), uid=7)) == [7]


def test_an_ipv6_client_is_found() -> None:
    assert owners(row(("::1", 40000), ("::1", 8080), uid=8), host="::1") == [8]


def test_a_socket_with_the_same_port_that_talks_to_somebody_else_does_not_count() -> None:
    assert owners(row(CLIENT, ("127.0.0.1", 9090), uid=0)) == []


def test_a_closed_socket_which_the_kernel_shows_as_roots_does_not_count() -> None:
    assert owners(row(CLIENT, SERVER, state="05", uid=0, inode=0), row(CLIENT, SERVER, state="06", uid=0, inode=0)) == []


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_connection_of_this_process_is_ours_and_a_closed_one_is_not(family: socket.AddressFamily, address: str) -> None:
    with socket.create_server((address, 0), family=family) as server:
        ports = {server.getsockname()[1]}
        with socket.create_connection((address, server.getsockname()[1])) as client:
            host, port = ipaddress.ip_address(address), client.getsockname()[1]
            assert owned_by_us(host, port, ports) is (True if LINUX else None)
            assert owned_by_us(host, port, {1}) is (False if LINUX else None)
        assert owned_by_us(host, port, ports) is (False if LINUX else None)


def test_somebody_elses_socket_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servers.peer.socket_owners", lambda *_: [os.geteuid() + 1])
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("servers.peer.TABLES", (Path(__file__),))
    assert owned_by_us(ipaddress.ip_address("127.0.0.1"), 1, {2}) is False
    monkeypatch.setattr("servers.peer.socket_owners", lambda *_: [0, os.geteuid()])
    assert owned_by_us(ipaddress.ip_address("127.0.0.1"), 1, {2}) is True


def test_where_nothing_is_told_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("servers.peer.TABLES", ())
    assert owned_by_us(ipaddress.ip_address("127.0.0.1"), 1, {2}) is None
    monkeypatch.setattr(sys, "platform", "darwin")
    assert owned_by_us(ipaddress.ip_address("127.0.0.1"), 1, {2}) is None


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1", "10.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"), ("[::1]", "::1"), ("fe80::1%eth0", "fe80::1"), ("gpu1", None),
        ("", None), ("10.0.0.1:80", None),
    ],
)  # fmt: skip
def test_addresses(text: str, address: str | None) -> None:
    assert parse_address(text) == (ipaddress.ip_address(address) if address else None)


def test_this_machine_has_names() -> None:
    assert {"localhost", socket.gethostname().lower()} == own_names()
