"""Drives `core.agent_link`: carries out its effects, tells it what happens, keeps the time for it.

Decides nothing about the conversation. Every question to the coordinator, to Ollama and to the machine runs in a task or thread of its
own, so none delays a heartbeat. Invariants: the link is touched from the Trio thread only; each call that it asks for is answered by
one event; the agent's token goes to the coordinator alone and is never logged.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import msgspec
import structlog
import trio

from agent.config import AgentConfig, Identity, port_of
from agent.endings import Endings, Unheard
from agent.gateway import Gateway
from agent.log import LogTail
from agent.observe.host import cpu_and_memory, free_for_models, machine_name, source_address
from agent.observe.nvidia import Nvidia
from agent.observe.override import apply_override
from agent.ollama.client import OllamaClient, OllamaSilent
from agent.pulls import Pulls
from core import messages
from core.agent_link import (
    CALL_TIMEOUT_S,
    Admitted,
    AgentLink,
    CallFailed,
    CallRefused,
    Effect,
    Event,
    HeartbeatAnswered,
    Left,
    Load,
    LoadSampled,
    OllamaPolled,
    RegistrationAnswered,
    SendHeartbeat,
    SendRegistration,
    StopAsked,
    WorkSeen,
)
from core.errors import RemoteError
from core.events import Note
from core.messages import (
    EndingReports,
    EndingReportsAnswer,
    GpuDevice,
    HeartbeatAnswer,
    PullReports,
    PullReportsAnswer,
    Registration,
    RegistrationAnswer,
)
from core.units import Instant

AGENT_VERSION: Final = "0.1.0"
POLL_S: Final = 2.0
"""How often Ollama and the machine are asked; a change of what is loaded is known this soon."""
SILENT_MAX: Final = 2
"""So many unanswered checks in a row make an Ollama that accepts connections count as dead."""
FIRST_LOOK_S: Final = 3.0
"""How long the first registration waits to learn about Ollama."""
ANSWER_MAX_BYTES: Final = 1 << 20
LAST_WORDS_S: Final = 2.0
"""How long an agent that leaves waits for the coordinator to take the last endings."""
_NEVER_TAKEN: Final = (400, 413, 422)


class Daemon:
    """One agent. `run` it; `stop` asks it to leave in order."""

    def __init__(
        self,
        config: AgentConfig,
        identity: Identity,
        *,
        dice: Callable[[int], int],
        tail: LogTail | None = None,
        nvidia: Callable[[], Nvidia] = Nvidia,
    ) -> None:
        self.gateway = Gateway(config.ollama_url, tail=tail)
        self._endings = Endings(self._report_endings)
        self.gateway.ended = self._endings.add
        self._config = config
        self._identity = identity
        self._dice = dice
        self._nvidia = nvidia
        self._log = structlog.get_logger()
        self._link: AgentLink | None = None
        self._token: str | None = None
        self._wake = trio.Event()
        self._left = trio.Event()
        self._last_words = trio.CancelScope()
        self._nursery: trio.Nursery | None = None
        self._stop_asked = False
        self._port = 0

    def listen(self) -> int:
        """Open the gateway's port; before `run`. Returns which it is.

        Raises:
            ConfigError: it cannot be used.
        """
        self._port = self.gateway.listen(self._gateway_host(), self._config.api_port)
        return self._port

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until the agent has left."""
        config = self._config
        async with (
            httpx.AsyncClient(timeout=CALL_TIMEOUT_S, trust_env=False) as self._http,
            OllamaClient(config.ollama_url) as ollama,
            trio.open_nursery() as nursery,
        ):
            self._nursery = nursery
            await nursery.start(self.gateway.run)
            for line in config.warnings:
                self._log.warning(line)
            self._log.info("agent started", router=config.router_url, ollama=config.ollama_url, gateway_port=self._port)
            await trio.to_thread.run_sync(cpu_and_memory)  # the first measurement only marks the beginning
            first = OllamaPolled()
            with trio.move_on_after(FIRST_LOOK_S):
                with contextlib.suppress(OllamaSilent):
                    first = await self._look(ollama)
            nvidia = await trio.to_thread.run_sync(self._nvidia)
            devices = apply_override(await trio.to_thread.run_sync(nvidia.devices), config.gpu)
            self._log.info("GPUs", devices=[f"{device.count} x {device.model}" for device in devices] or "none found")
            self._link = AgentLink(self._registration(devices), interval_s=config.heartbeat_interval_s, dice=self._dice, now=_now())
            self._apply(first)
            nursery.start_soon(self._watch_ollama, ollama)
            nursery.start_soon(self._watch_loaded, ollama)
            nursery.start_soon(self._watch_load, nvidia)
            pulls = self.gateway.pulls = Pulls(self.gateway.ollama(), post=self._report_pulls, seen=self._saw_installed)
            nursery.start_soon(pulls.run)
            nursery.start_soon(self._endings.run)
            nursery.start_soon(self._drive)
            task_status.started()
            await self._left.wait()
            self._last_words.deadline = trio.current_time() + LAST_WORDS_S
            with self._last_words:
                await self._endings.flush()
            nursery.cancel_scope.cancel()
        self._log.info("agent stopped")

    def stop(self) -> None:
        """Leave in order: tell the coordinator, let requests end, at most `stop_timeout_s`. The second call: leave at once."""
        if self._stop_asked:
            self._last_words.cancel()
            self._left.set()
            return
        self._stop_asked = True
        in_flight = len(self.gateway.in_flight())
        self._log.info("stopping", in_flight=in_flight, longest_s=self._config.stop_timeout_s)
        if self._link is None or self._nursery is None:
            self._left.set()
            return
        self._apply(StopAsked())
        self._nursery.start_soon(self._stop_at_last)

    async def _stop_at_last(self) -> None:
        await trio.sleep(self._config.stop_timeout_s)
        self._log.warning("stopping although requests are in flight", in_flight=len(self.gateway.in_flight()))
        self._left.set()

    # ------------------------------------------------------------ the link

    async def _drive(self) -> None:
        """Wake the link when it wants to be woken."""
        assert self._link is not None
        while True:
            self._wake = trio.Event()
            work = WorkSeen(in_flight=self.gateway.in_flight(), average_response_time_ms=self.gateway.average_response_time_ms)
            now = _now()
            self._carry_out(self._link.handle(work, now=now))
            self._carry_out(self._link.tick(now=now))
            deadline = self._link.next_deadline()
            with trio.move_on_at(math.inf if deadline is None else deadline):
                await self._wake.wait()

    def _apply(self, event: Event) -> None:
        if self._link is not None:
            self._carry_out(self._link.handle(event, now=_now()))
            self._wake.set()

    def _carry_out(self, effects: list[Effect]) -> None:
        assert self._nursery is not None
        for effect in effects:
            match effect:
                case SendRegistration():
                    self._nursery.start_soon(self._register, effect)
                case SendHeartbeat():
                    self._nursery.start_soon(self._beat, effect)
                case Admitted(agent_token=token, gateway_credential=credential):
                    self._token = token or self._token
                    if credential is not None:
                        self.gateway.credential = credential.encode()
                case Left():
                    self._left.set()
                case Note(level=level, event=event, fields=fields):
                    getattr(self._log, level)(event, **fields)

    # ------------------------------------------------------------ calls to the coordinator

    async def _register(self, effect: SendRegistration) -> None:
        registration = effect.registration
        address = self._config.advertise_address or await self._source_address()
        if address is not None:
            registration = msgspec.structs.replace(registration, ip_address=address)
        headers = {"X-Router-Join-Token": self._config.join_token} if self._config.join_token else {}
        answer = await self._post("/api/agents", messages.encode(registration), effect.call, RegistrationAnswer, headers)
        self._apply(RegistrationAnswered(call=effect.call, answer=answer) if isinstance(answer, RegistrationAnswer) else answer)

    async def _beat(self, effect: SendHeartbeat) -> None:
        answer = await self._post("/api/health", messages.encode(effect.heartbeat), effect.call, HeartbeatAnswer, {})
        if not isinstance(answer, HeartbeatAnswer):
            self._apply(answer)
            return
        self._apply(HeartbeatAnswered(call=effect.call, answer=answer))
        if self.gateway.pulls is not None:
            for order in answer.tasks:
                self.gateway.pulls.take(order)

    async def _report_pulls(self, reports: PullReports) -> PullReportsAnswer | None:
        """How the ordered downloads stand; None when the coordinator did not take it."""
        if self._link is None or not self._link.agent_id:
            return None
        answer = await self._post(f"/api/agents/{self._link.agent_id}/tasks", messages.encode(reports), 0, PullReportsAnswer, {})
        return answer if isinstance(answer, PullReportsAnswer) else None

    async def _report_endings(self, reports: EndingReports) -> EndingReportsAnswer | Unheard:
        """How requests that nginx brought ended."""
        if self._link is None or not self._link.agent_id:
            return Unheard.AGAIN
        answer = await self._post(f"/api/agents/{self._link.agent_id}/endings", messages.encode(reports), 0, EndingReportsAnswer, {})
        if isinstance(answer, EndingReportsAnswer):
            return answer
        return Unheard.NEVER if isinstance(answer, CallRefused) and answer.status in _NEVER_TAKEN else Unheard.AGAIN

    def _saw_installed(self, rows: list[Any]) -> None:
        """What Ollama holds after a download, told before the download's end is."""
        self._apply(OllamaPolled(installed=rows))

    async def _post(
        self, path: str, body: bytes, call: int, kind: type[messages.T], headers: dict[str, str]
    ) -> messages.T | CallRefused | CallFailed:
        """What the coordinator said, whatever that was."""
        headers = {"Content-Type": "application/json", **headers}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        url = self._config.router_url
        data = bytearray()
        try:
            with trio.fail_after(CALL_TIMEOUT_S):
                async with self._http.stream("POST", url + path, content=body, headers=headers) as response:
                    async for chunk in response.aiter_bytes():
                        data += chunk
                        if len(data) > ANSWER_MAX_BYTES:
                            return CallFailed(call=call, text=f"the answer of {url} is too large")
        except (httpx.TimeoutException, trio.TooSlowError):
            return CallFailed(call=call, text=f"{url} did not answer in time")
        except httpx.HTTPError as error:
            return CallFailed(call=call, text=f"{url} cannot be reached: {error or type(error).__name__}")
        if not response.is_success:
            retry_after_s = _seconds(response.headers.get("Retry-After"))
            return CallRefused(call=call, status=response.status_code, text=_error_text(bytes(data)), retry_after_s=retry_after_s)
        try:
            return messages.decode(bytes(data), kind)
        except RemoteError:
            return CallFailed(call=call, text=f"what answers at {url} is no coordinator")

    async def _source_address(self) -> str | None:
        """This machine as the coordinator sees it."""
        host = urlsplit(self._config.router_url).hostname or ""
        with trio.move_on_after(CALL_TIMEOUT_S / 2):
            return await trio.to_thread.run_sync(source_address, host, port_of(self._config.router_url), abandon_on_cancel=True)
        return None

    # ------------------------------------------------------------ what is observed

    async def _watch_ollama(self, ollama: OllamaClient) -> None:
        silent = 0
        while True:
            try:
                polled = await self._look(ollama)
                silent = 0
            except OllamaSilent as error:
                silent += 1
                polled = OllamaPolled(ok=False if error.refused or silent >= SILENT_MAX else None)
                self._log.debug("Ollama was asked in vain", error=str(error))
            self._apply(polled)
            await trio.sleep(POLL_S)

    async def _look(self, ollama: OllamaClient) -> OllamaPolled:
        """Its version is its sign of life; the list may be late (it stands still while Ollama starts)."""
        version = await ollama.version()
        try:
            return OllamaPolled(ok=True, version=version, installed=await ollama.installed())
        except OllamaSilent as error:
            self._log.debug("Ollama did not list its models", error=str(error))
            return OllamaPolled(ok=True, version=version)

    async def _watch_loaded(self, ollama: OllamaClient) -> None:
        while True:
            try:
                self._apply(OllamaPolled(loaded=await ollama.loaded()))
            except OllamaSilent as error:
                self._log.debug("Ollama did not tell what is loaded", error=str(error))
            await trio.sleep(POLL_S)

    async def _watch_load(self, nvidia: Nvidia) -> None:
        here = urlsplit(self._config.ollama_url).hostname in _LOOPBACK

        def sample() -> Load:
            cpu, memory = cpu_and_memory()
            return Load(cpu_usage=cpu, memory_usage=memory, disk_free_bytes=free_for_models() if here else None, **nvidia.load())

        while True:
            self._apply(LoadSampled(load=await trio.to_thread.run_sync(sample)))
            await trio.sleep(POLL_S)

    def _registration(self, devices: list[GpuDevice]) -> Registration:
        return Registration(
            machine_name=machine_name()[:255],
            ip_address=self._config.advertise_address or "127.0.0.1",
            ollama_version="",
            ollama_port=self._config.ollama_port,
            gpu_available=bool(devices),
            gpu_devices=devices,
            gpu_count=sum(device.count for device in devices) or None,
            gpu_model=devices[0].model if devices else None,
            agent_api_port=self._port,
            agent_version=AGENT_VERSION,
            slots=self._config.slots,
            instance_id=self._identity.instance_id,
            boot=self._identity.boot,
        )

    def _gateway_host(self) -> str:
        """Loopback is enough for a coordinator on this machine; others must be able to dial."""
        advertised = self._config.advertise_address or ""
        if urlsplit(self._config.router_url).hostname in _LOOPBACK and (not advertised or advertised in _LOOPBACK):
            return "127.0.0.1"
        return "::" if ":" in advertised else "0.0.0.0"


_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")


def _now() -> Instant:
    return Instant(trio.current_time())


def _seconds(text: str | None) -> float | None:
    """A `Retry-After` in seconds; a date is not understood."""
    return float(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 7 else None


def _error_text(body: bytes) -> str:
    """The sentence in an error answer."""
    try:
        answer: Any = messages.decode(body, dict[str, Any])
    except RemoteError:
        return "no reason given"
    error = answer.get("error")
    return error[:500] if isinstance(error, str) else "no reason given"
