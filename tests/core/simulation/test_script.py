"""Scripts: what is written is read again, what is none is refused in one line, and every part of one can be played."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import RemoteError
from core.simulation import script
from core.simulation.options import Options, swarm
from core.simulation.prng import Prng
from core.simulation.script import Header, Script, Timed, dump, load
from tests.core.simulation.worlds import drawn


def test_what_is_written_is_read_again() -> None:
    world = drawn(12)
    world.run(600)
    written = world.script("a story")
    lines = list(dump(written))
    assert load(lines) == written
    assert load([*lines[:3], "", *lines[3:], "\n"]) == written
    assert "a story" in lines[0]


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([], "begins with a header"),
        (["{"], "line 1 is no part of a script"),
        (['{"seed":1}'], "line 1 is no part of a script"),
        ([next(dump(Script(header=Header(seed=1, options=Options()), actions=[]))), '{"at_s":1,"do":{"type":"sing"}}'], "line 2"),
        ([msgspec.json.encode(Header(seed=1, options=Options(), form=99)).decode()], "form 99"),
    ],
)
def test_what_is_no_script_is_refused(lines: list[str], text: str) -> None:
    with pytest.raises(RemoteError, match=text):
        load(lines)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.data())
def test_every_part_of_a_script_can_be_played(seed: int, data: st.DataObject) -> None:
    from core.simulation.replay import play

    world = drawn(seed)
    world.run(150)
    kept = [timed for timed in world.actions if data.draw(st.booleans())]
    verdict = play(Script(header=Header(seed=seed, options=world.options), actions=kept))
    assert verdict.passed, verdict


@pytest.mark.parametrize(
    "action",
    [
        script.Leave(request=99),
        script.Forget(request=99),
        script.Storm(one_in=0),
        script.Crash(node=99),
        script.Order(node=99, command="drain"),
        script.Partition(nodes=(99,)),
        script.Echo(node=99),
        script.Inventory(node=0, model=99, held=True),
        script.Configure(node=99),
    ],
    ids=lambda action: type(action).__name__,
)
def test_an_action_on_what_is_not_there_does_nothing(action: script.Action) -> None:
    from core.simulation.replay import play

    options = swarm(Prng(1).split("options"), nodes=2)
    header = Header(seed=1, options=options)
    with_it = play(Script(header=header, actions=[Timed(1.0, action)]))
    assert with_it.passed
    assert with_it.settled == 0
