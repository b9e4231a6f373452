"""`ollama-router up`: a coordinator and a node to go with it, on one machine, in one command.

Decides which node: the Ollama that answers at `OLLAMA_API_BASE`, behind an agent of its own, or three simulated ones. Nodes are
processes of their own (rooms apart do not import each other). Invariant: every process that was started here is ended before `run`
returns, on Ctrl-C too: the coordinator first, so that answers can end, then the nodes.
"""

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final

import httpx
import structlog
import trio

from core import fleet
from core.errors import RemoteError
from servers.coordinator import Coordinator
from servers.peer import parse_address
from servers.settings import OLLAMA_PORT, parse_upstream

SIMULATED: Final = ("fast", "medium", "slow")
"""Nodes of the simulated Ollama's demonstration: different speeds and models."""

PROBE_LIMIT_S: Final = 2.0
START_LIMIT_S: Final = 30.0
"""For a simulated node to say where it listens."""

END_LIMIT_S: Final = 10.0
"""For a process to end after it was asked to; then it is killed."""

RESTART_PAUSE_S: Final = 5.0
SETTINGS_WRONG: Final = 2
"""Exit status of an agent that cannot use its settings: starting it again would not help."""

FIRST_MODEL_LIMIT_S: Final = 60.0
FIRST_MODEL_EVERY_S: Final = 0.2
LINE_MAX_BYTES: Final = 4096
_ANNOUNCED: Final = re.compile(r"(\d+) slot\(s\), on (http://[^\s/]+:\d+)")

Say = Callable[[str], None]


async def run(coordinator: Coordinator, environment: Mapping[str, str], say: Say) -> None:
    """Serve with a node until the coordinator was stopped. `say` prints a line for the person at the terminal.

    Raises:
        CannotListen, ConfigError: as `Coordinator.run`, in an exception group.
    """
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_add_nodes, coordinator, environment, say)
        nursery.start_soon(_say_what_works, coordinator, say)
        await coordinator.run()
        nursery.cancel_scope.cancel()


# ---------------------------------------------------------------- nodes


async def _add_nodes(coordinator: Coordinator, environment: Mapping[str, str], say: Say) -> None:
    await coordinator.started.wait()
    url = ollama_url(environment)
    if await ollama_answers(url):
        say(f"Using the Ollama at {url}, behind an agent of its own.")
        await _keep_agent(coordinator, environment, say)
        return
    say(f"No Ollama answers at {url}: starting three SIMULATED nodes instead. They speak Ollama's protocol, but no model")
    say("runs in them: their answers are made-up words. To use real models, start Ollama (or set OLLAMA_API_BASE) and start again.")
    async with trio.open_nursery() as nursery:
        for name in SIMULATED:
            nursery.start_soon(_keep_simulated, coordinator, environment, name, say)


def ollama_url(environment: Mapping[str, str]) -> str:
    """Where this machine's Ollama should be, as its agent sees it."""
    given = environment.get("OLLAMA_API_BASE", "").strip()
    if given:
        return (given if "://" in given else f"http://{given}").rstrip("/")
    return f"http://127.0.0.1:{environment.get('OLLAMA_PORT', '').strip() or OLLAMA_PORT}"


async def ollama_answers(url: str) -> bool:
    """Whether an Ollama answers at `url`."""
    try:
        async with httpx.AsyncClient(timeout=PROBE_LIMIT_S, trust_env=False) as client:
            response = await client.get(url + "/api/version")
            return response.status_code == 200 and "version" in response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, TypeError):
        return False


async def _keep_agent(coordinator: Coordinator, environment: Mapping[str, str], say: Say) -> None:
    """An agent for this machine, started again when it ends by itself."""
    env = {
        "AGENT_API_PORT": "0",
        **environment,
        "ROUTER_URL": own_url(coordinator),
        "ROUTER_JOIN_TOKEN": coordinator.tokens.mint_own_agent_token(),
    }
    while True:
        status = (await _run_child("agent", env=env)).returncode
        if status == SETTINGS_WRONG:
            say("The agent cannot use its settings (see above): the router serves without it.")
            return
        structlog.get_logger().warning("the agent ended; starting it again", status=status, pause_s=RESTART_PAUSE_S)
        await trio.sleep(RESTART_PAUSE_S)


