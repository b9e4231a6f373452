"""The programs that a measurement runs: nginx as nodes and as the proxy to compare with, the coordinator, and `wrk`.

Decides how each is set up, so that all sides of a comparison serve the same bytes from the same nodes over kept connections.
Knows nothing of what is measured. Invariant: what a `with` block started has ended when it is left.
"""

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHUNKS = 200
"""Lines of one streamed answer."""
READY_WITHIN_S = 20.0
SMALL, STREAM, PACED, IDLE = "small:latest", "stream:latest", "paced:latest", "idle:latest"
PACE_S = 0.002
"""Between two lines of a paced stream."""
NODES = {"small-1": SMALL, "small-2": SMALL, "stream": STREAM, "paced": PACED, "idle-1": IDLE, "idle-2": IDLE}
SLOTS = 1024


def needed(program: str, package: str) -> str:
    """Where `program` is.

    Raises:
        RuntimeError: it is nowhere; one line that says what to install.
    """
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise RuntimeError(f"{program} is needed for this: install it with 'apt-get install {package}'")
    return found


def more_files() -> None:
    """Let this process and what it starts open as many files as thousands of streams need."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(16384, hard), hard))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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
    if model == IDLE:
        return f"default_type application/x-ndjson; {first} echo_sleep 600; echo '{last}';"
    pause = f" echo_sleep {PACE_S};" if model == PACED else ""
    return f"default_type application/x-ndjson; {(first + pause) * (CHUNKS - 1)} echo '{last}';"


def _node(port: int, model: str) -> str:
    row = {
        "name": model, "model": model, "size": 1_000_000_000, "digest": model.encode().hex().ljust(64, "0"),
        "details": {"format": "gguf", "family": "llama", "families": ["llama"], "parameter_size": "1B", "quantization_level": "Q4_K_M"},
    }  # fmt: skip
    tags = json.dumps({"models": [{**row, "modified_at": "2026-01-01T00:00:00Z"}]})
    loaded = json.dumps({"models": [{**row, "size_vram": 1_000_000_000, "expires_at": "2318-01-01T00:00:00Z", "context_length": 4096}]})
    answers = {"/api/tags": tags, "/api/ps": loaded, "/api/version": '{"version":"0.33.0"}'}
    places = "".join(f"location = {path} {{ default_type application/json; return 200 '{body}'; }}\n" for path, body in answers.items())
    return f"server {{ listen 127.0.0.1:{port} backlog=4096; {places} location = /api/chat {{ {_chat(model)} }} }}\n"


def _proxy(port: int, name: str, upstreams: list[int], more: str = "") -> str:
    servers = " ".join(f"server 127.0.0.1:{upstream};" for upstream in upstreams)
    kept = "proxy_http_version 1.1; proxy_set_header Connection '';"
    return (
        f"upstream {name} {{ {servers} keepalive 64; }}\n"
        f"server {{ listen 127.0.0.1:{port} backlog=4096; location / {{ proxy_pass http://{name}; {kept} {more} }} }}\n"
    )


@contextmanager
def _nginx(place: Path, name: str, servers: str, *, workers: int) -> Iterator[None]:
    """nginx with these servers, ready to serve."""
    program = needed("nginx", "nginx-light")
    built = subprocess.run([program, "-V"], capture_output=True, text=True, check=True).stderr
    modules = re.search(r"--modules-path=(\S+)", built)
    echo = Path(modules[1] if modules else "modules") / "ngx_http_echo_module.so"
    if not echo.is_file():
        raise RuntimeError("nginx lacks its echo module: install it with 'apt-get install nginx-light'")
    root = place / name
    root.mkdir()
    temporary = "".join(f"{kind}_temp_path {root}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (root / "nginx.conf").write_text(
        f"load_module {echo};\nuser {os.environ.get('USER') or 'root'};\n" if os.geteuid() == 0 else f"load_module {echo};\n"
    )
    with (root / "nginx.conf").open("a") as config:
        config.write(
            f"worker_processes {workers}; worker_rlimit_nofile 16384; daemon off; pid {root}/pid; error_log {root}/error.log;\n"
            f"events {{ worker_connections 8192; }}\n"
            f"http {{ access_log off; keepalive_requests 100000000; {temporary}\n{servers}}}\n"
        )
    process = subprocess.Popen(
        [program, "-p", str(root), "-c", str(root / "nginx.conf")], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


@dataclass(frozen=True)
class Ports:
    """Where everything listens. `nginx` and `router` serve all models; `direct` is a node itself."""

    nodes: dict[str, int]
    nginx_small: int = field(default_factory=free_port)
    nginx_stream: int = field(default_factory=free_port)
    nginx_paced: int = field(default_factory=free_port)
    router: int = field(default_factory=free_port)

    def of(self, side: str, model: str) -> int:
        """Where `side` (`direct`, `nginx`, `router`) serves `model`."""
        if side == "router":
            return self.router
        if side == "nginx":
            return {SMALL: self.nginx_small, STREAM: self.nginx_stream, PACED: self.nginx_paced}[model]
        return next(port for name, port in self.nodes.items() if NODES[name] == model)


def _wait_for(port: int, path: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """Until `path` on `port` is answered with 200."""
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            break
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=2) as line:
                line.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
                if line.recv(64).startswith(b"HTTP/1.1 200"):
                    return
        except OSError:
            pass
        time.sleep(0.05)
    raise RuntimeError(f"nothing useful answers {path} on port {port}")


@dataclass(frozen=True)
class Bench:
    """All programs, running."""

    ports: Ports
    router: subprocess.Popen[bytes]

    def router_memory_bytes(self) -> int:
        """Resident memory of the coordinator's process."""
        pages = int(Path(f"/proc/{self.router.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def router_cpu_s(self) -> tuple[float, float]:
        """What the coordinator has computed so far, itself and in the kernel, in seconds; all of its threads."""
        told = Path(f"/proc/{self.router.pid}/stat").read_text().rpartition(")")[2].split()
        tick = os.sysconf("SC_CLK_TCK")
        return int(told[11]) / tick, int(told[12]) / tick


@contextmanager
def all_running(place: Path, settings: Mapping[str, str] | None = None) -> Iterator[Bench]:
    """Nodes, plain nginx and the coordinator, the latter with every node ready. `place` is an empty directory; `settings`: more of the
    coordinator's."""
    ports = Ports({name: free_port() for name in NODES})
    nodes = "".join(_node(port, NODES[name]) for name, port in ports.nodes.items())
    small = [ports.nodes["small-1"], ports.nodes["small-2"]]
    proxies = (
        _proxy(ports.nginx_small, "small", small)
        + _proxy(ports.nginx_stream, "stream", [ports.nodes["stream"]], "proxy_buffering off;")
        + _proxy(ports.nginx_paced, "paced", [ports.nodes["paced"]], "proxy_buffering off;")
    )
    backends = ",".join(f"{name}=http://127.0.0.1:{port};slots={SLOTS}" for name, port in ports.nodes.items())
    environ = {
        **os.environ, "ROUTER_HOST": "127.0.0.1", "ROUTER_PORT": str(ports.router), "ROUTER_DATA_DIR": str(place / "data"),
        "OLLAMA_BACKENDS": backends, "ROUTER_LOG_LEVEL": "warning", "ROUTER_QUEUE_PER_CLIENT": "1024",
        **(settings or {}),
    }  # fmt: skip
    with _nginx(place, "nodes", nodes, workers=1), _nginx(place, "proxy", proxies, workers=2):
        for port in ports.nodes.values():
            _wait_for(port, "/api/version")
        with (place / "router.log").open("wb") as log:
            router = subprocess.Popen([sys.executable, "-m", "servers"], env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait_for(ports.router, "/readyz", router)
            yield Bench(ports, router)
        except RuntimeError as error:
            raise RuntimeError(f"{error}\n{(place / 'router.log').read_text()[-2000:]}") from None
        finally:
            router.send_signal(signal.SIGTERM)
            try:
                router.wait(15)
            except subprocess.TimeoutExpired:
                router.kill()
                router.wait()


@dataclass(frozen=True)
class Load:
    """What one run of `wrk` found."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    requests: int


_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0}


def wrk(place: Path, port: int, model: str, *, connections: int, seconds: int) -> Load:
    """Ask `/api/chat` on `port` over kept connections.

    Raises:
        RuntimeError: some answers were not 2xx, or connections broke.
    """
    script = place / f"{model.replace(':', '-')}.lua"
    body = request_body(model).decode()
    script.write_text(f"wrk.method = 'POST'\nwrk.headers['Content-Type'] = 'application/json'\nwrk.body = [[{body}]]\n")
    url = f"http://127.0.0.1:{port}/api/chat"
    command = [needed("wrk", "wrk"), "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "20s", "--latency", "-s", str(script), url]
    said = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    if "Non-2xx" in said or re.search(r"Socket errors: .*(connect|read|write) [1-9]", said):
        raise RuntimeError(f"{url} ({model}) did not serve all requests:\n{said}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", said)
    p50, p99 = (re.search(rf"\s{percent}%\s+([\d.]+)(us|ms|s)", said) for percent in (50, 99))
    requests = re.search(r"(\d+) requests in", said)
    if rate is None or p50 is None or p99 is None or requests is None:
        raise RuntimeError(f"wrk said something else than usual:\n{said}")
    return Load(float(rate[1]), *(float(found[1]) * _UNITS[found[2]] for found in (p50, p99)), requests=int(requests[1]))
