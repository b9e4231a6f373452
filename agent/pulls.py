"""Downloads that the coordinator ordered: done by the Ollama beside this agent, and reported until the coordinator has heard.

Decides when a report is due; which download is next is the coordinator's business, as is trying again. Never knows policies or other
nodes. Invariants: an order that came before (it comes by the gateway and with heartbeats) begins nothing; the end of a download is
reported until it is confirmed, also across a coordinator that does not answer; nothing here delays a heartbeat.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
import structlog
import trio

from core.messages import PullOrder, PullReport, PullReports, PullReportsAnswer
from core.transfer import Layer
from edge.model_work import NodeOllama

REPORT_S: Final = 0.5
"""Between reports while there is something new."""
ALIVE_S: Final = 5.0
"""Between reports while nothing moves: a download may be silent for minutes."""
PAUSE_MAX_S: Final = 10.0
"""Between reports that nobody takes."""
ORDERS_MAX: Final = 64
"""Downloads that are remembered; the coordinator orders one at a time."""

Post = Callable[[PullReports], Awaitable[PullReportsAnswer | None]]
"""Sends a report; None: nobody took it."""


class _Job:
    """One attempt at one download."""

    def __init__(self, order: PullOrder) -> None:
        self.order = order
        self.scope = trio.CancelScope()
        self.phase = ""
        self.layers: tuple[Layer, ...] = ()
        self.over = False
        self.error: str | None = None
        self.lost = False
        self.confirmed = False

    def report(self) -> PullReport:
        return PullReport(
            task_id=self.order.task_id,
            attempt=self.order.attempt,
            phase=self.phase,
            layers=list(self.layers),
            over=self.over,
            error=self.error,
            lost=self.lost,
        )


class Pulls:
    """The downloads of one agent. `seen` is told what Ollama lists after each that succeeded."""

    def __init__(self, ollama: NodeOllama, *, post: Post, seen: Callable[[list[Any]], None]) -> None:
        self._ollama = ollama
        self._post = post
        self._seen = seen
        self._jobs: dict[tuple[str, int], _Job] = {}
        self._orders: list[PullOrder] = []
        self._nursery: trio.Nursery | None = None
        self._news = trio.Event()
        self._log = structlog.get_logger()

    @property
    def working(self) -> tuple[str, ...]:
        """Tasks in hand."""
        return tuple(job.order.task_id for job in self._jobs.values() if not job.over)

    def take(self, order: PullOrder) -> None:
        """Begin what was ordered, unless it is known."""
        key = (order.task_id, order.attempt)
        if key in self._jobs or self._nursery is None:
            return
        for known in [known for known, job in self._jobs.items() if job.confirmed][: max(0, len(self._jobs) + 1 - ORDERS_MAX)]:
            del self._jobs[known]
        for job in list(self._jobs.values()):
            if job.order.task_id == order.task_id:
                job.scope.cancel()  # an older attempt of which the coordinator lost sight
        job = self._jobs[key] = _Job(order)
        self._nursery.start_soon(self._pull, job)
        self._news.set()

    def stop(self, task_id: str) -> bool:
        """Stop a download; what came of it stays on the disk. False: it is not known."""
        found = [job for job in self._jobs.values() if job.order.task_id == task_id]
        for job in found:
            job.scope.cancel()
        return bool(found)

    async def run(self) -> None:
        """Work and report until cancelled."""
        async with trio.open_nursery() as self._nursery:
            await self._report()

    async def _pull(self, job: _Job) -> None:
        def tell(phase: str, layers: tuple[Layer, ...]) -> None:
            job.phase, job.layers = phase, layers
            self._news.set()

        order = job.order
        self._log.info("downloading", model=order.model, task_id=order.task_id, attempt=order.attempt)
        job.error = "the download was stopped"
        with job.scope:
            done = await self._ollama.pull(order.model, insecure=order.insecure, tell=tell)
            job.error, job.lost = done.error, done.lost
            if done.rows is not None:
                self._seen(done.rows)
        job.over = True
        self._log.info("download over", model=order.model, task_id=order.task_id, error=job.error)
        self._news.set()

    async def _report(self) -> None:
        failures = 0
        while True:
            open_jobs = [job for job in self._jobs.values() if not job.confirmed]
            if not open_jobs:
                self._news = trio.Event()
                await self._news.wait()
                continue
            self._news = trio.Event()
            reports = [job.report() for job in open_jobs]
            answer = await self._post(PullReports(reports=reports))
            if answer is None:
                failures += 1
                await trio.sleep(min(PAUSE_MAX_S, REPORT_S * 2.0 ** min(failures, 8)))
                continue
            failures = 0
            for job, report in zip(open_jobs, reports, strict=True):
                job.confirmed = report.over
                if job.order.task_id in answer.stop:
                    job.scope.cancel()
            await trio.sleep(REPORT_S)
            with trio.move_on_after(ALIVE_S - REPORT_S):
                await self._news.wait()


def order_from(body: bytes) -> PullOrder:
    """What `POST /pull` of the gateway orders.

    Raises:
        msgspec.MsgspecError: it is no order.
    """
    return msgspec.json.decode(body, type=PullOrder)
