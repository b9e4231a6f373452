"""Slots that leak in the timing machine, and what becomes of the requests that hang on them."""

from core.simulation.node import Left, UnloadAsked
from tests.core.simulation.test_node import World


def test_a_leaked_slot_hangs_whoever_comes_until_the_model_is_unloaded() -> None:
    world = World(slots=2)
    world.load()
    start = world.now
    for name in ("a", "b"):
        world.ask(name, out=101, leaks=True)
        world.until(world.now + 0.5)
        world.do(Left(name))
    world.ask("before", out=5, at=start + 2)
    world.until(start + 60)
    assert "before" not in world.finished()
    assert world.ps() == ["mid"], "it looks as well as ever"
    world.do(Left("before"))
    world.do(UnloadAsked("mid"))
    world.ask("after", out=5)
    world.until(world.now + 30)
    assert "after" in world.finished()


def test_a_leak_of_one_slot_of_two_leaves_one() -> None:
    world = World(slots=2)
    world.load()
    world.ask("a", out=101, leaks=True)
    world.until(world.now + 0.5)
    world.do(Left("a"))
    for name in ("b", "c"):
        world.ask(name, out=11)
    world.until(world.now + 60)
    assert world.timing("c").started >= world.timing("b").finished or world.timing("b").started >= world.timing("c").finished
