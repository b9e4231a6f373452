"""How fast the wire classes alone can proxy, against plain nginx to the same node, in one run.

    python -m tests.bench.edge_echo [seconds]

The node is an nginx that answers a constant JSON (small), or a process that streams 200 chunks (stream). No router, no relay: what is
measured is `edge.wire`, `edge.pool` and `edge.headers`. Figures are only comparable within one run.
"""

import contextlib
import os
import re
import selectors
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import trio

from core.events import Upstream
from edge.headers import request_head, response_head
from edge.pool import Pool
from edge.wire import ClientConnection, Watch

CHUNKS = 200
BODY = '{"model":"llama3.2","messages":[{"role":"user","content":"hello there, how are you?"}],"stream":false}'
ANSWER = '{"model":"llama3.2","created_at":"2026-01-01T00:00:00Z","message":{"role":"assistant","content":"fine"},"done":true}'
LINE = b'{"model":"llama3.2","created_at":"2026-01-01T00:00:00.000000Z","message":{"role":"assistant","content":" word"},"done":false}\n'

NGINX = """
worker_processes {workers}; daemon off; pid {dir}/{name}.pid; error_log {dir}/{name}.err;
events {{ worker_connections 4096; }}
http {{ access_log off; client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u;
  scgi_temp_path {dir}/s; keepalive_requests 1000000;
  upstream node {{ server 127.0.0.1:{node}; keepalive 64; keepalive_requests 1000000; }}
  server {{ listen 127.0.0.1:{port} backlog=1024; {what} }} }}
"""
CONSTANT = "location / {{ default_type application/json; return 200 '{answer}'; }}"
PROXY = 'location / { proxy_pass http://node; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }'


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def process(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield child
    finally:
        child.terminate()
        child.wait(10)


def wait_open(port: int) -> None:
    for _ in range(500):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.1):
            return
        trio.run(trio.sleep, 0.01)
    raise SystemExit(f"nothing listens on {port}")


@contextlib.contextmanager
def nginx(where: str, name: str, what: str, *, node: int = 9, workers: int) -> Iterator[int]:
    port = free_port()
    conf = Path(where, name + ".conf")
    conf.write_text(NGINX.format(dir=where, name=name, port=port, node=node, workers=workers, what=what))
    binary = shutil.which("nginx") or "/usr/sbin/nginx"
    with process(binary, "-p", where, "-c", str(conf), "-e", f"{where}/{name}.err"):
        wait_open(port)
        yield port


def stream_node(port: int) -> None:
    """A node that answers each request with a head and `CHUNKS` chunks, ten to a write."""
    chunk = b"%x\r\n%b\r\n" % (len(LINE), LINE)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n"
    burst = chunk * 10
    loop = selectors.DefaultSelector()
    listening = socket.create_server(("127.0.0.1", port), backlog=512)
    loop.register(listening, selectors.EVENT_READ)
    left: dict[socket.socket, int] = {}
    while True:
        for key, _ in loop.select(0 if left else None):
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if sock is listening:
                conn, _ = listening.accept()
                conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                loop.register(conn, selectors.EVENT_READ)
                continue
            try:
                data = sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                loop.unregister(sock)
                left.pop(sock, None)
                sock.close()
            else:
                left[sock] = CHUNKS // 10
        for sock in list(left):
            try:
                sock.sendall((head if left[sock] == CHUNKS // 10 else b"") + burst)
                left[sock] -= 1
                if not left[sock]:
                    sock.sendall(b"0\r\n\r\n")
                    del left[sock]
            except OSError:
                left.pop(sock, None)


async def serve_one(conn: ClientConnection, pool: Pool, node: Upstream) -> None:
    try:
        while head := await conn.read_head():
            body = b""
            while piece := await conn.read_body_some():
                body += piece
            upstream = pool.take(node) or await pool.dial(node)
            with trio.CancelScope() as scope:
                conn.begin(scope)
                await upstream.send(
                    request_head(head, node, request_id="-", body_length=len(body), client_host=conn.peer_host, extra=()) + body
                )
                answer = await upstream.read_head()
                data = response_head(answer, framing=answer.framing, extra=((b"X-Request-Id", b"-"),))
                chunked = answer.framing == "chunked"
                while piece := await upstream.read_some():
                    await conn.send(data + (b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece))
                    data = b""
                if chunked:
                    await conn.send(b"0\r\n\r\n")
                conn.end()
            pool.give_back(upstream)
    except trio.BrokenResourceError:
        pass
    finally:
        conn.close()


async def bare_proxy(port: int, node: int) -> None:
    watch = Watch()
    pool = Pool(watch)
    upstream = Upstream(host="127.0.0.1", port=node)
    listening = socket.create_server(("127.0.0.1", port), backlog=1024)
    listening.setblocking(False)
    async with trio.open_nursery() as nursery:
        await nursery.start(watch.run)
        while True:
            await trio.lowlevel.wait_readable(listening)
            sock, peer = listening.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nursery.start_soon(serve_one, ClientConnection(sock, watch, peer=peer), pool, upstream)


def wrk(port: int, seconds: int, connections: int, where: str) -> tuple[float, str]:
    """(requests per second, p50 latency as wrk writes it)."""
    script = Path(where, "chat.lua")
    script.write_text(f"wrk.method='POST'\nwrk.headers['Content-Type']='application/json'\nwrk.body='{BODY}'\n")
    out = subprocess.run(
        ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script), f"http://127.0.0.1:{port}/api/chat"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rate = re.search(r"Requests/sec:\s+([\d.]+)", out)
    half = re.search(r"\n\s+50%\s+(\S+)", out)
    if rate is None or half is None or "Non-2xx" in out or "Socket errors" in out:
        raise SystemExit(out)
    return float(rate[1]), half[1]


def compare(kind: str, node: int, where: str, seconds: int) -> None:
    me = [sys.executable, "-m", "tests.bench.edge_echo"]
    port = free_port()
    with nginx(where, "plain", PROXY, node=node, workers=2) as plain, process(*me, "proxy", str(port), str(node)):
        wait_open(port)
        for connections in (1, 32):
            direct, direct_p50 = wrk(node, seconds, connections, where)
            reference, plain_p50 = wrk(plain, seconds, connections, where)
            ours, our_p50 = wrk(port, seconds, connections, where)
            print(
                f"{kind} c={connections}: edge {ours:.0f}/s = {ours / reference:.2f} x nginx {reference:.0f}/s (direct {direct:.0f}/s);"
                f" p50 {our_p50}, nginx {plain_p50}, direct {direct_p50}"
            )


def main() -> None:
    if sys.argv[1:2] == ["proxy"]:
        trio.run(bare_proxy, int(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1:2] == ["node"]:
        stream_node(int(sys.argv[2]))
    else:
        seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
        with tempfile.TemporaryDirectory() as where:
            os.chmod(where, 0o755)
            with nginx(where, "node", CONSTANT.format(answer=ANSWER), workers=1) as node:
                compare("small", node, where, seconds)
            port = free_port()
            with process(sys.executable, "-m", "tests.bench.edge_echo", "node", str(port)):
                wait_open(port)
                compare("stream of 200", port, where, seconds)


if __name__ == "__main__":
    main()
