"""The world in a box: the real router and the real agent links, machines, clients and a network, in virtual time.

Decides only what happens next: the earliest entry of one heap, and of equal instants the one that was asked for first. Everything that
befalls the world from outside is an action of a script, drawn from the seed or played from a record. Two phases: first anything may
happen and nothing wrong may come of it; then, from the action `Heal` on, nothing happens any more and everything must come to rest:

L1  Every request settles.
L2  Nothing is in flight, at the router and on the nodes.
L3  Every agent that lives is ready, and every other one is not.
L4  Under steady load every one of equal nodes gets its share (all strategies but `auto`, which prefers the warm).
L5  Nobody waits any more.

Invariant D1: the same seed, options and actions give the same digest, which covers each event, its step and its effects.
"""

import enum
import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec

from core.agent_link import AgentLink, Load
from core.events import Command, Effect, Event, SettingsChanged
from core.messages import AgentSettings
from core.router import Router
from core.simulation import fate, script
from core.simulation.actors_machine import Machine
from core.simulation.actors_poller import Poller
from core.simulation.actors_shell import MakeRouter, Shell
from core.simulation.checkers import Checkers, Violation
from core.simulation.hardware import GPUS, MODELS, fits, model_timing, node_timing
from core.simulation.network import Network
from core.simulation.options import Options
from core.simulation.prng import Prng, Ratio
from core.simulation.script import Action, Heal, Script, Timed
from core.units import AgentId, Instant

REST_S: Final = 4 * 3600.0
"""Virtual seconds within which everything must have come to rest after `Heal`: hundreds of requests may lie at a slow node by then."""
JUDGE_S: Final = 1.0
"""How often that is looked at."""
TAIL_S: Final = 60.0
"""Virtual seconds that a script without `Heal` runs on after its last action."""
INSTANT_S: Final = 1e-6
"""Until `Heal` is done: so short that nothing else lies between, so long that nothing else lies at the same instant."""
PROBE_ROUNDS: Final = 3
"""Requests per node with which L4 is tried."""


