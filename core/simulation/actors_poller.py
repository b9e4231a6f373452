"""Asks nodes without an agent, as `servers.poller` does: what they are and hold, and what is loaded.

Decides when to ask, never what an answer means. Invariants: `/api/ps` is never a sign of life or death; answers travel encoded and
arrive late or never, and one that was asked for by an earlier coordinator reaches nobody.
"""

from collections.abc import Container
from typing import Any, Final

import msgspec

from core.events import BackendAdded, NodePolled, NodeSilent, Upstream
from core.simulation.actors import Alarm, Stage
from core.simulation.actors_machine import VERSION, Machine
from core.simulation.actors_shell import DIAL_S, Shell
from core.simulation.network import DOWN, UP
from core.units import AgentId, Instant

LOADED_EVERY_S: Final = 2.0
CHECK_GAP_S: Final = 0.25
ANSWER_LIMIT_S: Final = 30.0


class Poller:
    """Polls all agentless machines of the world for one coordinator after the other."""

    def __init__(self, stage: Stage, shell: Shell, machines: list[Machine]) -> None:
        self._stage, self._shell = stage, shell
        self._nodes = [_Polled(self, machine) for machine in machines if not machine.agented]
        self._by_id: dict[AgentId, _Polled] = {}
        shell.probe = self._probe

    def start(self) -> None:
        """A new coordinator adds its backends."""
        self._by_id.clear()
        for node in self._nodes:
            self._by_id[node.start()] = node

    def stop(self) -> None:
        """The coordinator died."""
        for node in self._nodes:
            node.stop()

    def restore(self, known: Container[AgentId]) -> None:
        """An admin adds those again that were deleted: unlike agents they do not come back by themselves."""
        for node in self._nodes:
            if node.id not in known:
                self._by_id[node.start()] = node

    def _probe(self, agent_id: AgentId) -> None:
        if (node := self._by_id.get(agent_id)) is not None:
            node.wake()


class _Polled:
    """One polled node."""

    def __init__(self, poller: Poller, machine: Machine) -> None:
        self._stage, self._shell, self._machine = poller._stage, poller._shell, machine
        self._check_alarm = Alarm(self._stage, self._check)
        self._loaded_alarm = Alarm(self._stage, self._ask_loaded)
        self._limit = Alarm(self._stage, self._no_answer)
        self._answers = self._checking = False
        self._checked_at = 0.0
        self.id = AgentId("")

    def start(self) -> AgentId:
        index = self._machine.index
        self.id = self._shell.new_agent_id()
        self._shell.ids[index] = self.id
        upstream = Upstream(host=f"node-{index}", port=11434)
        self._answers = self._checking = False
        self._shell.apply(BackendAdded(agent_id=self.id, name=f"node-{index}", upstream=upstream, now_unix=self._shell.unix_ms()))
        self._check(self._stage.now)
        return self.id

    def stop(self) -> None:
        for alarm in (self._check_alarm, self._loaded_alarm, self._limit):
            alarm.set(float("inf"))

    def wake(self) -> None:
        """Check soon, unless a check is under way."""
        if not self._checking:
            self._check_alarm.set(max(self._stage.now, self._checked_at + CHECK_GAP_S))

    def _check(self, when: float) -> None:
        self._checking = True
        met = self._met()
        if met == "open":
            self._limit.set(when + ANSWER_LIMIT_S)
            self._ask("full")
        else:
            self._stage.at(when + (DIAL_S if met == "silence" else 0.0), self._refused, self._shell.generation)

    def _ask_loaded(self, when: float) -> None:
        if self._answers:
            if self._met() == "open":
                self._ask("loaded")
            else:
                self.wake()
        self._loaded_alarm.set(when + LOADED_EVERY_S)

    def _met(self) -> str:
        reachable = self._stage.network.reachable(self._machine.index, now=self._stage.now)
        return self._machine.dial(via_gateway=False) if reachable else "silence"

    def _ask(self, what: str) -> None:
        now, generation = self._stage.now, self._shell.generation

        def answer(machine: Machine) -> None:
            rows = machine.rows() if what == "full" else machine.loaded_rows()
            data = msgspec.json.encode(rows)
            for at in self._stage.network.datagram(machine.index, UP, now=self._stage.now):
                self._stage.at(at, self._answered, generation, what, data, now)

        for at in self._stage.network.datagram(self._machine.index, DOWN, now=now):
            self._stage.at(at, self._machine.asked, answer)

    def _answered(self, generation: int, what: str, data: bytes, asked_at: Instant) -> None:
        if not self._shell.up or generation != self._shell.generation or self._stage.now > asked_at + ANSWER_LIMIT_S:
            return
        rows = msgspec.json.decode(data)
        if what == "full":
            first, self._answers = not self._answers, True
            self._done(LOADED_EVERY_S if first else self._stage.options.check_s)
            self._tell(asked_at, version=VERSION, installed=rows)
            if first:
                self._ask_loaded(self._stage.now)
        else:
            self._tell(asked_at, loaded=rows, alive=False)

    def _tell(self, asked_at: Instant, **parts: Any) -> None:
        self._shell.apply(NodePolled(agent_id=self.id, now_unix=self._shell.unix_ms(), asked_at=asked_at, **parts))

    def _refused(self, generation: int) -> None:
        if self._shell.up and generation == self._shell.generation:
            self._silent(refused=True)

    def _no_answer(self, when: float) -> None:
        self._silent(refused=False)

    def _silent(self, *, refused: bool) -> None:
        self._answers = False
        self._done(min(LOADED_EVERY_S, self._stage.options.check_s))
        self._shell.apply(NodeSilent(agent_id=self.id, refused=refused))

    def _done(self, again_s: float) -> None:
        self._checking = False
        self._checked_at = self._stage.now
        self._limit.set(float("inf"))
        self._check_alarm.set(self._stage.now + again_s)