async def _keep_simulated(coordinator: Coordinator, environment: Mapping[str, str], name: str, say: Say) -> None:
    """One simulated node, registered as a node without an agent. It is not started again: a demonstration that dies says so."""
    async with trio.open_nursery() as nursery:
        start = partial(_run_child, "agent.simulated", "--demo", name, env=environment, stdout=subprocess.PIPE)
        child: trio.Process = await nursery.start(start)
        announced = await _announced(child)
        if announced is None:
            say(f"The simulated node {name} did not start.")
            nursery.cancel_scope.cancel()
            return
        try:
            slots, url = announced
            coordinator.add_backend(f"simulated-{name}", parse_upstream(url), slots, simulated=True)
        except RemoteError as error:
            say(f"The simulated node {name} cannot be used: {error}.")
            nursery.cancel_scope.cancel()
            return
        await _drain(child)


async def _announced(child: trio.Process) -> tuple[int, str] | None:
    """Slots and URL in the line that a simulated node prints when it listens."""
    assert child.stdout is not None
    said = b""
    with trio.move_on_after(START_LIMIT_S):
        while len(said) < LINE_MAX_BYTES and (part := await child.stdout.receive_some()):
            said += part
            if b"\n" in said and (found := _ANNOUNCED.search(said.decode("utf-8", "replace"))):
                return int(found[1]), found[2]
    return None


async def _drain(child: trio.Process) -> None:
    """Read and drop the rest of what it prints, so that it never waits for us."""
    assert child.stdout is not None
    while await child.stdout.receive_some():
        pass


async def _run_child(
    module: str,
    *arguments: str,
    env: Mapping[str, str],
    stdout: int | None = None,
    task_status: trio.TaskStatus[trio.Process] = trio.TASK_STATUS_IGNORED,
) -> "subprocess.CompletedProcess[bytes]":
    """Run a module of ours in a process of its own; cancelling ends it. A session of its own keeps Ctrl-C for us to pass on in order."""
    options: dict[str, Any] = {"env": dict(env), "stdout": stdout, "stdin": subprocess.DEVNULL, "check": False}
    if sys.platform != "win32":
        options["start_new_session"] = True
    return await trio.run_process(
        [sys.executable, "-m", module, *arguments], deliver_cancel=_end_process, task_status=task_status, **options
    )


async def _end_process(process: trio.Process) -> None:
    """Ask, wait, kill."""
    try:
        process.terminate()
        await trio.sleep(END_LIMIT_S)
        process.kill()
    except OSError:  # it is gone already
        pass


# ---------------------------------------------------------------- words


def own_url(coordinator: Coordinator) -> str:
    """The coordinator's URL as seen from this machine."""
    address = parse_address(coordinator.settings.host)
    if address is None or address.is_unspecified:
        host = "127.0.0.1" if address is None or address.version == 4 else "[::1]"
        host = coordinator.settings.host if address is None and coordinator.settings.host not in ("", "*") else host
    else:
        host = f"[{address}]" if address.version == 6 else str(address)
    return f"http://{host}:{coordinator.ports[0]}"


async def _say_what_works(coordinator: Coordinator, say: Say) -> None:
    """As soon as a node with a model is there, a command that can be pasted."""
    await coordinator.started.wait()
    url = own_url(coordinator)
    with trio.move_on_after(FIRST_MODEL_LIMIT_S):
        while (model := first_chat_model(coordinator)) is None:  # noqa: ASYNC110 (the router tells nobody)
            await trio.sleep(FIRST_MODEL_EVERY_S)
        say("Ready. Try it:")
        say(f"""  curl {url}/api/chat -d '{{"model":"{model}","messages":[{{"role":"user","content":"Hello"}}]}}'""")
        say(f"  curl {url}/api/agents")
        return
    say(f"The router serves at {url}, but no node has a model that can chat yet: get one with 'ollama pull llama3.2:1b'.")


def first_chat_model(coordinator: Coordinator) -> str | None:
    """A model that can chat and whose name can stand in a shell command; the smallest, which answers soonest."""
    rows = fleet.merged_tags(coordinator.web.driver.router.inventories())
    able = [row for row in rows if "completion" in (row.get("capabilities") or ("completion",))]
    able.sort(key=lambda row: size if isinstance(size := row.get("size"), int) else 0)
    names = [name for row in able if isinstance(name := row.get("name"), str) and re.fullmatch(r"[\w./:-]+", name) and "embed" not in name]
    return names[0] if names else None
