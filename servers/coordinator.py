"""The coordinator put together: router, driver, edge, web app, poller; started in order, stopped in order.

Decides the order only. Invariants: a port that cannot be opened stops the start before anything else runs; at a stop, what is being
answered may end within a limit, and nothing new is taken; whatever was started is gone when `run` returns.
"""

from contextlib import ExitStack
from functools import partial

import structlog
import trio
from quart_trio import QuartTrio

import native
from core.aliases import Aliases
from core.errors import ConfigError, RemoteError
from core.events import Pulse, Upstream
from core.router import Router
from edge.body import BodyBudget
from edge.front import Front
from edge.listener import Listener, quick_routes
from edge.live import ProxyOptions
from edge.pool import Pool
from edge.proxy import Proxy
from edge.quick import Quick
from edge.web import WebPass
from edge.wire import Watch
from servers import clock
from servers.access import Access
from servers.api import admin, agents, dump, fleet, health, history, keys, managing, models, placement, tasks
from servers.api.web import OLLAMA_METHODS, Web, make_app
from servers.catalogue import read_catalogue
from servers.driver import Driver
from servers.explain import Explainer
from servers.keeping import Keeping
from servers.listen import internal_socket, open_ports, ports_of, serve_web
from servers.memory import Memory
from servers.metrics import Metrics
from servers.moves import Moves
from servers.nginx_edge import HAND_OVER, NginxEdge, nginx_sockets
from servers.poller import Poller
from servers.settings import Settings, upstream_name
from servers.sinks import RecordRing, Sinks
from servers.tokens import ADMIN_TOKEN_FILE, Tokens, open_data_dir


