"""How requests that nginx brought ended: told to the coordinator in batches, until it has heard.

Decides when a batch is due: at once when the last one is `gather_s` old, else gathered so long; after one that nobody took, a pause that
doubles. Never knows requests or sockets. Invariants: what was added is in one batch after the other until one is confirmed, oldest
first; at most `KEPT_MAX` are kept, beyond that the oldest go and are counted; nothing here delays a heartbeat, or an answer.
"""

import enum
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from core.messages import ENDINGS_MAX, EndingReport, EndingReports, EndingReportsAnswer

GATHER_S: Final = 0.25
GATHER_MAX_S: Final = 1.0
"""A coordinator with many agents may ask for fewer batches; it waits two seconds for a report."""
PAUSE_MAX_S: Final = 5.0
"""Between batches that nobody takes."""
KEPT_MAX: Final = 10_000


class Unheard(enum.Enum):
    """Why a batch was not confirmed."""

    AGAIN = "again"
    """Nobody answered, or not now."""
    NEVER = "never"
    """It was read and refused, and would be again."""


Post = Callable[[EndingReports], Awaitable[EndingReportsAnswer | Unheard]]


class Endings:
    """The endings of one gateway. `post` sends a batch."""

    def __init__(self, post: Post, *, kept_max: int = KEPT_MAX) -> None:
        self.dropped_total = 0
        """Reports that were given up."""
        self._post = post
        self._kept_max = kept_max
        self._kept: deque[EndingReport] = deque()
        self._gone = 0
        """Reports that have left `_kept` at its old end, confirmed or given up."""
        self._dropped = 0
        """Given up, and not told."""
        self._gather_s = GATHER_S
        self._in_haste = False
        self._news = trio.Event()
        self._hurry = trio.Event()
        self._empty = trio.Event()
        self._log = structlog.get_logger()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, report: EndingReport) -> None:
        """Tell the coordinator this."""
        kept = self._kept
        kept.append(report)
        count = len(kept)
        if count == 1:
            self._empty = trio.Event()
            self._news.set()
        elif count == ENDINGS_MAX:
            self._hurry.set()
        elif count > self._kept_max:
            self._drop(1)

    async def run(self) -> None:
        """Report until cancelled."""
        sent_at, failures = -math.inf, 0
        while True:
            if not self._kept:
                self._empty.set()
                self._news = trio.Event()
                await self._news.wait()
            self._hurry = trio.Event()
            if failures or not (self._in_haste or len(self._kept) >= ENDINGS_MAX):
                with trio.move_on_at(sent_at + self._pause_s(failures)):
                    await self._hurry.wait()
            sent_at = trio.current_time()
            failures = 0 if await self._send() else failures + 1

    async def flush(self) -> None:
        """Until everything is confirmed, without gathering; as long as that takes."""
        self._in_haste = True
        self._hurry.set()
        while self._kept:
            await self._empty.wait()

    def _pause_s(self, failures: int) -> float:
        """Between the last batch and the next one."""
        if not failures:
            return self._gather_s
        return GATHER_S if self._in_haste else min(PAUSE_MAX_S, GATHER_S * 2.0 ** min(failures, 8))

    async def _send(self) -> bool:
        """One batch. False: it is to be repeated."""
        batch = [self._kept[at] for at in range(min(ENDINGS_MAX, len(self._kept)))]
        begin, dropped = self._gone, self._dropped
        answer = await self._post(EndingReports(reports=batch, dropped=dropped))
        if answer is Unheard.AGAIN:
            return False
        left = max(0, begin + len(batch) - self._gone)  # of the batch: some may have been given up meanwhile
        if isinstance(answer, EndingReportsAnswer):
            self._forget(left)
            self._dropped -= dropped
            self._gather_s = min(max(answer.gather_s, GATHER_S), GATHER_MAX_S)
        else:
            self._drop(left)
        return True

    def _drop(self, count: int) -> None:
        if count and not self._dropped:
            self._log.warning("the coordinator does not take what is told about endings: the oldest are given up", kept=len(self._kept))
        self._forget(count)
        self._dropped += count
        self.dropped_total += count

    def _forget(self, count: int) -> None:
        for _ in range(count):
            self._kept.popleft()
        self._gone += count
