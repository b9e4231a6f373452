"""`python -m tests.native.driven`: a driver with a real router, by a virtual clock; prints what came of it, and plays its dump."""

import hashlib
from typing import Any

import native

if __name__ == "__main__":
    native.use()

import trio
import trio.testing

from core.config import RouterConfig
from core.dump import load
from core.errors import LocalError
from core.events import BackendAdded, Ending, Failure, NodePolled, Pulse, RequestCame, Route, Settled, Upstream
from core.router import Router
from core.simulation.playback import play
from core.units import AgentId, Instant, RequestId, UnixMs
from servers.driver import Driver
from servers.tape import STEPS_PER_LENGTH

NODE = AgentId("n")
ROW = {"name": "m:latest", "model": "m:latest", "size": 1_000_000_000, "digest": "1" * 64}


class Said:
    """Sinks that remember."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def note(self, *words: Any) -> None:
        self.said.append(words)

    count = record = probe = note


def came(name: str) -> RequestCame:
    return RequestCame(request_id=RequestId(name), route=Route.CHAT, model="m", client="c", input_tokens=5)


def settled(name: str, **fields: Any) -> Settled:
    return Settled(request_id=RequestId(name), ending=Ending.SUCCESS, **fields)


async def drive() -> None:
    sinks, pulses = Said(), 0

    def pulse() -> Pulse:
        nonlocal pulses
        pulses += 1
        return Pulse(requests=(RequestId("first"),))

    driver = Driver(Router(RouterConfig(queue_timeout_s=7.0), now=Instant(trio.current_time())), sinks)
    driver.apply(BackendAdded(agent_id=NODE, name="n", upstream=Upstream(host="127.0.0.1", port=1), slots=1, now_unix=UnixMs(0)))
    driver.apply(NodePolled(agent_id=NODE, version="0.33.0", installed=[ROW], loaded=[ROW], now_unix=UnixMs(0)))
    desks = {name: driver.open_desk(RequestId(name)) for name in ("first", "second", "third")}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: driver.run(pulse, pulse_s=4.9))
        await trio.testing.wait_all_tasks_blocked()  # else Trio throws dice who begins
        driver.apply(came("first"))
        driver.apply(came("second"))
        print("first", desks["first"].take_nowait(), "second", desks["second"].take_nowait())
        print("in time", await desks["second"].take(), trio.current_time())
        driver.apply(settled("second", node_fault=Failure.DIED))
        driver.close_desk(RequestId("second"))
        try:
            driver.apply(came("first"))
        except LocalError as error:
            print(error)
        driver.apply(came("third"))
        await trio.sleep(31.5)
        driver.apply(settled("first"))
        for number in range(STEPS_PER_LENGTH):
            driver.open_desk(RequestId(f"r{number}"))
            driver.apply(came(f"r{number}"))
            driver.apply(settled(f"r{number}"))
            driver.close_desk(RequestId(f"r{number}"))
        print("pulses", pulses, driver.now(), len(driver.recent_events()), desks["third"].take_nowait(), driver.placement().rates_per_s)
        nursery.cancel_scope.cancel()
    print(hashlib.sha256(repr(sinks.said).encode()).hexdigest(), len(sinks.said))
    written = b"".join(driver.tape.written(version="1", made_at="now"))
    played = play(load(written))
    print(hashlib.sha256(written).hexdigest(), played.steps, played.same, played.difference)


if __name__ == "__main__":
    trio.run(drive, clock=trio.testing.MockClock(autojump_threshold=0))
    print("compiled" if native.in_use() else "as it is")
