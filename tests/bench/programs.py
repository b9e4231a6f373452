"""nginx as nodes and as the proxy to compare with, and `wrk`.

Decides what each serves, so that all sides of a comparison give the same bytes from the same nodes over kept connections.
Knows nothing of what is measured. Invariant: what a `with` block started has ended when it is left.
"""

import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.children import Child, free_port, more_files, needed, running
from tests.bench.streamer import lists

__all__ = [
    "BURST", "CHUNKS", "PACED", "SMALL", "STREAM", "Load", "free_port", "more_files", "needed", "nginx", "node", "proxy", "request_body",
    "small_answer", "small_node", "wrk",
]  # fmt: skip

CHUNKS = 200
"""Lines of one streamed answer."""
SMALL, STREAM, BURST, PACED = "small:latest", "stream:latest", "burst:latest", "paced:latest"
PACE_S = 0.002
"""Between two lines of a paced stream."""


def request_body(model: str) -> bytes:
    """What every client of a measurement asks."""
    return json.dumps(
        {"model": model, "messages": [{"role": "user", "content": "Why is the sky blue?"}], "stream": model != SMALL}
    ).encode()


def _line(model: str, content: str, **more: Any) -> str:
    message = {"role": "assistant", "content": content}
    return json.dumps(
        {"model": model, "created_at": "2026-01-01T00:00:00.123456789Z", "message": message, **(more or {"done": False})},
        separators=(",", ":"),
    )


_FINAL = {
    "done": True, "done_reason": "stop", "total_duration": 1234567890, "load_duration": 45678901, "prompt_eval_count": 26,
    "prompt_eval_duration": 130079000, "eval_count": 199, "eval_duration": 932710000,
}  # fmt: skip


def small_answer() -> str:
    """What a node says to a request for the small model."""
    return _line(SMALL, "Because of Rayleigh scattering.", **_FINAL)


def _chat(model: str) -> str:
    """The nginx directives that answer `/api/chat` as a node with `model` would."""
    last = _line(model, "", **_FINAL)
    if model == SMALL:
        return f"default_type 'application/json; charset=utf-8'; return 200 '{small_answer()}';"
    first = f"echo '{_line(model, ' sky')}'; echo_flush;"
    pause = f" echo_sleep {PACE_S};" if model == PACED else ""
    return f"default_type application/x-ndjson; {(first + pause) * (CHUNKS - 1)} echo '{last}';"


def node(ports: Iterable[int], model: str) -> str:
    """nginx's configuration of a server that is a node with `model` on each of `ports`."""
    places = "".join(
        f"location = {path.decode()} {{ default_type application/json; return 200 '{body.decode()}'; }}\n"
        for path, body in lists(model).items()
    )
    listens = "".join(f"listen 127.0.0.1:{port} backlog=4096; " for port in ports)
    return f"server {{ {listens}{places} location = /api/chat {{ {_chat(model)} }} }}\n"


def proxy(port: int, name: str, upstreams: Iterable[int], more: str = "") -> str:
    """nginx's configuration of a plain proxy."""
    servers = " ".join(f"server 127.0.0.1:{upstream};" for upstream in upstreams)
    kept = "proxy_http_version 1.1; proxy_set_header Connection '';"
    return (
        f"upstream {name} {{ {servers} keepalive 64; }}\n"
        f"server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ proxy_pass http://{name}; {kept} {more} }} }}\n"
    )


@contextmanager
def nginx(place: Path, name: str, servers: str, *, workers: int, port: int) -> Iterator[Child]:
    """nginx with these servers, ready to serve on `port`."""
    program = needed("nginx", "nginx-light")
    built = subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stderr
    modules = re.search(r"--modules-path=(\S+)", built)
    echo = Path(modules[1] if modules else "modules") / "ngx_http_echo_module.so"
    if not echo.is_file():
        raise RuntimeError("nginx lacks its echo module: install it with 'apt-get install nginx-light'")
    root = place / name
    root.mkdir()
    temporary = "".join(f"{kind}_temp_path {root}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    user = f"user {os.environ.get('USER') or 'root'};\n" if os.geteuid() == 0 else ""
    (root / "nginx.conf").write_text(
        f"load_module {echo};\n{user}"
        f"worker_processes {workers}; worker_rlimit_nofile 20000; daemon off; pid {root}/pid; error_log {root}/error.log;\n"
        f"events {{ worker_connections 16384; }}\n"
        f"http {{ access_log off; keepalive_requests 100000000; {temporary}\n{servers}}}\n"
    )
    child = Child(f"nginx {name}", [program, "-p", str(root), "-c", str(root / "nginx.conf")], root / "output")
    with running(child, port=port):
        yield child


@contextmanager
def small_node(place: Path) -> Iterator[int]:
    """A node that answers every chat with the small model at once; its port. `place` is a directory."""
    port = free_port()
    with nginx(place, "small-node", node([port], SMALL), workers=1, port=port):
        yield port


@dataclass(frozen=True)
class Load:
    """What one run of `wrk` found."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    requests: int = 0
    cpu_us: float = 0.0
    """Processor time per request of what was asked (0: not known)."""
    parts_us: dict[str, float] = field(default_factory=dict)
    """`cpu_us`, program by program."""


_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


def wrk(place: Path, port: int, model: str, *, connections: int, seconds: int, asked: Iterable[Child] = ()) -> Load:
    """Ask `/api/chat` on `port` over kept connections. `asked`: the programs whose processor time is counted.

    Raises:
        RuntimeError: some answers were not 2xx, or connections broke.
    """
    script = place / f"{model.replace(':', '-')}.lua"
    body = request_body(model).decode()
    script.write_text(f"wrk.method = 'POST'\nwrk.headers['Content-Type'] = 'application/json'\nwrk.body = [[{body}]]\n")
    url = f"http://127.0.0.1:{port}/api/chat"
    command = [needed("wrk", "wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", "--latency", "-s", str(script), url]
    children = list(asked)
    before_s = [child.cpu_s() for child in children]
    said = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    taken_s = [child.cpu_s() - before for child, before in zip(children, before_s, strict=True)]
    if "Non-2xx" in said or re.search(r"Socket errors: .*(connect|read|write) [1-9]", said):
        raise RuntimeError(f"{url} ({model}) did not serve all requests:\n{said}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    p50, p99 = (re.search(rf"\s{percent}%\s+([\d.]+)(us|ms|s)", said) for percent in (50, 99))
    count = re.search(r"(\d+) requests in", said)
    if rate is None or count is None or p50 is None or p99 is None:
        raise RuntimeError(f"wrk said something else than usual:\n{said}")
    p50_ms, p99_ms = (float(found[1]) * _UNITS[found[2]] for found in (p50, p99))
    requests = int(count[1])
    parts_us = {child.name: taken * 1e6 / max(1, requests) for child, taken in zip(children, taken_s, strict=True)}
    return Load(float(rate[1]), p50_ms, p99_ms, requests, sum(parts_us.values()), parts_us)
