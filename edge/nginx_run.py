"""nginx beside the coordinator: started, told of changes, reloaded, stopped.

Decides when nginx gets new files: at once where the coordinator's own address or secret is new or a node came, never sooner than
`RELOAD_EVERY_S` after the last time, and not for a node that went (its group harms nobody, and it may come back). Must never know what a
request is. Invariants: files that nginx refuses are taken back and not tried again until something changes; a reload cuts no stream,
for the old workers end by themselves; no signal reaches an nginx that cannot read it yet, and none is lost while it starts; nginx has
ended when `run` returns.
"""

import errno
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import httpx
import msgspec
import trio

from core.errors import ConfigError
from edge import nginx as files
from edge.nginx import Facts, Nginx, Options

FOLLOW_EVERY_S: Final = 2.0
RELOAD_EVERY_S: Final = 5.0
ASK_WITHIN_S: Final = 5.0
LOOK_EVERY_S: Final = 0.01
"""Whether nginx serves yet."""
SAID_AGAIN_S: Final = 60.0
"""What stays wrong is said again after so long."""
FACTS: Final = "facts.json"
"""The last facts, so that nginx can start while the coordinator is away."""


class Away(Exception):
    """The coordinator does not answer; the text says why."""


async def ask(selection: Path) -> Facts:
    """What the coordinator tells of itself.

    Raises:
        Away: it does not answer.
        ConfigError: it says something else than this version understands.
    """
    transport = httpx.AsyncHTTPTransport(uds=str(selection), verify=False)  # no TLS here: else each poll reads all certificates, 25 ms
    try:
        async with httpx.AsyncClient(transport=transport, trust_env=False, timeout=ASK_WITHIN_S) as client:
            answer = await client.get("http://selection/nodes")
    except PermissionError:
        raise Away("this user may not use the socket") from None
    except (httpx.HTTPError, OSError) as error:
        raise Away(_why(selection, error)) from None
    if answer.status_code != 200:
        raise Away(f"it answers {answer.status_code}")
    try:
        return msgspec.json.decode(answer.content, type=Facts)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"the coordinator at {selection} is of another version: {error}") from None


def _why(selection: Path, error: Exception) -> str:
    if not selection.exists():
        return "there is no such socket"
    return str(error) or type(error).__name__


def saved(directory: Path) -> Facts | None:
    """The facts of the last time."""
    try:
        return msgspec.json.decode((directory / FACTS).read_bytes(), type=Facts)
    except (OSError, msgspec.MsgspecError):
        return None


