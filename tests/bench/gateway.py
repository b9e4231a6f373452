"""`python -m tests.bench.gateway`: what a request costs an agent's gateway, in processor time of its process.

`wrk` plays nginx: it shows the credential, names each request anew, and says that it is nginx, so that each end is reported; whoever takes
the reports confirms them at once. Behind the gateway is nginx as a node that answers at once. Processor time is what counts, for all
share the cores.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Final

import msgspec
import trio

import native

if __name__ == "__main__":
    native.use()  # before any of it is imported

from agent.endings import Endings
from agent.gateway import Gateway
from core.messages import EndingReports, EndingReportsAnswer
from tests.bench.children import Child, running
from tests.bench.programs import SMALL, STREAM, free_port, more_files, needed, nginx, node, request_body

CREDENTIAL: Final = "bench"
CONNECTIONS: Final = 32
_SCRIPT: Final = """
local number = 0
local fields = {
  ['Host'] = '127.0.0.1', ['Content-Type'] = 'application/json', ['User-Agent'] = 'bench', ['Accept'] = '*/*',
  ['X-Forwarded-For'] = '192.0.2.1', ['X-Ollama-Router-Edge'] = 'nginx', ['X-Ollama-Router-Credential'] = '%s',
}
request = function()
  number = number + 1
  fields['X-Request-Id'] = string.format('00000000-0000-4000-8000-%%012x', number)
  return wrk.format('POST', '/api/chat', fields, [[%s]])
end
"""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one kind of request; medians."""

    model: str
    cpu_us: float
    per_s: float


def measure(place: Path, *, seconds: int, rounds: int) -> list[Figures]:
    """Small answers and streams of 200 chunks, in turns.

    Raises:
        RuntimeError: something did not start, or not every request was answered well.
    """
    found: dict[str, list[tuple[float, float]]] = {SMALL: [], STREAM: []}
    nodes = {model: free_port() for model in found}
    with nginx(place, "nodes", "".join(node([port], model) for model, port in nodes.items()), workers=1, port=nodes[SMALL]):
        for _ in range(rounds):
            for model, port in nodes.items():
                found[model].append(_once(place, model, port, seconds))
    return [
        Figures(model=model, cpu_us=median(cpu for cpu, _ in runs), per_s=median(rate for _, rate in runs)) for model, runs in found.items()
    ]


def _once(place: Path, model: str, node_port: int, seconds: int) -> tuple[float, float]:
    port = free_port()
    script = place / f"gateway-{model.partition(':')[0]}.lua"
    script.write_text(_SCRIPT % (CREDENTIAL, request_body(model).decode()))
    command = [sys.executable, "-m", "tests.bench.gateway", "--serve", f"http://127.0.0.1:{node_port}", str(port)]
    with running(Child("gateway", command, place / "gateway.log"), port=port, path="/healthz") as gateway:
        _wrk(script, port, 1)
        before = gateway.cpu_s()
        requests, rate = _wrk(script, port, seconds)
        return 1e6 * (gateway.cpu_s() - before) / requests, rate


def _wrk(script: Path, port: int, seconds: int) -> tuple[int, float]:
    """Requests, and requests per second."""
    url = f"http://127.0.0.1:{port}/"
    command = [needed("wrk", "wrk"), "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--timeout", "20s", "-s", str(script), url]
    said = subprocess.run(command, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout
    requests, rate = re.search(r"(\d+) requests in", said), re.search(r"Requests/sec:\s+([\d.]+)", said)
    if "Non-2xx" in said or "Socket errors" in said or requests is None or rate is None:
        raise RuntimeError(f"the gateway did not serve all requests:\n{said}")
    return int(requests[1]), float(rate[1])


async def _serve(ollama_url: str, port: int) -> None:
    async def confirm(reports: EndingReports) -> EndingReportsAnswer:
        await trio.lowlevel.checkpoint()
        return EndingReportsAnswer(taken=len(reports.reports))

    gateway, endings = Gateway(ollama_url), Endings(confirm)
    gateway.credential = CREDENTIAL.encode()
    gateway.ended = endings.add
    gateway.listen("127.0.0.1", port)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endings.run)
        await gateway.run()


def main() -> None:
    """Measure, and print a table; with `--serve URL PORT` be the gateway."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway")
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", nargs=2, metavar=("URL", "PORT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve is not None:
        trio.run(_serve, given.serve[0], int(given.serve[1]))
        return
    more_files()
    with tempfile.TemporaryDirectory() as place:
        figures = measure(Path(place), seconds=given.seconds, rounds=given.rounds)
    print("| request | CPU of the gateway | requests /s |\n| --- | ---: | ---: |")
    for found in figures:
        name = "small answer" if found.model == SMALL else "stream of 200 chunks"
        print(f"| {name} | {found.cpu_us:,.0f} µs | {found.per_s:,.0f} |")


if __name__ == "__main__":
    main()
