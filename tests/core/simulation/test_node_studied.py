"""What only studies ask of the timing machine."""

from tests.core.simulation.test_node import World


def test_who_waits_for_a_model_that_was_just_loaded_still_waits_for_those_before() -> None:
    for regroups, ready in ((False, [1.0, 2.0, 2.0]), (True, [1.0, 2.0, 1.0])):
        world = World(regroups=regroups)
        world.ask("a", "mid")
        world.ask("b", "tiny", at=0.1)
        world.ask("c", "mid", at=0.2)
        world.until(10)
        assert [world.timing(name).obtained for name in "abc"] == ready


def test_a_prompt_may_share_less_than_the_runner_knows() -> None:
    world = World()
    world.load()
    for name, shared in (("1", None), ("2", 40), ("3", None)):
        world.ask(name, conversation="c", shared_tokens=shared)
        world.until(world.now + 5)
    assert [world.timing(name).cached_tokens for name in "123"] == [0, 40, 99]
