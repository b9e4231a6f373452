"""What is to be carried over, and whether there is anything."""

from core.changes import Changes
from core.units import AgentId


def test_whether_there_is_something_is_known_at_once() -> None:
    touched = Changes()
    assert not touched.any
    touched.touch()
    assert (touched.any, touched.touched) == (True, True)
    gone = Changes()
    gone.add(gone.lost, (AgentId("a"), "left"))
    assert (gone.any, gone.touched, gone.lost) == (True, False, [(AgentId("a"), "left")])
