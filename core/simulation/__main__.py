"""`python -m core.simulation`: run the world, or play a script; print what came of it.

The only module of the core that may print, read files, roll dice of its own or look at a clock (for the speed it reports). Exit status:
0 passed, 127 crash, 128 liveness, 129 correctness; 2 for wrong usage.
"""

import argparse
import random
import sys
import traceback
from pathlib import Path
from timeit import default_timer

import msgspec

from core import dump
from core.errors import RouterError
from core.invariants import check
from core.simulation import playback, script
from core.simulation.options import Options, lite, performance, swarm
from core.simulation.prng import Prng
from core.simulation.replay import STEPS_MAX, shorten
from core.simulation.world import Outcome, Verdict, World


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    given = _arguments(arguments)
    if given.replay is not None:
        return _replay(given)
    first = given.seed if given.seed is not None else random.Random().getrandbits(48)
    steps = settled = 0
    began = default_timer()
    for seed in range(first, first + given.seeds):
        options = _options(seed, given)
        if given.seeds == 1:
            print(f"seed {seed}, options {msgspec.json.encode(options).decode()}")
        world = World(seed, options, invariants=check, every=given.every)
        verdict = world.run(given.steps)
        steps, settled = steps + verdict.steps, settled + verdict.settled
        if not verdict.passed:
            return _failed(world, verdict, given)
    elapsed_s = default_timer() - began
    print(f"PASSED  seeds {first} to {first + given.seeds - 1}, {steps} steps, {settled} requests, {steps / elapsed_s:.0f} steps/s")
    if given.seeds == 1:
        print(f"digest {verdict.digest}")
    return 0


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m core.simulation", description="The router in a simulated world, in virtual time.")
    parser.add_argument("--seed", type=_seed, help="a number, or the hash of a commit; drawn when absent")
    parser.add_argument("--seeds", type=int, default=1, help="how many worlds, with consecutive seeds")
    parser.add_argument("--steps", type=int, default=20_000, help="steps of each world before it is healed")
    parser.add_argument("--nodes", type=int, help="instead of a drawn number")
    parser.add_argument("--every", type=int, default=1, help="calls of the router between two checks of its inside")
    parser.add_argument("--save", type=Path, help="write the script of a failure, shortened, to this file")
    parser.add_argument("--no-shrink", action="store_true", help="leave the script as long as it was")
    parser.add_argument("--replay", type=Path, help="play this script, or this dump of a running router, instead")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--lite", action="store_true", help="crashes only")
    kind.add_argument("--performance", action="store_true", help="no faults, a fixed workload: for measuring speed")
    return parser.parse_args(arguments)


def _seed(text: str) -> int:
    try:
        return int(text) if text.isdecimal() else int(text, 16)
    except ValueError:
        raise argparse.ArgumentTypeError(f"a seed is a number or a hash, not {text!r}") from None


def _options(seed: int, given: argparse.Namespace) -> Options:
    prng = Prng(seed).split("options")
    if given.performance:
        return performance(nodes=given.nodes or 8)
    return lite(prng, nodes=given.nodes) if given.lite else swarm(prng, nodes=given.nodes)


def _failed(world: World, verdict: Verdict, given: argparse.Namespace) -> int:
    print(f"{verdict.outcome.name}  seed {verdict.seed}, step {verdict.steps}, {verdict.at_s:.3f} s, digest {verdict.digest}")
    print(verdict.text)
    if given.replay is None:
        print(f"again: {_command(verdict.seed, given)}")
    if verdict.outcome is Outcome.CRASH and world.failure is not None:
        traceback.print_exception(world.failure, file=sys.stdout)
    if given.save is not None:
        kept = world.script()
        if not given.no_shrink:
            kept = shorten(kept, verdict, invariants=check, every=given.every)
        given.save.write_text("".join(f"{line}\n" for line in script.dump(kept)), encoding="utf-8")
        print(f"{len(kept.actions)} of {len(world.actions)} actions written to {given.save}")
    return verdict.outcome.value


def _command(seed: int, given: argparse.Namespace) -> str:
    """What runs this one world again, and keeps its script, shortened."""
    nodes = "" if given.nodes is None else f" --nodes {given.nodes}"
    kind = " --lite" if given.lite else " --performance" if given.performance else ""
    return f"python -m core.simulation --seed {seed} --steps {given.steps} --every {given.every}{nodes}{kind} --save failure.jsonl"


def _replay(given: argparse.Namespace) -> int:
    try:
        data = given.replay.read_bytes()
        if data.startswith(dump.MAGIC):
            return _play_dump(dump.load(data), given)
        with given.replay.open(encoding="utf-8") as lines:
            played = script.load(lines)
    except (OSError, RouterError, UnicodeError) as error:
        print(f"{given.replay} cannot be played: {error}", file=sys.stderr)
        return 2
    print(played.header.story)
    world = World(played.header.seed, played.header.options, actions=played.actions, invariants=check, every=given.every)
    verdict = world.run(STEPS_MAX)
    if not verdict.passed:
        return _failed(world, verdict, given)
    print(f"PASSED  {verdict.steps} steps, {verdict.settled} requests, digest {verdict.digest}")
    return 0


def _play_dump(kept: dump.Dump, given: argparse.Namespace) -> int:
    """A dump of a running router: does the same come of it?"""
    print(f"dump of version {kept.version}, made at {kept.made_at}: {len(kept.steps)} steps")
    played = playback.play(kept, invariants=check)
    if played.same:
        print(f"PASSED  {played.steps} steps, the same effects, digest {played.digest}")
        return 0
    if played.difference:
        print(f"the effects are not those of then (digest {played.digest}, then {played.recorded}); the first that differ:")
        print(played.difference)
    if played.failure:
        print(f"CORRECTNESS  {played.failure}")
        if given.save is not None:
            steps = len(kept.steps)
            if not given.no_shrink:
                kept = playback.shorten(kept, played, invariants=check)
            given.save.write_bytes(b"".join(dump.written(kept)))
            print(f"{len(kept.steps)} of {steps} steps written to {given.save}")
    return Outcome.CORRECTNESS.value


if __name__ == "__main__":
    sys.exit(main())
