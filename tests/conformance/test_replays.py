"""The call sequences of the `ollama` command and of Open WebUI, and the drop-in checklist."""

import pytest

from tests.conformance.checklist import CHECKLIST
from tests.conformance.replays import REPLAYS, Replay
from tests.conformance.run import checked, replayed


@pytest.mark.parametrize("replay", REPLAYS, ids=str)
def test_replay(replay: Replay) -> None:
    found = replayed(replay.program)[replay]
    assert found.problem == ""
    assert found.said


@pytest.mark.parametrize("text", CHECKLIST)
def test_item(text: str) -> None:
    assert checked()[text] == ""
