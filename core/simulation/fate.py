"""What befalls the world, and when: an endless stream of actions drawn from a seed.

Decides arrivals of requests and troubles from the options alone, never from what happens in the world: that is what makes a recorded
script and the stream it came from the same thing. Clients are open-loop: they ask whether or not they were answered.
Invariant: instants never go back; the same seed and options give the same stream.
"""

from collections.abc import Iterator
from typing import Final

from core.simulation import script
from core.simulation.options import TROUBLES, Options
from core.simulation.prng import Prng, Ratio
from core.simulation.script import Action, Timed

COMMANDS: Final = ("drain", "connect", "disconnect", "disconnect_now", "delete", "approve", "connect", "approve")
"""What admins order; the healing ones twice as often."""
FAILINGS: Final = ("refuse_500", "refuse_503", "cut", "empty", "died", "load_error")
KEEP_ALIVES_S: Final = (0.0, 5.0, 60.0)
FOR_EVER_S: Final = -1.0
"""Drawn where the router makes room itself (`auto`). The other strategies leave that to the nodes, and a real Ollama lets a load wait for
ever whose busy victim is told to stay for ever while it is waited for."""
_RARE: Final = Ratio(1, 25)
_OFTEN: Final = Ratio(1, 2)
_THIRD: Final = Ratio(1, 3)


def draw(options: Options, prng: Prng) -> Iterator[Timed]:
    """Requests and troubles in the order of time."""
    gaps, asks, when, what = (prng.split(name) for name in ("gaps", "requests", "when", "troubles"))
    next_ask = gaps.exponential_s(options.gap_s)
    quiet = options.trouble_gap_s == 0 or not any(options.troubles)
    next_trouble = float("inf") if quiet else when.exponential_s(options.trouble_gap_s)
    number = 0
    while True:
        if next_ask <= next_trouble:
            yield Timed(next_ask, ask(number, options, asks))
            number += 1
            next_ask += gaps.exponential_s(options.gap_s)
        else:
            yield Timed(next_trouble, trouble(number, options, what))
            next_trouble += when.exponential_s(options.trouble_gap_s)


def ask(number: int, options: Options, prng: Prng) -> script.Ask:
    """A request, most of them ordinary."""
    kind = prng.pick(("embed", "load", "unload", "show", "unreadable")) if prng.chance(_RARE) else "chat"
    odd = prng.chance(_RARE)
    keep_alives_s = (*KEEP_ALIVES_S, FOR_EVER_S) if options.config.strategy == "auto" else KEEP_ALIVES_S
    return script.Ask(
        request=number,
        client=prng.below(options.clients),
        model=options.models if odd and prng.chance(_OFTEN) else _popular(options.models, prng),
        input_tokens=prng.between(1, 2000),
        output_tokens=0 if kind in ("embed", "load", "unload", "show") else prng.between(1, options.output_tokens),
        patience_s=options.patience_s * prng.between(50, 200) / 100,
        stream=not prng.chance(_THIRD),
        num_ctx=prng.pick((2048, 8192)) if prng.chance(_RARE) else None,
        keep_alive_s=prng.pick(keep_alives_s) if prng.chance(_RARE) else None,
        conversation=prng.below(20) if prng.chance(_THIRD) else None,
        kind=kind,
        spelling=prng.below(4),
    )


def trouble(number: int, options: Options, prng: Prng) -> Action:
    """Something that goes wrong, or is done on purpose; `number` requests came before it."""
    kind = TROUBLES[prng.weighted(options.troubles)]
    node = prng.below(options.nodes)
    for_s = prng.pick((0.5, 3.0, 20.0, 90.0)) * prng.between(50, 150) / 100
    match kind:
        case "crash" | "power_loss":
            return script.Crash(node=node, for_s=for_s, silent=kind == "power_loss")
        case "ollama_death":
            return script.OllamaDeath(node=node, for_s=min(for_s, 30.0))
        case "pause":
            return script.Pause(node=node, for_s=for_s)
        case "slow":
            return script.Slow(node=node, percent=prng.pick((2, 10, 40)), for_s=for_s)
        case "drift":
            return script.Drift(node=node, percent=prng.between(80, 120))
        case "failing":
            return script.Failing(node=node, how=prng.pick(FAILINGS), for_s=for_s)
        case "partition":
            return _partition(options, prng, for_s)
        case "clog":
            return script.Clog(node=node, for_s=for_s)
        case "restart":
            return script.Restart(for_s=min(for_s, 20.0))
        case "storm":
            return script.Storm(one_in=prng.between(1, 4))
        case _:
            return _deed(kind, node, number, options, prng, for_s)


def _deed(kind: str, node: int, number: int, options: Options, prng: Prng, for_s: float) -> Action:
    match kind:
        case "command":
            return script.Order(node=node, command=prng.pick(COMMANDS))
        case "settings":
            weight = prng.pick((None, 0.1, 1.0, 10.0))
            return script.Configure(node=node, weight=weight, max_concurrent=prng.pick((None, 1, 2, 5)))
        case "leaving":
            return script.StopAgent(node=node, for_s=for_s)
        case "echo":
            return script.Echo(node=node, back=prng.below(options.echo_heartbeats))
        case "inventory":
            return script.Inventory(node=node, model=prng.below(options.models), held=prng.chance(_OFTEN))
        case "metrics":
            return script.Measured(node=node, cpu=prng.below(101), memory=prng.below(101))
        case _:
            return script.Forget(request=max(0, number - 1 - prng.below(5)))


def _popular(models: int, prng: Prng) -> int:
    """The first model is asked for most, as in life."""
    return prng.weighted([2 * (models - index) for index in range(models)])


def _partition(options: Options, prng: Prng, for_s: float) -> script.Partition:
    nodes = tuple(sorted(prng.shuffled(range(options.nodes))[: prng.between(1, options.nodes)]))
    way = prng.below(4)
    return script.Partition(nodes=nodes, up=way != 0, down=way != 1, for_s=for_s)
