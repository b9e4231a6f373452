"""Named stories with their figures: `python -m tests.core.simulation.scenarios` prints the table of docs/simulation.md.

Each story is a script on a small fleet of equal machines, and ends in `Heal`, so that a request that is never settled fails the run (L1).
Times are virtual seconds.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from core.config import RouterConfig
from core.events import Ending, Record
from core.simulation import script
from core.simulation.options import Options, performance
from core.simulation.script import Action, Ask, Heal, Timed
from core.simulation.world import Verdict, World

Actions = list[tuple[float, Action]]

FLEET = Options(nodes=4, homogeneous=True, models=1, slots=2, clients=4, heartbeat_s=5.0)


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """How a story went."""

    verdict: Verdict
    records: list[Record]
    loads: int

    def ttft_s(self, percent: float, *, of: Callable[[Record], bool] = lambda _: True) -> float:
        """A percentile of the time to the first byte, of the requests that had one."""
        times = sorted(record.ttft_ms / 1000 for record in self.records if record.ttft_ms is not None and of(record))
        return times[min(len(times) - 1, int(len(times) * percent / 100))]

    def total_s(self, percent: float) -> float:
        """A percentile of the time to the end, of the requests that were served."""
        times = sorted(record.duration_ms / 1000 for record in self.records if record.ending is Ending.SUCCESS)
        return times[min(len(times) - 1, int(len(times) * percent / 100))]

    def count(self, ending: Ending) -> int:
        """Requests that ended so."""
        return sum(record.ending is ending for record in self.records)


def tell(actions: Actions, options: Options = FLEET, *, seed: int = 1, heal_s: float = 300.0, survivors: tuple[int, ...] = ()) -> Told:
    """Play a story."""
    everybody = tuple(range(options.nodes))
    ordered = sorted([*actions, (heal_s, Heal(survivors=survivors or everybody))], key=lambda entry: entry[0])
    world = World(seed, options, actions=[Timed(at_s, action) for at_s, action in ordered], every=1)
    verdict = world.run(2_000_000)
    return Told(verdict=verdict, records=world.checkers.records, loads=sum(machine.loads for machine in world.machines))


def traffic(*, start_s: float, end_s: float, gap_s: float, first: int = 0, **fields: Any) -> Actions:
    """Requests in an even rhythm, of four clients in turns."""
    count = int((end_s - start_s) / gap_s)
    return [(start_s + index * gap_s, Ask(request=first + index, client=index % 4, **fields)) for index in range(count)]


GAP_S = 0.3
STEADY = traffic(start_s=10.0, end_s=250.0, gap_s=GAP_S, input_tokens=400, output_tokens=200)
"""A third of what the fleet can serve: nodes 1 to 3 do it, and node 0 is hardly needed. Trouble befalls those that serve."""


def came_after(at_s: float, number_of: int = 10**9) -> Callable[[Record], bool]:
    """Of the steady traffic: requests that came after this instant."""
    first = int((at_s - 10.0) / GAP_S)
    return lambda record: first <= int(record.request_id.split("-")[1]) < number_of


def nothing_wrong() -> Told:
    return tell(STEADY)


def gray_failure() -> Told:
    """One of four nodes works at a twentieth of its speed for two minutes, without a word."""
    return tell([*STEADY, (60.0, script.Slow(node=1, percent=5, for_s=120.0))])


def storm_of_503() -> Told:
    """Half of the nodes say 503 to everything for a minute."""
    return tell([*STEADY, *((60.0, script.Failing(node=node, how="refuse_503", for_s=60.0)) for node in (1, 2))])


def storm_of_503_everywhere() -> Told:
    """All nodes say 503 to everything for ten seconds."""
    return tell([*STEADY, *((60.0, script.Failing(node=node, how="refuse_503", for_s=10.0)) for node in range(4))])


def storm_of_cancels() -> Told:
    """Twice as much as the fleet can serve, and after a minute every client leaves at once; then normal traffic."""
    flood = traffic(start_s=10.0, end_s=70.0, gap_s=0.05, first=10_000, input_tokens=400, output_tokens=400)
    return tell([*flood, (70.0, script.Storm(one_in=1)), *(entry for entry in STEADY if entry[0] > 70.0)])


def flapping_node() -> Told:
    """A node crashes every ten seconds, and is back three seconds later."""
    return tell([*STEADY, *((60.0 + 10.0 * index, script.Crash(node=1, for_s=3.0)) for index in range(12))])


def coordinator_restart() -> Told:
    """The coordinator dies and is back two seconds later, knowing nothing."""
    return tell([*STEADY, (60.0, script.Restart(for_s=2.0))])


def partition_of_half_the_fleet() -> Told:
    """Two of four nodes cannot be reached for a minute and a half."""
    return tell([*STEADY, (60.0, script.Partition(nodes=(1, 2), for_s=90.0))])


def warm_busy_against_cold_idle() -> Told:
    """One node is warm and busy, one cold and idle: eight short requests come at once."""
    options = msgspec.structs.replace(FLEET, nodes=2, slots=1)
    warm = traffic(start_s=10.0, end_s=40.0, gap_s=5.0, output_tokens=20)
    return tell([*warm, *((50.0, Ask(request=100 + index, client=index, output_tokens=40)) for index in range(8))], options)


def victim_of_a_cold_load() -> Told:
    """One node that holds one model in memory at a time; two clients keep it busy, a third wants another model."""
    options = msgspec.structs.replace(FLEET, nodes=1, models=2, slots=1, max_loaded=1)
    busy = traffic(start_s=10.0, end_s=70.0, gap_s=0.4, input_tokens=100, output_tokens=100)
    return tell([*busy, (30.0, Ask(request=5000, client=9, model=1, output_tokens=20))], options)


def two_context_lengths() -> Told:
    """Two clients use one model with different `num_ctx`, in turns, on two nodes."""
    options = msgspec.structs.replace(FLEET, nodes=2, slots=1, config=RouterConfig())
    return tell(
        [(10.0 + index, Ask(request=index, client=index % 2, num_ctx=(2048, 8192)[index % 2], output_tokens=50)) for index in range(100)],
        options,
    )


def leaked_slots() -> Told:
    """One node with one slot; a client in four leaves in mid-answer, and for a minute each of these leaks the slot. Then all is well."""
    options = msgspec.structs.replace(FLEET, nodes=2, slots=1)
    asked = traffic(start_s=10.0, end_s=600.0, gap_s=2.0, input_tokens=100, output_tokens=400)
    leaving = [(at_s + 0.5, script.Leave(request=ask.request)) for at_s, ask in asked[25:55:4] if isinstance(ask, Ask)]
    leaks = [(60.0, script.Failing(node=node, how="leak", for_s=60.0)) for node in (0, 1)]
    return tell([*asked, *leaving, *leaks], options, heal_s=700.0)


STORIES: dict[str, Callable[[], Told]] = {
    story.__name__: story
    for story in (
        nothing_wrong, gray_failure, storm_of_503, storm_of_503_everywhere, storm_of_cancels, flapping_node, coordinator_restart,
        partition_of_half_the_fleet, warm_busy_against_cold_idle, victim_of_a_cold_load, two_context_lengths,
        leaked_slots,
    )
}  # fmt: skip


def waited_for_the_other_model(told: Told) -> float:
    """In `victim_of_a_cold_load`: how long the third client waited for its first byte."""
    return told.ttft_s(0, of=lambda record: record.request_id.startswith("request-5000-"))


def prediction_errors_ms(options: Options, *, seed: int = 1, steps: int = 60_000) -> list[float]:
    """How far the start that was predicted when a request came lies from the one that was observed, by request, sorted.

    Observed: what the request waited in the router, and on its node until its prompt was read (its own account of load and slot).
    """
    world = World(seed, options, every=1000)
    assert world.run(steps).passed
    errors = []
    for record in world.checkers.records:
        usage = record.usage
        if usage is not None and usage.total_ns and record.predicted_start_ms is not None and len(record.attempts) == 1:
            on_node_ms = (usage.total_ns - usage.prompt_ns - usage.eval_ns) / 1e6
            errors.append(abs(record.predicted_start_ms - record.queue_ms - on_node_ms))
    return sorted(errors)


PREDICTED = {"eight equal nodes": performance(), "eight nodes of all kinds": msgspec.structs.replace(performance(), homogeneous=False)}


def main() -> None:
    """Print the tables."""
    print("| story | requests | served | refused or failed | left | TTFT p50 | p95 | p99 | total p99 | loads |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, story in STORIES.items():
        told = story()
        assert told.verdict.passed, told.verdict
        ends = " | ".join(str(told.count(ending)) for ending in (Ending.SUCCESS, Ending.ERROR, Ending.CANCELLED))
        times = " | ".join(f"{told.ttft_s(percent):.2f}" for percent in (50, 95, 99))
        print(f"| {name.replace('_', ' ')} | {len(told.records)} | {ends} | {times} | {told.total_s(99):.2f} | {told.loads} |")
        if story is victim_of_a_cold_load:
            note = f"the request for the other model waited {waited_for_the_other_model(told):.2f} s for its first byte"
    print(f"\nIn `victim of a cold load` {note}.\n")
    print("| predicted against observed start | requests | median error, ms | p90, ms |")
    print("| --- | ---: | ---: | ---: |")
    for name, options in PREDICTED.items():
        errors = prediction_errors_ms(options)
        print(f"| {name} | {len(errors)} | {errors[len(errors) // 2]:.0f} | {errors[len(errors) * 9 // 10]:.0f} |")


if __name__ == "__main__":
    main()