class Outcome(enum.Enum):
    """How a run ended; the value is the exit status."""

    PASSED = 0
    CRASH = 127
    LIVENESS = 128
    CORRECTNESS = 129


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to. `invariant` is the number of the broken promise, or the name of what was raised."""

    outcome: Outcome
    seed: int
    steps: int
    at_s: float
    digest: str
    settled: int
    invariant: str = ""
    text: str = ""

    @property
    def passed(self) -> bool:
        return self.outcome is Outcome.PASSED


class _Unrest(Exception):
    """The world did not come to rest. The text begins with the number of the first item that is unmet."""


class World:
    """One run. `actions` None: drawn from the seed until the step budget is spent, then `Heal`."""

    def __init__(
        self,
        seed: int,
        options: Options,
        *,
        actions: Iterable[Timed] | None = None,
        make_router: MakeRouter = Router,
        make_shell: type[Shell] = Shell,
        make_link: Callable[..., AgentLink] = AgentLink,
        invariants: Callable[..., None] | None = None,
        every: int = 8,
    ) -> None:
        self.seed, self.options = seed, options
        self.now = Instant(0.0)
        self.healed = False
        self.steps = 0
        self.actions: list[Timed] = []
        """What befell the world so far: the run as a script."""
        self.failure: BaseException | None = None
        prng = Prng(seed)
        self._heal_dice = prng.split("heal")
        self._drawn = actions is None
        self._coming: Iterator[Timed] = fate.draw(options, prng.split("fate")) if actions is None else iter(actions)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = 0
        self._over = False
        self._hash = hashlib.blake2b(digest_size=16)
        self._encoder = msgspec.msgpack.Encoder(enc_hook=str)
        self.network = Network(options, prng.split("network"))
        self.checkers = Checkers(options.config, every=every, invariants=invariants)
        self.shell = make_shell(self, options.config, self._model_names(), self, make_router=make_router)
        self.machines = self._machines(prng.split("machines"), make_link)
        self.shell.machines = self.machines
        self.poller = Poller(self, self.shell, self.machines)
        self.shell.start()
        self.poller.start()
        self._healed_at = 0.0
        self._probing: list[AgentId | None] | None = None
        self._asked = 0
        self._next_action()

    # ------------------------------------------------------------ running

    def run(self, steps_max: int) -> Verdict:
        """Until rest, a failure, or for a script without `Heal` its end. After `steps_max` steps a drawn world is healed."""
        try:
            while self.step():
                if self._drawn and self.steps >= steps_max:
                    self._heal_now()
        except Violation as error:
            return self._verdict(Outcome.CORRECTNESS, error, error.invariant)
        except _Unrest as error:
            return self._verdict(Outcome.LIVENESS, error, str(error).partition(" ")[0])
        except Exception as error:
            return self._verdict(Outcome.CRASH, error, type(error).__name__)
        return self._verdict(Outcome.PASSED, None, "")

    def step(self) -> bool:
        """The next event; False when there is none or the run is over."""
        if self._over or not self._heap:
            return False
        at, _, deed, given = heapq.heappop(self._heap)
        self.now = Instant(at)
        self.steps += 1
        deed(*given)
        return True

    def script(self, story: str = "") -> Script:
        """The run so far, to be kept."""
        return Script(header=script.Header(story=story, seed=self.seed, options=self.options), actions=list(self.actions))

    def digest(self) -> str:
        """Of all that passed between shell and router so far (D1)."""
        return self._hash.hexdigest()

    def _verdict(self, outcome: Outcome, failure: BaseException | None, invariant: str) -> Verdict:
        self.failure = failure
        return Verdict(
            outcome=outcome,
            seed=self.seed,
            steps=self.steps,
            at_s=self.now,
            digest=self.digest(),
            settled=self.checkers.settled,
            invariant=invariant,
            text=str(failure) if failure is not None else "",
        )

    # ------------------------------------------------------------ the stage

    def at(self, when: float, deed: Callable[..., None], *given: Any) -> None:
        """Do `deed(*given)` at `when`, or now if that has passed; in the order asked where instants are equal."""
        self._order += 1
        heapq.heappush(self._heap, (when if when > self.now else self.now, self._order, deed, given))

    def idle(self) -> None:
        """What was due was no longer wanted: no event of the world."""
        self.steps -= 1

    # ------------------------------------------------------------ the witness

    def started(self, router: Router, *, now: Instant) -> None:
        """A coordinator started."""
        self._hash.update(self._encoder.encode((self.steps, "started")))
        self.checkers.started(router, now=now)

    def before(self, event: Event | None, *, now: Instant) -> None:
        """The router is about to be called."""
        self.checkers.before(event, now=now)

    def after(self, event: Event | None, effects: Sequence[Effect], *, now: Instant) -> None:
        """The router was called."""
        self._hash.update(self._encoder.encode((self.steps, now, event, effects)))
        self.checkers.after(event, effects, now=now)

    # ------------------------------------------------------------ what befalls it

    def _next_action(self) -> None:
        timed = next(self._coming, None)
        if timed is not None:
            self.at(timed.at_s, self._act, timed)
        elif not self.healed:
            self.at(self.now + TAIL_S, self._end)

    def _act(self, timed: Timed) -> None:
        if self.healed:
            self.idle()
            return
        self.actions.append(timed)
        self.do(timed.do)
        if not self.healed:
            self._next_action()

    def _end(self) -> None:
        self._over = True

    def _heal_now(self) -> None:
        count = self._heal_dice.between(1, self.options.nodes)
        survivors = tuple(sorted(self._heal_dice.shuffled(range(self.options.nodes))[:count]))
        self._drawn = False
        self.at(self.now + INSTANT_S, self._act, Timed(self.now + INSTANT_S, Heal(survivors=survivors)))

    def do(self, action: Action) -> None:
        """Let `action` befall the world; one that names what is not there does nothing."""
        shell = self.shell
        match action:
            case script.Ask():
                shell.ask(action)
            case script.Leave(request=request):
                shell.leave(request)
            case script.Storm(one_in=one_in):
                for position, request in enumerate(list(shell.servings)):
                    if position % max(1, one_in) == 0:
                        shell.leave(request)
            case script.Forget(request=request):
                shell.forget(request)
            case script.Restart(for_s=for_s):
                if shell.up:
                    shell.crash()
                    self.poller.stop()
                    self.at(self.now + for_s, self._restart)
            case script.Partition(nodes=nodes, up=up, down=down, for_s=for_s):
                for node in nodes:
                    if node < len(self.machines):
                        self.network.cut(node, up=up, down=down, until=self.now + for_s)
            case Heal(survivors=survivors):
                self._heal(survivors)
            case _:
                if action.node < len(self.machines):
                    self._do_to_node(action, self.machines[action.node])

    def _do_to_node(self, action: Any, machine: Machine) -> None:
        match action:
            case script.Crash(for_s=for_s, silent=silent):
                machine.crash(silent=silent)
                self._later(for_s, machine.start)
            case script.OllamaDeath(for_s=for_s):
                machine.kill_ollama()
                self._later(for_s, machine.start_ollama)
            case script.Pause(for_s=for_s):
                machine.pause()
                self._later(for_s, machine.resume)
            case script.Slow(percent=percent, for_s=for_s):
                machine.slow(percent)
                self._later(for_s, machine.slow, 100)
            case script.Drift(percent=percent):
                machine.drift(percent)
            case script.Failing(how=how, for_s=for_s):
                machine.fail(how, self.now + for_s)
            case script.Clog(node=node, for_s=for_s):
                self.network.clog(node, until=self.now + for_s)
            case script.Order(node=node, command=command):
                self.shell.order(node, Command(command))
            case script.StopAgent(for_s=for_s):
                machine.stop_agent()
                self._later(for_s, self._reboot, machine)
            case script.Echo(back=back):
                if machine.heartbeats:
                    data = machine.heartbeats[-1 - back % len(machine.heartbeats)]
                    self.shell.called(machine, machine.boot, 0, "heartbeat", data)
            case script.Inventory(model=model, held=held):
                if model < len(names := machine.could_hold):
                    machine.hold(names[model], held)
            case script.Measured(cpu=cpu, memory=memory):
                machine.load = Load(cpu_usage=float(cpu), memory_usage=float(memory))
            case script.Configure(node=node, weight=weight, max_concurrent=cap):
                if self.shell.up and (agent_id := self.shell.ids.get(node)) is not None:
                    settings = AgentSettings(weight=weight, max_concurrent=cap)
                    self.shell.apply(SettingsChanged(agent_id=agent_id, settings=settings))
            case _:
                raise AssertionError(f"no such action: {action}")

    def _later(self, after_s: float, deed: Callable[..., None], *given: Any) -> None:
        """The end of a trouble; once the world is healed there is none to end."""
        self.at(self.now + after_s, self._unless_healed, deed, given)

    def _unless_healed(self, deed: Callable[..., None], given: tuple[Any, ...]) -> None:
        if not self.healed:
            deed(*given)

    def _reboot(self, machine: Machine) -> None:
        machine.crash(silent=False)
        machine.start()

    def _restart(self) -> None:
        if not self.shell.up:
            self.shell.start()
            self.poller.start()

    # ------------------------------------------------------------ rest

    def _heal(self, survivors: tuple[int, ...]) -> None:
        """Survivors are made whole, all others die for good."""
        self.healed = True
        self._healed_at = self.now
        self.network.heal(now=self.now)
        self._restart()
        for machine in self.machines:
            machine.slow(100)
            machine.fail("", 0.0)
            machine.resume()
            machine.mend()
            machine.drift(100)
            if machine.index not in survivors:
                machine.crash(silent=True)
            elif machine.agented and machine.link is not None and not machine.link.draining:
                machine.start_ollama()
            elif machine.agented:
                self._reboot(machine)
            else:
                machine.start()
                machine.start_ollama()
            for name in machine.could_hold:
                machine.hold(name, True)
            machine.load = Load(cpu_usage=10.0, memory_usage=20.0)
            self.do(script.Configure(node=machine.index))
        self.poller.restore(self.checkers.book.agents)
        self._judge()

    def _judge(self) -> None:
        """Let admins do their part, then look whether everything rests."""
        unmet = self._unmet()
        if not unmet:
            unmet = self._shares()
        if not unmet:
            self._over = True
        elif self.now - self._healed_at > REST_S:
            raise _Unrest(unmet)
        else:
            self.at(self.now + JUDGE_S, self._judge)

    def _unmet(self) -> str:
        shell, checkers = self.shell, self.checkers
        if self._probing is None:
            for node, agent_id in sorted(shell.ids.items()):
                agent = checkers.book.agents.get(agent_id)
                if agent is not None and agent.pending:
                    shell.order(node, Command.APPROVE)
                elif agent is not None and agent.out:
                    shell.order(node, Command.CONNECT)
        if shell.servings:
            return f"L1 {len(shell.servings)} requests are not settled, among them {next(iter(shell.servings.values())).request_id}"
        if checkers.requests:
            return f"L1 {next(iter(checkers.requests))} came, its edge is gone, and the router does not give it up"
        statistics = shell.router.statistics()
        if statistics.waiting:
            return f"L5 {statistics.waiting} requests wait"
        if statistics.in_flight:
            return f"L2 {statistics.in_flight} requests are in flight at the router"
        working = [machine.index for machine in self.machines if machine.in_flight]
        if working:
            return f"L2 nodes {working} still work for somebody"
        return self._unready()

    def _unready(self) -> str:
        router = self.shell.router
        for machine in self.machines:
            agent_id = self.shell.ids.get(machine.index)
            view = router.agent(agent_id) if agent_id is not None else None
            state = view.state if view is not None else "unknown"
            if machine.up and state != "ready":
                return f"L3 node {machine.index} lives and is {state}"
            if not machine.up and state not in ("offline", "held", "pending", "unknown"):
                return f"L3 node {machine.index} is dead and {state}"
        return ""

    def _shares(self) -> str:
        """L4: one request after the other; each of equal nodes must get some."""
        options = self.options
        if not options.homogeneous or options.config.strategy == "auto":
            return ""
        forgiven_s = options.config.eject_max_s + options.config.busy_pause_max_s
        kept_s = max(options.keep_alive_s, *fate.KEEP_ALIVES_S)  # so long a load may wait for a victim, even one that nobody wants any more
        if self.now - self._healed_at < forgiven_s + kept_s:
            return "L4 not every node is as good as new yet"
        if self._probing is None:
            self._probing = []
        else:
            self._probing.append(self.checkers.last_agent)
        alive = [machine for machine in self.machines if machine.up]
        if self._asked >= PROBE_ROUNDS * len(alive):
            starved = [machine.index for machine in alive if self.shell.ids[machine.index] not in self._probing]
            if starved:
                raise _Unrest(f"L4 nodes {starved} got none of {self._asked} requests among equal nodes")
            return ""
        self._asked += 1
        self.shell.ask(script.Ask(request=-self._asked, input_tokens=1, output_tokens=1))
        return "L4 not all were asked yet"

    # ------------------------------------------------------------ what it is made of

    def _model_names(self) -> list[str]:
        return list(MODELS)[: self.options.models]

    def _machines(self, prng: Prng, make_link: Callable[..., AgentLink]) -> list[Machine]:
        options, machines = self.options, []
        names = self._model_names()
        for index in range(options.nodes):
            dice = prng.split(f"machine-{index}")
            gpu = GPUS["a100-80" if options.homogeneous else dice.pick(list(GPUS))]
            models = {name: model_timing(name, MODELS[name], gpu) for name in names if fits(MODELS[name], gpu, slots=options.slots)}
            if not models:
                models = {names[0]: model_timing(names[0], MODELS[names[0]], gpu)}
            held = [name for name in models if options.homogeneous or dice.chance(Ratio(3, 4))] or list(models)[:1]
            timing = msgspec.structs.replace(
                node_timing(gpu, slots=options.slots, max_loaded=options.max_loaded),
                max_queue=options.max_queue,
                keep_alive_s=options.keep_alive_s,
            )
            machine = Machine(
                index, self, self.shell, timing=timing, models=models, held=held, prng=dice, make_link=make_link,
                agented=index >= options.agentless, trusted=not dice.chance(options.strangers),
            )  # fmt: skip
            machines.append(machine)
        return machines


def run(seed: int, options: Options, steps_max: int, **given: Any) -> Verdict:
    """A world from its seed to its end."""
    return World(seed, options, **given).run(steps_max)