def work_in_batches() -> None:
    """Let this process and what it starts be woken without pushing others off their core, where the system can.

    A free core makes no difference. On busy ones nginx otherwise runs for each packet as it comes, between two of those who send and who
    read: twice the work for the same bytes.
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class Changes:
    """When new facts are worth a reload. `now` in seconds, from any clock that only grows."""

    def __init__(self, loaded: Facts, *, now: float) -> None:
        self.loaded = loaded
        self._refused: Facts | None = None
        self._at = now

    def due(self, facts: Facts, *, now: float) -> bool:
        """Whether nginx is to get these facts now."""
        if now - self._at < RELOAD_EVERY_S or facts == self._refused:
            return False
        return facts.about_itself() != self.loaded.about_itself() or not set(facts.nodes) <= set(self.loaded.nodes)

    def took(self, facts: Facts, *, now: float) -> None:
        """nginx has them."""
        self.loaded, self._refused, self._at = facts, None, now

    def refused(self, facts: Facts, *, now: float) -> None:
        """nginx does not want them."""
        self._refused, self._at = facts, now


class Runner:
    """One nginx. `say` gets a line for the log now and then."""

    def __init__(
        self,
        options: Options,
        nginx: Nginx,
        *,
        say: Callable[[str], None],
        run_command: str = "python -m edge run",
        ask: Callable[[Path], Awaitable[Facts]] = ask,
    ) -> None:
        self._options = options
        self._nginx = nginx
        self._say = say
        self._run_command = run_command
        self._ask = ask
        self._process: trio.Process | None = None
        self._stopping = False
        self._serving = trio.Event()
        self._giving = trio.Lock()
        self._waiting = trio.CancelScope()
        self._said: tuple[str, float] = ("", 0.0)
        self.reloads = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until `stop` was called and nginx has ended. Started: nginx listens, and obeys signals.

        Raises:
            ConfigError: nginx cannot be started as it is asked for, or it ended by itself.
        """
        directory = self._options.directory
        _see_that_free(directory)
        _see_that_nobody_listens(self._options.listen)
        facts = None
        with self._waiting:
            facts = await self._first_facts()
        if facts is None:  # told to stop while it waited for the coordinator
            return
        text = await self._give(facts)
        if text:
            raise ConfigError(f"nginx does not take its configuration: {text}")
        if self._stopping:
            return
        command = [self._nginx.program, "-p", str(directory), "-c", str(directory / files.CONFIG), "-g", "daemon off;"]
        # In a session of its own: a terminal's Ctrl-C is for us, who then end it in good order.
        process = self._process = await trio.lowlevel.open_process(command, stdin=None, start_new_session=True)
        try:
            if self._stopping:  # told so in this very moment
                process.terminate()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._attend, process.pid, facts, task_status)
                await process.wait()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                if process.poll() is None:
                    process.terminate()
                    await process.wait()
        if not self._stopping:
            raise ConfigError(f"nginx ended by itself (status {process.returncode}); what it said is above")

    def stop(self) -> None:
        """Let what is in flight end; a second call cuts it."""
        self._waiting.cancel()
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM if self._stopping else signal.SIGQUIT)
        self._stopping = True

    @property
    def pid(self) -> int | None:
        """nginx's master process."""
        return None if self._process is None else self._process.pid

    async def reload(self) -> None:
        """Read everything anew, also what is not the coordinator's: certificates. While nginx starts: as soon as it serves."""
        await self._serving.wait()
        try:
            await self._load(await self._ask(self._options.selection))
        except (Away, ConfigError) as error:
            known = saved(self._options.directory)
            if known is None or not await self._load(known):
                self._say(f"nginx goes on as it is: {error}")

    # ------------------------------------------------------------ inside

    async def _first_facts(self) -> Facts:
        """The coordinator's, or those of the last time, or the first that it ever tells."""
        while True:
            try:
                return await self._ask(self._options.selection)
            except Away as error:
                facts = saved(self._options.directory)
                if facts is not None:
                    self._say(f"the coordinator is away ({error}); nginx starts with what was known the last time")
                    return facts
                self._say_once(f"waiting for the coordinator at {self._options.selection}: {error}")
            await trio.sleep(FOLLOW_EVERY_S)

    async def _attend(self, pid: int, facts: Facts, task_status: trio.TaskStatus[None]) -> None:
        """Follow the coordinator once nginx serves: it writes its id after it listens and has its handlers; SIGHUP before would kill it."""
        while _pid_in(self._options.directory) != pid:  # noqa: ASYNC110 -- nothing tells of a file that another program writes
            await trio.sleep(LOOK_EVERY_S)
        self._say(f"nginx {self._nginx.version_text} serves {', '.join(self._options.listen)}; {_count(facts)}")
        self._serving.set()
        task_status.started()
        await self._follow(Changes(facts, now=trio.current_time()))

    async def _follow(self, changes: Changes) -> None:
        while True:
            await trio.sleep(FOLLOW_EVERY_S)
            try:
                facts = await self._ask(self._options.selection)
                if not changes.due(facts, now=trio.current_time()):
                    continue
                taken = await self._load(facts)
            except (Away, ConfigError) as error:
                self._say_once(f"nginx goes on as it is: {error}")
                continue
            if taken:
                changes.took(facts, now=trio.current_time())
            else:
                changes.refused(facts, now=trio.current_time())

    async def _load(self, facts: Facts) -> bool:
        """Give nginx these facts. False: it refuses them, and keeps what it has."""
        async with self._giving:  # what follows the coordinator and who asks for a reload have the same files
            text = await self._give(facts)
        if text:
            self._say_once(f"nginx goes on as it is, for it does not take the new configuration: {text}")
            return False
        if self._process is not None and self._process.poll() is None and not self._stopping:
            self._process.send_signal(signal.SIGHUP)
            self.reloads += 1
            self._say(f"reloaded: {_count(facts)}")
        return True

    async def _give(self, facts: Facts) -> str:
        """Write the files of `facts`; what nginx says against them, and then the files are as before."""
        made = files.render(self._options, self._nginx, facts, run=self._run_command)
        return await trio.to_thread.run_sync(self._exchange, {**made, FACTS: msgspec.json.encode(facts).decode()})

    def _exchange(self, made: Mapping[str, str]) -> str:
        directory = self._options.directory
        before = {name: (directory / name).read_text(encoding="utf-8") for name in made if (directory / name).is_file()}
        files.write(directory, made)
        text = files.test(self._nginx, directory)
        if text:
            files.write(directory, before)
        return text

    def _say_once(self, text: str) -> None:
        said, at = self._said
        if text != said or trio.current_time() - at >= SAID_AGAIN_S:
            self._said = text, trio.current_time()
            self._say(text)


def _count(facts: Facts) -> str:
    return f"{len(facts.nodes)} node{'' if len(facts.nodes) == 1 else 's'} without the coordinator in between"


def _pid_in(directory: Path) -> int | None:
    """The process that wrote its id there last; a mere test of the configuration leaves the file empty."""
    try:
        return int((directory / "nginx.pid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _see_that_free(directory: Path) -> None:
    """Raises ConfigError when an nginx runs with these files."""
    if (pid := _pid_in(directory)) is None:
        return
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return
    if os.fsencode(directory / files.CONFIG) in command:
        raise ConfigError(f"nginx already runs with {directory} (process {pid}); end it with 'kill -QUIT {pid}', or give another --dir")


def _see_that_nobody_listens(addresses: Sequence[str]) -> None:
    """Raises ConfigError when somebody does: nginx would share the port with another nginx of this user, and get half of the clients."""
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            found = socket.getaddrinfo("0.0.0.0" if host == "*" else host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError:
            continue  # nginx says so itself
        if any(_is_taken(family, where) for family, _, _, _, where in found):
            raise ConfigError(f"--listen: somebody listens on {address} already; choose another, or end that")


def _is_taken(family: int, where: object) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of before do not matter
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(where)  # type: ignore[arg-type]
    except OSError as error:
        return error.errno == errno.EADDRINUSE  # whatever else it is nginx says itself
    return False
