"""nginx as an edge: which nginx is here, and the files that make it one.

Decides what of the templates in `nginx/` depends on this machine (version, module, user, limits) and on the coordinator (its addresses,
its secret, the nodes). Must never know how nginx is run, or what a request is about. Invariants: the same facts give the same files;
nothing that is not plain enough for nginx's configuration gets into it; a file with the secret in it is its owner's alone.
"""

import os
import pwd
import re
import resource
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import msgspec

from core.errors import ConfigError
from core.events import Protocol, Upstream
from edge.headers import error_body, host_of

TEMPLATES: Final = Path(__file__).parents[1] / "nginx"
"""Beside this package, in a checkout as where the wheel is installed."""
CONFIG: Final = "router.conf"
UNIT: Final = "ollama-router-nginx.service"
FILES_WANTED: Final = 65_536
CONNECTIONS: Final = 16_384
"""For each worker; a stream holds two."""
BACKLOG: Final = 1024
STOP_WITHIN_S: Final = 30
UNIX_PATH_MAX_BYTES: Final = 107
"""What the system takes for the path of a socket."""

DOWN: Final = "the router does not answer; try again in a moment"

_PACKAGE: Final = "apt-get install nginx-light"
_PLACE: Final = re.compile(r"\{\{(\w+)\}\}")
_ODD_IN_PATH: Final = re.compile(r"[\x00-\x1f\"'`$;{}\\#]")
_GROUP: Final = re.compile(r"n_[0-9a-f]{12}")
_SECRET: Final = re.compile(r"[A-Za-z0-9_-]{16,200}")
_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9][A-Za-z0-9._-]*|\*):([0-9]{1,5})")
_HTTP2_DIRECTIVE_SINCE: Final = (1, 25, 1)
_ERRORS: Final = " ".join(str(status) for status in range(400, 600) if status != 499)
"""All that nginx may be told of: 499 is its own, for clients that left."""


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A node that nginx may reach."""

    group: str
    host: str
    port: int
    gateway: bool = False


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the coordinator tells of itself (`GET /nodes` of its selection socket)."""

    secret: str
    coordinator: str
    tally: str | None = None
    direct: bool = False
    nodes: tuple[Node, ...] = ()

    def about_itself(self) -> tuple[object, ...]:
        """Everything but the nodes."""
        return self.secret, self.coordinator, self.tally, self.direct


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What an operator chooses. Raises ConfigError for what nginx could not be told."""

    selection: Path
    listen: tuple[str, ...]
    directory: Path
    tls_cert: Path | None = None
    tls_key: Path | None = None
    workers: int | None = None
    stop_within_s: int = STOP_WITHIN_S

    def __post_init__(self) -> None:
        for path in (self.selection, self.directory, self.tls_cert, self.tls_key):
            if path is not None and _ODD_IN_PATH.search(str(path)):
                raise ConfigError(f"the path {str(path)!r} has a character that nginx's configuration cannot hold; choose another path")
        if len(os.fsencode(self.selection)) > UNIX_PATH_MAX_BYTES:
            raise ConfigError(f"--selection: {self.selection} is longer than {UNIX_PATH_MAX_BYTES} bytes, the most for a socket's path")
        for address in self.listen:
            if (match := _ADDRESS.fullmatch(address)) is None or not 0 < int(match[2]) < 65536:
                raise ConfigError(f"--listen takes ADDRESS:PORT (0.0.0.0:80, [::]:80), not {address!r}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key belong together; give both or none")
        for path in (self.tls_cert, self.tls_key):
            if path is not None and not path.is_file():
                raise ConfigError(f"{path} is not there; --tls-cert and --tls-key name files in PEM format")


@dataclass(frozen=True, slots=True, kw_only=True)
class Nginx:
    """The nginx of this machine."""

    program: str
    version: tuple[int, ...]

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


def look(*, tls: bool = False) -> Nginx:
    """Find nginx, and see that it has what this edge needs. Raises ConfigError with what to install."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/local/sbin")
    if program is None:
        raise ConfigError(f"nginx is not installed: {_PACKAGE}")
    try:
        told = subprocess.run([program, "-V"], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{program} does not start: {error}") from None
    return understand(program, told.stderr, tls=tls)


def understand(program: str, told: str, *, tls: bool = False) -> Nginx:
    """What `nginx -V` told. Raises ConfigError with what to install."""
    match = re.search(r"nginx version: \S+?/(\d+)\.(\d+)\.(\d+)", told)
    if match is None:
        raise ConfigError(f"{program} does not tell its version; is it nginx?")
    for name in ("http_ssl_module", "http_v2_module") if tls else ():
        if f"--with-{name}" not in told:
            raise ConfigError(f"this nginx was built without {name.removeprefix('http_')}; install Debian's ({_PACKAGE}) or nginx.org's")
    for name in ("http_proxy_module", "http_map_module", "http_rewrite_module", "http_upstream_keepalive_module"):
        if f"--without-{name}" in told:
            raise ConfigError(f"this nginx was built without {name.removeprefix('http_')}; install Debian's ({_PACKAGE}) or nginx.org's")
    return Nginx(program=program, version=tuple(int(part) for part in match.groups()))


# ---------------------------------------------------------------- rendering


def render(options: Options, nginx: Nginx, facts: Facts, *, run: str = "python -m edge run") -> dict[str, str]:
    """All files by name. `run`: the command that the systemd unit starts.

    Raises:
        ConfigError: the coordinator said something that no configuration can hold.
    """
    _see_that_plain(facts)
    directory = str(options.directory)
    tls = options.tls_cert is not None
    values = {
        "user": _user(options.selection),
        "workers": "auto" if options.workers is None else str(options.workers),
        "files": str(_files()),
        "connections": str(min(CONNECTIONS, _files() // 2)),
        "dir": directory,
        "secret": facts.secret,
        "listen": ";\n        listen ".join(_listen(address, nginx, tls=tls) for address in options.listen),
        "tls": _tls(options, nginx),
        "errors": _ERRORS,
        "tally": _tally(facts, "$router_lease"),
        "tally_left": _tally(facts, "$router_left"),
        "cuts": _cuts(facts),
        "down": _down(Protocol.NATIVE),
        "down_openai": _down(Protocol.OPENAI),
        "down_anthropic": _down(Protocol.ANTHROPIC),
    }
    files = {name: _fill(name, values) for name in (CONFIG, "coordinator.conf", "refused.conf")}
    files["upstreams.conf"] = _upstreams(options, facts)
    files[UNIT] = _fill(UNIT, {"run": run, "stop_s": str(options.stop_within_s + 5)})
    return files


def write(directory: Path, files: Mapping[str, str]) -> None:
    """Write them, each at once or not at all. Raises ConfigError when the directory cannot be used."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        for name, text in files.items():
            beside = directory / f".{name}.new"
            with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
                file.write(text)
            beside.replace(directory / name)
    except OSError as error:
        raise ConfigError(f"--dir: {directory} cannot be written: {error.strerror or error}") from None


def test(nginx: Nginx, directory: Path) -> str:
    """What nginx says against the files in `directory`; empty when it takes them."""
    command = [nginx.program, "-t", "-q", "-p", str(directory), "-c", str(directory / CONFIG)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=60)
    if done.returncode == 0:
        return ""
    lines = [re.sub(r"^nginx: |^\S+ \S+ (?=\[)", "", line) for line in done.stderr.splitlines() if "[warn]" not in line]
    return next((line for line in lines if "[emerg]" in line), lines[0] if lines else "nginx -t failed without a word")


def _is_address(text: str) -> bool:
    """Whether it is a number rather than a name."""
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


def _see_that_plain(facts: Facts) -> None:
    odd = [text for text in (facts.coordinator, facts.tally) if text and _ADDRESS.fullmatch(text) is None]
    if odd:
        raise ConfigError(f"the coordinator names {odd[0]!r}, which is no address; do its version and this one fit together?")
    if _SECRET.fullmatch(facts.secret) is None:
        raise ConfigError("the coordinator told no secret that can be used; do its version and this one fit together?")


def _fill(name: str, values: Mapping[str, str]) -> str:
    text = (TEMPLATES / name).read_text(encoding="utf-8")
    filled = _PLACE.sub(lambda place: values[place[1]], text)
    return re.sub(r"\n\n\n+", "\n\n", re.sub(r"[ \t]+$", "", filled, flags=re.MULTILINE))


def _user(selection: Path) -> str:
    """Workers that root starts give up its rights; they need those of the socket's owner, who alone may connect to it."""
    if os.geteuid() != 0:
        return ""
    try:
        name = pwd.getpwuid(selection.stat().st_uid).pw_name
    except (OSError, KeyError):
        name = "root"
    return f"user {name};"


def _files() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return FILES_WANTED if hard == resource.RLIM_INFINITY else min(FILES_WANTED, hard)


def _listen(address: str, nginx: Nginx, *, tls: bool) -> str:
    # Without reuseport, connections that come at once often all land at one worker.
    words = [address, f"backlog={BACKLOG}", "reuseport", "so_keepalive=60s:10s:6"]
    if tls:
        words.append("ssl" if nginx.version >= _HTTP2_DIRECTIVE_SINCE else "ssl http2")
    return " ".join(words)


def _tls(options: Options, nginx: Nginx) -> str:
    if options.tls_cert is None or options.tls_key is None:
        return ""
    text = _fill("tls.conf", {"tls_cert": str(options.tls_cert), "tls_key": str(options.tls_key)})
    return text + ("        http2 on;" if nginx.version >= _HTTP2_DIRECTIVE_SINCE else "")


def _tally(facts: Facts, condition: str) -> str:
    """The log that frees leases: a hint, one datagram for each request."""
    if facts.tally is None:
        return ""
    return f"access_log syslog:server={facts.tally},tag=router,nohostname router_tally if={condition};"


def _cuts(facts: Facts) -> str:
    """nginx's errors: in `access_log` an answer that a node broke off looks like an end."""
    if facts.tally is None:
        return ""
    return f"error_log syslog:server={facts.tally},tag=cut,nohostname error;  # that a node broke an answer off is told nowhere else"


def _down(protocol: Protocol) -> str:
    return error_body(protocol, 503, DOWN)[0].decode("ascii").strip()


def _upstreams(options: Options, facts: Facts) -> str:
    groups: dict[str, str] = {}
    for node in facts.nodes:
        if _GROUP.fullmatch(node.group) and 0 < node.port < 65536 and _is_address(node.host):  # nginx looks no names up
            groups[node.group] = host_of(Upstream(host=node.host, port=node.port)).decode("ascii")
    ordered = sorted(groups.items())
    return _fill(
        "upstreams.conf",
        {
            "coordinator": facts.coordinator,
            "selection": str(options.selection),
            "groups": "".join(_fill("node.conf", {"group": group, "address": address}) for group, address in ordered),
            "map_size": str(max(2048, 2 * len(ordered))),
            "group_of": "".join(f"    {address} {group};\n" for group, address in ordered),
        },
    )