class Coordinator:
    """One coordinator. Make it, `run` it once; `stop` ends it in order."""

    def __init__(self, settings: Settings) -> None:
        """Reads and makes the secrets of the data directory.

        Raises:
            ConfigError: the data directory cannot be used.
        """
        self.settings = settings
        self.records = RecordRing()
        self.ports: tuple[int, ...] = ()
        """Where it listens, the main port first; known once `started`."""
        self.web: Web
        """Set once `started`."""
        self.nginx: NginxEdge
        """Set once `started`."""
        self._data_dir = open_data_dir(settings.data_dir)
        self.tokens = Tokens.from_files(self._data_dir, admin_token=settings.admin_token, join_token=settings.join_token)
        self.started = trio.Event()
        """Requests are taken."""
        self._config = settings.router_config()
        self.memory = Memory(settings, self._data_dir)
        self._catalogue = read_catalogue(self._data_dir)
        self._stop = trio.Event()
        self._log = structlog.get_logger()

    def stop(self) -> None:
        """Take nothing new, let answers end within `ROUTER_STOP_TIMEOUT`, then end."""
        self._stop.set()

    def add_backend(self, name: str, upstream: Upstream, slots: int | None = None, *, simulated: bool = False) -> None:
        """Add a node without an agent. Raises RemoteError."""
        agents.add_backend(self.web, clock.stable_agent_id(upstream_name(upstream)), name, upstream, slots, simulated=simulated)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop` was called and obeyed. `task_status.started()` means that requests are taken.

        Raises:
            CannotListen: a port cannot be opened.
            ConfigError: a setting turned out to be unusable.
        """
        ports = [("ROUTER_PORT", self.settings.port)]
        if self.settings.ollama_port is not None:
            ports.append(("ROUTER_OLLAMA_PORT", self.settings.ollama_port))
        with ExitStack() as opened:
            opened.callback(self.memory.close)
            public = [opened.enter_context(sock) for sock in open_ports(self.settings.host, ports)]
            self.ports = ports_of(public)
            internal, web_upstream = opened.enter_context(internal_socket())
            nginx = opened.enter_context(nginx_sockets(self.settings, secret=self.tokens.derived(HAND_OVER)))
            watch = Watch()
            pool = Pool(watch)
            proxy = self._compose(pool)
            listed = {clock.stable_agent_id(upstream_name(backend.upstream)) for backend in self.settings.backends}
            self.memory.restore_agents(self.web.driver, self.web.poller, listed=listed)
            self.memory.restore_work(self.web.moves, self.web.keeping)
            self._add_backends()
            front = Front(origins=self.settings.origins, base_path=self.settings.base_path, methods=OLLAMA_METHODS)
            listener = Listener(
                gate=self.web.access.gate,
                proxy=proxy,
                web=WebPass(
                    web_upstream,
                    pool,
                    secret=self.web.secret,
                    new_id=clock.new_request_id,
                    body_max_bytes=self.settings.body_max_bytes,
                ),
                watch=watch,
                new_id=clock.new_request_id,
                report=self._report,
                taken_over=None if nginx is None else self.nginx.handover.taking_over(proxy),
                front=front,
                quick=self._quick(proxy, front).lane,
            )
            async with trio.open_nursery() as nursery:
                self.memory.start()
                nursery.start_soon(self.memory.run)
                await nursery.start(watch.run)
                nursery.start_soon(serve_web, make_web_app(self.web), internal, trio.sleep_forever)
                nursery.start_soon(partial(self.web.driver.run, partial(self._pulse, proxy), pulse_s=self._config.pulse_s))
                nursery.start_soon(self.web.poller.run)
                nursery.start_soon(self.web.moves.run)
                nursery.start_soon(self.web.keeping.run)
                await nursery.start(listener.serve, public)
                if nginx is not None:
                    await nursery.start(self.nginx.run, nginx)
                    self.web.endings = self.nginx.tally.endings
                self._say_started()
                self.started.set()
                task_status.started()
                await self._stop.wait()
                in_flight = self.web.driver.router.statistics().in_flight
                self._log.info("stopping", in_flight=in_flight, limit_s=self.settings.stop_timeout_s)
                await listener.stop(limit_s=self.settings.stop_timeout_s)
                pool.close_idle()
                nursery.cancel_scope.cancel()

    # ------------------------------------------------------------ inside

    def _pulse(self, proxy: Proxy) -> Pulse:
        pulse = proxy.pulse()
        carried = self.nginx.pulse()
        return Pulse(requests=(*pulse.requests, *carried), heard=pulse.heard) if carried else pulse

    def _compose(self, pool: Pool) -> Proxy:
        """Everything that needs no task of its own yet; fills `web`."""
        settings, config = self.settings, self._config
        router = Router(config, now=clock.now())
        metrics = Metrics()
        sinks = Sinks(metrics, self.records)
        tick = trio.lowlevel.current_clock().current_time  # `trio.current_time` without asking each time which run this is
        driver = Driver(router, sinks, clock=tick)
        poller = Poller(
            driver.apply,
            now=driver.now,
            known=lambda agent_id: router.agent(agent_id) is not None,
            check_every_s=settings.health_check_interval_s,
        )
        sinks.probes = poller.probe
        access = Access(settings, self.tokens, our_ports=self.ports)
        self.memory.restore(access, self.tokens)
        self.records.of_keys.append(access.spent)
        self.records.listeners.append(self.memory.history.record)
        moves = Moves(driver, pool, credential_of=self.tokens.credential_of, say=sinks.note)
        keeping = Keeping(driver, moves, self._catalogue, default_rule=settings.auto_distribute)
        self.web = Web(
            settings=settings, driver=driver, access=access, tokens=self.tokens, metrics=metrics, poller=poller,
            moves=moves, keeping=keeping, memory=self.memory,
            secret=clock.new_secret().encode(), listening=lambda: not self._stop.is_set(),
        )  # fmt: skip
        aliases = Aliases(settings.aliases)
        self.nginx = NginxEdge(
            settings, driver, access=access, credential_of=self.tokens.credential_of, port=self.ports[0], aliases=aliases,
            records=self.memory.recorder, tick=tick, report=self._report, count=metrics.count,
            secret=self.tokens.derived(HAND_OVER),
        )  # fmt: skip
        return Proxy(
            driver,
            pool,
            budget=BodyBudget(
                max_body_bytes=settings.body_max_bytes,
                memory_bytes=settings.body_memory_bytes,
                spool=settings.history_bodies != "off",
            ),
            options=ProxyOptions(
                answer_hold_bytes=config.answer_hold_bytes,
                first_token_timeout_s=settings.first_token_timeout_s,
                stall_timeout_s=settings.stall_timeout_s,
                resume=settings.resume == "text",
            ),
            new_id=clock.new_request_id,
            credential_of=self.tokens.credential_of,
            client_of=access.client_of,
            judge_model=access.judge_model,
            recorder=self.memory.recorder,
            unload_elsewhere=moves.unload,
            aliases=aliases,
            explainer=Explainer(driver, access),
            clock=tick,
        )

    def _quick(self, proxy: Proxy, front: Front) -> Quick:
        access = self.web.access
        return Quick(
            proxy,
            gate=access.gate,
            lasting_client=access.lasting_client,
            routes=quick_routes(front),
            new_id=clock.new_request_id,
            report=self._report,
        )

    def _add_backends(self) -> None:
        for backend in self.settings.backends:
            try:
                self.add_backend(backend.name, backend.upstream, backend.slots)
            except RemoteError as error:
                raise ConfigError(f"OLLAMA_BACKENDS: the node {backend.name} cannot be added: {error}") from None

    def _say_started(self) -> None:
        for warning in self.settings.warnings:
            self._log.warning(warning)
        if self.settings.auth == "off":
            self._log.warning("ROUTER_AUTH is off: everybody who reaches this port may do everything")
        where = {} if self.settings.admin_token else {"admin_file": str(self._data_dir / ADMIN_TOKEN_FILE)}
        self._log.info(
            "listening", host=self.settings.host, ports=list(self.ports), auth=self.settings.auth, compiled=native.in_use(), **where
        )

    def _report(self, error: Exception) -> None:
        self._log.error("a connection failed", exc_info=error)


def make_web_app(web: Web) -> QuartTrio:
    """The web app with all its routes."""
    app = make_app(web)
    for routes in (agents, fleet, health, admin, dump, history, keys, placement, managing, models, tasks):
        routes.add_routes(app, web)
    return app
