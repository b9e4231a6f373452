"""Whose process is at the other end of a loopback connection.

Decides nothing: it reads what Linux tells. Elsewhere nothing can be told (None), and the caller goes by the address alone.
Reads a file that grows with the machine's connections: call it from a worker thread.
"""

import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

TABLES: Final = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))


def owned_by_us(host: Address, port: int, our_ports: Collection[int]) -> bool | None:
    """Whether the socket `host:port`, connected to one of our ports, belongs to this process's user or root.

    None: this system does not tell. False also when it is gone already: a closed socket shows root as its owner, whoever it was.
    """
    if not sys.platform.startswith("linux"):
        return None
    owners: list[int] = []
    readable = False
    for table in TABLES:
        try:
            with table.open("r", encoding="ascii") as lines:
                owners += socket_owners(lines, host, port, our_ports)
            readable = True
        except OSError:
            continue
    if not readable:
        return None
    return bool(owners) and all(owner in (0, os.geteuid()) for owner in owners)


def socket_owners(lines: Iterable[str], host: Address, port: int, our_ports: Collection[int]) -> list[int]:
    """User ids of the living sockets `host:port` that are connected to one of `our_ports`, from lines of `/proc/net/tcp` or `tcp6`."""
    wanted = {f"{_as_hex(address)}:{port:04X}" for address in _spellings(host)}
    owners = []
    for line in lines:
        fields = line.split()
        if len(fields) < 10 or fields[1] not in wanted:
            continue
        inode = fields[9]
        if inode != "0" and int(fields[2].rpartition(":")[2], 16) in our_ports:
            owners.append(int(fields[7]))
    return owners


def _spellings(host: Address) -> list[Address]:
    if isinstance(host, ipaddress.IPv4Address):
        return [host, ipaddress.IPv6Address(f"::ffff:{host}")]
    return [host]


def _as_hex(address: Address) -> str:
    """As the kernel prints it: words of 32 bits in the machine's own byte order."""
    words = struct.unpack(f"={len(address.packed) // 4}I", address.packed)
    return "".join(f"{word:08X}" for word in words)


def parse_address(text: str) -> Address | None:
    """`text` as an address, IPv4 out of IPv6 where it is mapped, scope ids dropped; None when it is none."""
    try:
        address = ipaddress.ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def own_names() -> frozenset[str]:
    """Host names under which this machine may be called from itself."""
    return frozenset({"localhost", socket.gethostname().lower()})
